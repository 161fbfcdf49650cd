"""Train the released model on BBBC050: three folds that leave embryos out, then all embryos.

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

Under --out: ``predictions/<embryo>`` and ``evaluation`` of the held-out embryos, ``table.md``,
``result.json``, and ``release/<name>``, the model folder with its card. A step whose output is there is not
done again, and a training that was stopped goes on after its last epoch. Folds may be run by processes side
by side; the command without --folds and --final then gathers what they made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bbbc050 import as_markdown, figures_of, gather_truth, predict_once
from nuclei3d.config import Params, load_params, params_as_dict
from nuclei3d.console import say
from nuclei3d.images.embryos import find_embryos, read_labelled, split_embryos
from nuclei3d.networks.folder import ModelInfo, load_model, save_model
from nuclei3d.outputs import whole_file
from nuclei3d.scoring.matching import match, overlap_table
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.segmentation.settings import segmentation_settings
from nuclei3d.segmentation.thresholds import LabelledFlow, Thresholds
from nuclei3d.stages.calibrate import (
    choose_for,
    predict_labelled,
    read_calibration_volumes,
    validation_settings,
)
from nuclei3d.stages.evaluate import evaluate
from nuclei3d.stages.prepare import prepare
from nuclei3d.stages.train import train
from shared import EMBRYOS, new_parser, once

METHOD = "nuclei3d, embryos left out"
PARAMETERS = "parameters.json"
# The sections that decide what a network becomes and finds.
DECISIVE = ("seed", "data", "normalization", "prepare", "train", "calibrate", "predict")


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


def with_split(
    params: Params, train: Sequence[str], validation: Sequence[str], test: Sequence[str]
) -> Params:
    """Give the parameters with embryos named for each part."""
    split = params.data.split.model_copy(
        update={"by": "embryo", "train": tuple(train), "validation": tuple(validation), "test": tuple(test)}
    )
    return params.model_copy(update={"data": params.data.model_copy(update={"split": split})})


def fold_params(params: Params, fold: Fold) -> Params:
    """Give the parameters of a fold."""
    others = [name for name in EMBRYOS if name not in (*fold.held_out, fold.validation)]
    return with_split(params, others, [fold.validation], fold.held_out)


def final_params(params: Params) -> Params:
    """Give the parameters of the last training: nothing is held out, so nothing is chosen."""
    alone = with_split(params, EMBRYOS, (), ())
    return alone.model_copy(
        update={
            "train": params.train.model_copy(update={"select": "last", "validate_volumes_every": 0}),
            "calibrate": params.calibrate.model_copy(update={"volumes": 0}),
        }
    )


def train_once(params: Params, data: Path, folder: Path) -> dict[str, float]:
    """Prepare and train in a folder; give the seconds of each step."""
    folder.mkdir(parents=True, exist_ok=True)
    times: dict[str, float] = {}
    once(folder, "prepare", times, lambda: prepare(params, data, folder / "slices"))
    once(folder, "train", times, lambda: train(params, folder / "slices", folder / "model", data=data))
    return times


def run_fold(params: Params, fold: Fold, data: Path, out: Path) -> None:
    """Train without the fold's embryos, then segment them."""
    say(f"=== {fold.name}: without {', '.join(fold.held_out)}; {fold.validation} validates")
    chosen, folder = fold_params(params, fold), out / fold.name
    times = train_once(chosen, data, folder)
    predict_once(chosen, fold.held_out, data, folder / "model", folder, times, out / "predictions")


def pool_thresholds(
    params: Params, info: ModelInfo, data: Path, out: Path, frames_per_embryo: int
) -> tuple[ModelInfo, Thresholds]:
    """Choose the thresholds of the last network on frames that each fold's network has not trained on."""
    seen: list[LabelledFlow] = []
    for fold in FOLDS:
        model = load_model(out / fold.name / "model")
        unseen = with_split(params, [fold.validation], fold.held_out, ())
        count = frames_per_embryo * len(fold.held_out)
        unseen = unseen.model_copy(
            update={"calibrate": params.calibrate.model_copy(update={"volumes": count})}
        )
        volumes = read_calibration_volumes(unseen, data)
        segmenter = Segmenter(model, validation_settings(model.info, params), params.predict.device)
        seen += predict_labelled(segmenter, volumes)
    return choose_for(info, params.calibrate, validation_settings(info, params), seen)


def evaluate_held_out(params: Params, data: Path, out: Path, name: str, least_um3: float) -> dict[str, Any]:
    """Score all held-out embryos together against the labels of `data` from a volume on."""
    folder = out / name
    truth, images = out / "truth" / name / "labels", out / "truth" / name / "images"
    frames = split_embryos(find_embryos(data), with_split(params, EMBRYOS, (), ()).data.split).train
    once(out, f"truth_{name}", {}, lambda: gather_truth(list(frames), truth, images))
    counted = params.evaluate.model_copy(update={"min_true_volume_um3": least_um3})
    chosen = params.model_copy(update={"evaluate": counted})
    evaluate(chosen, truth, out / "predictions", folder, images=images, method=METHOD)
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics


