"""The held-out embryos of a data set, predicted with a model and its rivals, then evaluated.

To *assess* is to predict the held-out embryos and to *evaluate* the predictions; `evaluate` alone does the
latter for any two folders of labels. The runs of MLflow are called `predict` and `evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.images.frames import frame_stem
from nuclei3d.outputs import write_json

if TYPE_CHECKING:
    from nuclei3d.images.embryos import EmbryoFrame
    from nuclei3d.stages.evaluate import EvaluateResult

STOCK_FUSION = "stock fusion of the same network"
#: How the name of the baseline begins that is the model which the training started from.
START_MODEL = "start model"

#: The few main numbers, for `dvc metrics`; metrics.json has all of them, per volume too.
HEADLINE_FILE = "headline.json"
_HEADLINE = (
    "ap_0.50",
    "ap_0.75",
    "ap_mean",
    "f1_0.50",
    "precision",
    "recall",
    "recall_faint",
    "recall_bright",
    "seg",
    "det",
    "splits",
    "merges",
)


def assess(
    params: Params, data: Path, model: str, out: Path, *, slices: Path | None = None
) -> EvaluateResult:
    """Predict the held-out (test) frames of a data set and evaluate them, with the baselines beside them.

    `data.split` says which frames are held out, `evaluate.baselines` what is put beside the model, a folder,
    weights file or URI. `out` gets predictions and baselines (a folder per embryo), and evaluation; `slices`
    is the data set of the training, whose bins of contrast the evaluation then takes.
    """
    predict_held_out(params, data, model, out)
    return evaluate_held_out(params, data, model, out, slices=slices)


def predict_held_out(params: Params, data: Path, model: str, out: Path, *, link: bool = False) -> bool:
    """Predict the held-out frames, link their nuclei if wanted; tell whether all had been done before.

    Frames that were done before with the same model are kept; masks of frames that are no longer held out
    are removed, for the evaluation would take them in.
    """
    from nuclei3d.experiment.runs import stage_run
    from nuclei3d.stages.evaluate import refuse_other_evaluation
    from nuclei3d.stages.recorded import predict_run_name, record_predict

    refuse_other_evaluation(out / "evaluation")
    frames, predictions = _images_by_embryo(params, data), out / "predictions"
    inputs = {"data": data} | ({"model": Path(model)} if Path(model).exists() else {})
    images = [path for paths in frames.values() for path in paths]
    with stage_run("predict", params, inputs=inputs, name=predict_run_name(params, images, model)):
        results = [
            record_predict(params, paths, model, predictions / embryo, link=link)
            for embryo, paths in frames.items()
        ]
    _keep_only(frames, predictions)
    return all(frame.done_before for result in results for frame in result.frames)


def evaluate_held_out(
    params: Params, data: Path, model: str, out: Path, *, slices: Path | None = None
) -> EvaluateResult:
    """Predict the baselines and evaluate all; the main numbers also go to `HEADLINE_FILE`."""
    from nuclei3d.experiment.registry import find_model
    from nuclei3d.stages.recorded import record_evaluate

    baselines = predict_baselines(params, _images_by_embryo(params, data), model, out / "baselines")
    folder = find_model(model, params)
    history = folder / "history.csv"
    named = {"data": data, "slices": slices, "model": folder}
    result = record_evaluate(
        params,
        data,
        out / "predictions",
        out / "evaluation",
        images=data,
        baselines=baselines,
        summary=slices,
        model=folder,
        history=history if history.is_file() else None,
        only={
            (frame.label_path, frame.label_time): frame.share
            for frame in _held_out(params, data)
            if frame.label_path is not None
        },
        origin={name: path for name, path in named.items() if path is not None and path.exists()},
    )
    write_json(out / "evaluation" / HEADLINE_FILE, headline(result.metrics))
    return result


def headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Give the few numbers of a metrics.json that a reader looks at first; undefined ones are left out."""
    from nuclei3d.stages.evaluate import flat_scores

    scores = flat_scores(metrics)
    return {name: scores[name] for name in _HEADLINE if name in scores}


def _held_out(params: Params, data: Path) -> tuple[EmbryoFrame, ...]:
    from nuclei3d.images.embryos import find_embryos, split_embryos

    frames = split_embryos(find_embryos(data), params.data.split).test
    if not frames:
        raise InputError(f"no labelled test frames in {data}; name test embryos in data.split.test")
    return frames


def _images_by_embryo(params: Params, data: Path) -> dict[str, list[Path]]:
    images: dict[str, dict[Path, None]] = {}
    for frame in _held_out(params, data):
        # once, though several of its time points may be held out
        images.setdefault(frame.embryo, {})[frame.image_path] = None
    return {embryo: list(paths) for embryo, paths in images.items()}


