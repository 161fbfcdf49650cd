"""The released model on BBBC050: three folds that leave embryos out, then all embryos.

    python benchmarks/released_model.py --data DIR --out DIR [--params FILE] [--set NAME=VALUE] [--json]
    python benchmarks/released_model.py --data DIR --out DIR --folds 1   the same, but fold 1 alone
    python benchmarks/released_model.py --data DIR --out DIR --final     ... but the last training alone

Each fold trains on the embryos that it does not hold out, chooses epoch and thresholds on one of them that
is kept for that, and segments those that it holds out. Every embryo is held out once; the figures are pooled
over all of them, with intervals over embryos. The last network trains on all embryos, for as many epochs;
its thresholds are chosen on frames that the networks of the folds did not train on.

Where an embryo has a folder ``labels_repaired``, its frames stand in for those of ``labels`` in training and
scores; labels below prepare.min_volume_um3 do not count. The scores against the labels as published stand
beside them.

Under --out: ``predictions/<embryo>`` and ``scores`` of the held-out embryos, ``table.md``, ``result.json``,
and ``release/<name>``, the model folder with its card. A step whose output is there is not done again, and a
training that was stopped goes on after its last epoch. Folds may be run by processes side by side; the
command without --folds and --final then gathers what they made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embryos import (
    EMBRYOS,
    figures_of,
    keep_parameters,
    predict_frames,
    score,
    split_of,
    table_of,
    train_on,
    with_split,
    write_result,
)
from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.networks.folder import ModelInfo, load_model, save_model
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.segmentation.thresholds import LabelledFlow
from nuclei3d.stages.calibrate import (
    choose_for,
    predict_labelled,
    validation_settings,
)
from nuclei3d.stages.labelled_frames import read_to_scale, spread_evenly
from shared import new_parser, params_of

METHOD = "nuclei3d, embryos left out"


@dataclass(frozen=True)
class Fold:
    """The embryos that a fold holds out, and the one of the others that chooses epoch and thresholds."""

    number: int
    held_out: tuple[str, ...]
    validation: str

    @property
    def name(self) -> str:
        """Name of the fold's folder."""
        return f"fold{self.number}"

    def params(self, params: Params) -> Params:
        """Give the parameters of the fold."""
        others = [name for name in EMBRYOS if name not in (*self.held_out, self.validation)]
        return with_split(params, others, [self.validation], self.held_out)


FOLDS = (
    Fold(1, ("Emb11", "Emb08", "Emb05", "Emb02"), "Emb10"),
    Fold(2, ("Emb10", "Emb07", "Emb04", "Emb01"), "Emb09"),
    Fold(3, ("Emb09", "Emb06", "Emb03"), "Emb08"),
)


def repaired_view(data: Path, out: Path) -> Path:
    """Link the embryos with the labels of ``<embryo>/labels_repaired`` in place of their namesakes."""
    view = out / "embryos"
    for embryo in EMBRYOS:
        (view / embryo / "labels").mkdir(parents=True, exist_ok=True)
        links = {view / embryo / "images": data / embryo / "images"}
        for path in sorted((data / embryo / "labels").glob("*.tif")):
            repaired = data / embryo / "labels_repaired" / path.name
            links[view / embryo / "labels" / path.name] = repaired if repaired.is_file() else path
        for link, target in links.items():
            if not link.is_symlink():
                link.symlink_to(target.resolve())
    return view


def final_params(params: Params) -> Params:
    """Give the parameters of the last training: nothing is held out, so nothing is chosen."""
    alone = {
        "train": params.train.model_copy(update={"select": "last", "validate_volumes_every": 0}),
        "calibrate": params.calibrate.model_copy(update={"volumes": 0}),
    }
    return with_split(params, EMBRYOS, (), ()).model_copy(update=alone)


def pool_thresholds(params: Params, info: ModelInfo, data: Path, out: Path, frames: int) -> ModelInfo:
    """Choose the thresholds of the last network on frames that each fold's network has not trained on."""
    seen: list[LabelledFlow] = []
    for fold in FOLDS:
        model = load_model(out / fold.name / "model")
        unseen = split_of(with_split(params, [fold.validation], fold.held_out, ()), data).validation
        volumes = list(read_to_scale(spread_evenly(unseen, frames * len(fold.held_out)), params, None))
        segmenter = Segmenter(model, validation_settings(model.info, params), params.predict.device)
        seen += predict_labelled(segmenter, volumes)
    return choose_for(info, params.calibrate, validation_settings(info, params), seen)[0]