def gather(params: Params, metrics: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Put result.json together from what the steps left."""
    folds = [
        {
            **asdict(fold),
            "thresholds": thresholds_of(load_model(out / fold.name / "model").info),
            "seconds": seconds_of(out / fold.name),
        }
        for fold in FOLDS
    ]
    return {
        "embryos": list(EMBRYOS),
        "volumes": len(metrics["volumes"]),
        "nuclei": metrics["n_true"],
        "steps": params.train.epochs * (params.train.crops_per_epoch or 0) // params.train.batch_size,
        "folds": folds,
        "final_seconds": seconds_of(out / "final"),
        **figures_of(metrics, METHOD),
        "by_embryo": {
            embryo: {
                name: scores.get(name) for name in ("seg", "mucov", "foreground_iou", "precision", "recall")
            }
            | {"ap_0.50": scores["ap"]["0.50"]}
            for embryo, scores in metrics["by_embryo"].items()
        },
    }


def thresholds_of(info: ModelInfo) -> dict[str, float]:
    """Give a model's thresholds."""
    named = {"cellprob": info.cellprob_threshold, "score": info.score_threshold}
    return named | {"min_volume_um3": info.min_volume_um3}


def seconds_of(folder: Path) -> dict[str, float]:
    """Read how long each step took."""
    return {path.stem: float(path.read_text()) for path in sorted(folder.glob("*.seconds"))}


def release(params: Params, data: Path, out: Path, result: Mapping[str, Any], frames_per_embryo: int) -> Path:
    """Write the model folder that is released, with compact weights, pooled thresholds and the card."""
    final = load_model(out / "final" / "model")
    folder = out / "release" / params.train.name
    if (folder / "model.json").is_file():
        return folder
    info, _ = pool_thresholds(params, final.info, data, out, frames_per_embryo)
    save_model(folder, final.network, info, model_card(info, result), compact=True)
    return folder


def compact_agreement(params: Params, data: Path, trained: Path, released: Path) -> dict[str, Any]:
    """Segment the last frame of one embryo a fold with the weights as trained and as released."""
    settings = segmentation_settings(load_model(released).info, params.predict)
    segmenters = [
        Segmenter(load_model(path).network, settings, params.predict.device) for path in (trained, released)
    ]
    nuclei, hits, union = 0, 0, 0
    for fold in FOLDS:
        frame = split_embryos(find_embryos(data), fold_params(params, fold).data.split).test[-1]
        volume = read_labelled(frame, params.data)
        table = overlap_table(*(each.segment(volume.image, volume.voxel_size).labels for each in segmenters))
        same = match(table, 0.9).tp
        nuclei += table.n_true
        hits += same
        union += table.n_true + table.n_pred - same
    return {"frames": len(FOLDS), "nuclei": nuclei, "ap_0.90": hits / max(1, union)}


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
        table=as_markdown(result),
        bins=", ".join(f"{value:.2f}" for value in result["recall_by_contrast"][METHOD]),
        steps=result["steps"],
        lineage="\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in info.lineage.items()),
    )


def keep_parameters(params: Params, out: Path) -> None:
    """Refuse to mix steps made with different parameters in one folder."""
    tree = params_as_dict(params)
    chosen = json.loads(json.dumps({name: tree[name] for name in DECISIVE}))
    path = out / PARAMETERS
    if path.is_file():
        changed = sorted(differing(json.loads(path.read_text()), chosen))
        if changed:
            raise SystemExit(
                f"{out} was begun with other parameters ({', '.join(changed)}); give those, or another --out"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(chosen, indent=2) + "\n")


def differing(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Name the parameters that differ; those that only one side knows come from another version."""
    for name in before.keys() & now.keys():
        if isinstance(before[name], dict) and isinstance(now[name], dict):
            yield from differing(before[name], now[name], f"{prefix}{name}.")
        elif before[name] != now[name]:
            yield prefix + name


def main() -> None:
    """Read the command line, do what is asked, print the table where all of it is there."""
    parser = new_parser(__doc__, whole=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--params", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--folds", type=int, nargs="+", choices=[fold.number for fold in FOLDS])
    parser.add_argument("--final", action="store_true", help="do the last training, not the table")
    parser.add_argument("--calibration-frames", type=int, default=4, help="per held-out embryo")
    args = parser.parse_args()
    params = load_params(args.params, args.overrides)
    keep_parameters(params, args.out)
    data = repaired_view(args.data, args.out)
    everything = args.folds is None and not args.final
    for fold in FOLDS:
        if everything or fold.number in (args.folds or ()):
            run_fold(params, fold, data, args.out)
    if everything or args.final:
        say(f"=== final: {len(EMBRYOS)} embryos")
        train_once(final_params(params), data, args.out / "final")
    if not everything:
        return
    debris = params.prepare.min_volume_um3
    metrics = evaluate_held_out(params, data, args.out, "evaluation", debris)
    published = evaluate_held_out(params, args.data, args.out, "evaluation_published", 0.0)
    result = gather(params, metrics, args.out)
    for method, row in figures_of(published, METHOD)["metrics"].items():
        result["metrics"][f"{method}; labels as published"] = row
    (args.out / "table.md").write_text(as_markdown(result) + "\n")
    folder = release(params, data, args.out, result, args.calibration_frames)
    result["released"] = {
        "folder": str(folder),
        "thresholds": thresholds_of(load_model(folder).info),
        "float16_against_float32": compact_agreement(params, data, args.out / "final" / "model", folder),
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result) if args.json else as_markdown(result))
    say(f"the model is in {folder}")


if __name__ == "__main__":
    main()