def _keep_only(frames: Mapping[str, Sequence[Path]], predictions: Path) -> None:
    """Remove masks of frames that are not among these: an evaluation of the folder would take them in."""
    from nuclei3d.stages.nuclei_table import table_path
    from nuclei3d.stages.predict_page import PAGE_FILE
    from nuclei3d.stages.predicted import forget

    for masks in predictions.glob("*/*_masks.ome.tif"):
        stem = masks.name.removesuffix("_masks.ome.tif")
        # a file of several time points gives <stem>_t000 and so on
        names = {frame_stem(path) for path in frames.get(masks.parent.name, [])}
        if not names & {stem, stem.rpartition("_t")[0]}:
            # what was changed by hand, or came from elsewhere, is laid aside
            forget(masks.parent, stem)
            masks.unlink(missing_ok=True)
            table_path(masks.parent, stem).unlink(missing_ok=True)
    for page in predictions.glob(f"*/{PAGE_FILE}"):
        if page.parent.name not in frames:
            page.unlink()


class _Baseline(NamedTuple):
    name: str
    folder: str
    model: str
    mode: str
    diameter_um: float | None = None


def predict_baselines(
    params: Params, frames: Mapping[str, Sequence[Path]], model: str, out: Path
) -> dict[str, Path]:
    """Predict held-out frames (images by embryo) with the baselines that `evaluate.baselines` names.

    Frames that were done before with the same network and settings are kept; masks of baselines of earlier
    calls that are no longer wanted are removed. Gives the folder of each, ``<out>/<baseline>``, with a folder
    per embryo, by the name that the report gives it.
    """
    from nuclei3d.stages.predict import predict

    out.mkdir(parents=True, exist_ok=True)
    made: dict[str, Path] = {}
    for baseline in _wanted(params, model):
        say(f"baseline: {baseline.name}")
        # a 3D model beside the 2D one is part of what is evaluated, not of what stands beside it
        predicting = params.predict.model_copy(
            update={"mode": baseline.mode, "volume_model": None, "report": False}
        )
        if predicting.diameter_um is None and baseline.diameter_um is not None:
            predicting = predicting.model_copy(update={"diameter_um": baseline.diameter_um})
        for embryo, images in frames.items():
            predict(
                params.model_copy(update={"predict": predicting}),
                images,
                baseline.model,
                out / baseline.folder / embryo,
            )
        _keep_only(frames, out / baseline.folder)
        made[baseline.name] = out / baseline.folder
    for pattern in ("stock_fusion", "champion_*", "start_model"):
        for folder in set(out.glob(pattern)) - set(made.values()):
            _keep_only({}, folder)
    return made


def _wanted(params: Params, model: str) -> list[_Baseline]:
    from nuclei3d.networks.folder import INFO_FILE, read_info

    wanted = []
    if "stock_fusion" in params.evaluate.baselines and params.predict.mode != "cellpose":
        file = Path(model) / INFO_FILE
        if params.predict.mode == "full3d" or (file.is_file() and not read_info(file).for_cellpose):
            say("Cellpose does not load this network (3D, or of another width): its fusion is left out")
        else:
            wanted.append(_Baseline(STOCK_FUSION, "stock_fusion", model, "cellpose"))
    if "champion" in params.evaluate.baselines and (champion := _find_champion(params, model)):
        wanted.append(champion)
    if "start_model" in params.evaluate.baselines and (start := _find_start(params, model)):
        wanted.append(start)
    return wanted


def _find_start(params: Params, model: str) -> _Baseline | None:
    """Find the model that this one started from; it is told how large the new embryos' nuclei are."""
    from nuclei3d.digests import digest_of
    from nuclei3d.experiment.registry import find_model
    from nuclei3d.networks.folder import INFO_FILE, load_model, read_info

    file = Path(model) / INFO_FILE
    if not file.is_file() or "start_md5" not in (info := read_info(file)).lineage:
        return None
    named = info.lineage["start_from"]
    for place in (params.train.start_from, named):
        try:
            start = load_model(find_model(place or named, params))
        except InputError:
            continue
        if digest_of(start.path) == info.lineage["start_md5"]:
            return _Baseline(
                f"{START_MODEL} ({named})",
                "start_model",
                place or named,
                _mode_for(params, start.info.kind),
                info.nucleus_diameter_um,
            )
    say(
        f"the model that this one started from, {named}, is not there as it was: that baseline is left out "
        "(--set train.start_from=MODEL says where it lies)"
    )
    return None


def _mode_for(params: Params, kind: str) -> str:
    if kind == "full3d":
        return "full3d"
    return "ortho" if params.predict.mode in ("full3d", "mixed") else params.predict.mode


def _find_champion(params: Params, model: str) -> _Baseline | None:
    """Find the champion, or the one before it where the champion has the weights of the evaluated model."""
    from nuclei3d.experiment.provenance import md5_of_input
    from nuclei3d.experiment.registry import champions, fetch_model
    from nuclei3d.networks.folder import INFO_FILE, read_info

    versions, own = champions(params), Path(model)
    if versions and own.is_dir():
        own = own / read_info(own / INFO_FILE).name
    for version in versions:
        uri = f"models:/{params.tracking.registered_name}/{version}"
        folder = fetch_model(uri, params)
        info = read_info(folder / INFO_FILE)
        if not own.is_file() or md5_of_input(own) != md5_of_input(folder / info.name):
            break
        say(f"version {version} of the registered model is this very model: it is no baseline")
    else:
        return None
    return _Baseline(
        f"champion (version {version})", f"champion_{version}", uri, _mode_for(params, info.kind)
    )