def score_held_out(params: Params, data: Path, out: Path, name: str, least_um3: float) -> dict[str, Any]:
    """Score all held-out embryos together against the labels of `data` from a volume on."""
    frames = split_of(with_split(params, EMBRYOS, (), ()), data).train
    counted = params.evaluate.model_copy(update={"min_true_volume_um3": least_um3})
    chosen = params.model_copy(update={"evaluate": counted})
    return score(chosen, frames, out / "predictions", out / "scores" / name, method=METHOD)


def thresholds_of(model: Path) -> dict[str, float]:
    """Give a model's thresholds."""
    info = load_model(model).info
    named = {"cellprob": info.cellprob_threshold, "score": info.score_threshold}
    return named | {"min_volume_um3": info.min_volume_um3}


def release(params: Params, data: Path, out: Path, result: Mapping[str, Any], frames: int) -> Path:
    """Write the model folder that is released, with compact weights, pooled thresholds and the card."""
    final = load_model(out / "final" / "model")
    folder = out / "release" / params.train.name
    if not (folder / "model.json").is_file():
        info = pool_thresholds(params, final.info, data, out, frames)
        save_model(folder, final.network, info, model_card(info, result), compact=True)
    return folder


def model_card(info: ModelInfo, result: Mapping[str, Any]) -> str:
    """Write the card of the released model."""
    template = Path(__file__).with_name("released_model_card.md").read_text(encoding="utf-8")
    return template.format(
        name=info.name,
        nucleus_diameter_um=info.nucleus_diameter_um,
        diameter_px=info.diameter_px,
        embryos=len(result["embryos"]),
        volumes=result["volumes"],
        nuclei=result["nuclei"],
        table=table_of(result["metrics"]),
        bins=", ".join(f"{value:.2f}" for value in result["recall_by_contrast"][METHOD]),
        steps=result["steps"],
        lineage="\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in info.lineage.items()),
    )


def main() -> None:
    """Read the command line, do what is asked, print the table where all of it is there."""
    parser = new_parser(__doc__, whole=True, embryos=True, params=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--folds", type=int, nargs="+", choices=[fold.number for fold in FOLDS])
    parser.add_argument("--final", action="store_true", help="do the last training, not the table")
    parser.add_argument("--calibration-frames", type=int, default=4, help="per held-out embryo")
    args = parser.parse_args()
    params, out = params_of(args), args.out
    keep_parameters(params, out)
    data = repaired_view(args.data, out)
    everything = args.folds is None and not args.final
    for fold in FOLDS:
        if everything or fold.number in (args.folds or ()):
            say(f"=== {fold.name}: without {', '.join(fold.held_out)}; {fold.validation} validates")
            chosen = fold.params(params)
            model = train_on(chosen, data, out / fold.name)
            predict_frames(chosen, split_of(chosen, data).test, model, out / "predictions")
    if everything or args.final:
        say(f"=== final: {len(EMBRYOS)} embryos")
        train_on(final_params(params), data, out / "final")
    if not everything:
        return
    metrics = score_held_out(params, data, out, "repaired", params.prepare.min_volume_um3)
    published = score_held_out(params, args.data, out, "published", 0.0)
    result: dict[str, Any] = {
        "embryos": list(EMBRYOS),
        "volumes": len(metrics["volumes"]),
        "nuclei": metrics["n_true"],
        "steps": params.train.epochs * (params.train.crops_per_epoch or 0) // params.train.batch_size,
        "folds": [{**asdict(fold), "thresholds": thresholds_of(out / fold.name / "model")} for fold in FOLDS],
        **figures_of(metrics, METHOD),
    }
    for method, row in figures_of(published, METHOD)["metrics"].items():
        result["metrics"][f"{method}; labels as published"] = row
    folder = release(params, data, out, result, args.calibration_frames)
    result["released"] = {"folder": str(folder), "thresholds": thresholds_of(folder)}
    write_result(out, result, table_of(result["metrics"]), as_json=args.json)
    say(f"the model is in {folder}")


if __name__ == "__main__":
    main()
