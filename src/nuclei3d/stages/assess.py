"""The held-out embryos of a data set: predicted with a model, then evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuclei3d.config import Params
from nuclei3d.errors import InputError
from nuclei3d.volumes.whole import whole_file

if TYPE_CHECKING:
    from nuclei3d.stages.evaluate import EvaluateResult

#: The few main numbers, for `dvc metrics`; metrics.json has all of them, per volume too.
HEADLINE_FILE = "headline.json"


def assess(
    params: Params,
    data: Path,
    model: str,
    predictions: Path,
    evaluation: Path,
    *,
    slices: Path | None = None,
) -> EvaluateResult:
    """Predict the held-out (test) frames of a data set and evaluate them.

    Parameters
    ----------
    params
        `data.split` says which frames are held out.
    data
        The data set.
    model
        A model folder, weights file, or URI.
    predictions, evaluation
        Folders to write: the masks, a folder per embryo; metrics.json and the report.
    slices
        The slice data set of the training, whose bins of contrast the evaluation then takes.
    """
    predict_held_out(params, data, model, predictions)
    return evaluate_held_out(params, data, predictions, evaluation, slices=slices, model=Path(model))


def predict_held_out(params: Params, data: Path, model: str, predictions: Path) -> dict[str, Any]:
    """Predict the held-out frames, a folder per embryo.

    Frames that were done before with the same model are kept; masks of frames that are no longer held out
    are removed, for the evaluation would take them in.
    """
    from nuclei3d.stages.tracked import predict_tracked
    from nuclei3d.tracking.runs import stage_run
    from nuclei3d.volumes.embryos import find_embryos, split_embryos

    split = split_embryos(find_embryos(data), params.data.split)
    frames: dict[str, list[Path]] = {}
    for frame in split.test:
        frames.setdefault(frame.embryo, []).append(frame.image_path)
    if not frames:
        raise InputError(f"no labelled test frames in {data}; name test embryos in data.split.test")
    inputs = {"data": data} | ({"model": Path(model)} if Path(model).exists() else {})
    with stage_run("predict", params, inputs=inputs):
        for embryo, images in frames.items():
            predict_tracked(params, images, model, predictions / embryo)
    _remove_others(predictions, frames)
    return {"out": str(predictions), "frames": {embryo: len(images) for embryo, images in frames.items()}}


def _remove_others(predictions: Path, frames: dict[str, list[Path]]) -> None:
    from nuclei3d.volumes.listing import frame_stem

    for masks in predictions.glob("*/*_masks.ome.tif"):
        wanted = {frame_stem(path) for path in frames.get(masks.parent.name, [])}
        stem = masks.name.removesuffix("_masks.ome.tif")
        if stem not in wanted:
            masks.unlink()
            masks.with_name(f"{stem}_nuclei.csv").unlink(missing_ok=True)


def evaluate_held_out(
    params: Params,
    data: Path,
    predictions: Path,
    evaluation: Path,
    *,
    slices: Path | None = None,
    model: Path | None = None,
) -> EvaluateResult:
    """Evaluate the predictions of the held-out frames; the main numbers also go to `HEADLINE_FILE`."""
    from nuclei3d.stages.tracked import evaluate_tracked

    history = None if model is None else model / "history.csv"
    named = {"data": data, "slices": slices, "model": model}
    origin = {name: path for name, path in named.items() if path is not None and path.exists()}
    embryos = sorted(folder.name for folder in predictions.iterdir() if folder.is_dir())
    if len(embryos) == 1:
        # Looked at alone, an embryo needs no word about the training embryos that were not predicted.
        data, predictions = data / embryos[0], predictions / embryos[0]
    result = evaluate_tracked(
        params,
        data,
        predictions,
        evaluation,
        images=data,
        summary=slices,
        history=history if history is not None and history.is_file() else None,
        origin=origin,
    )
    with whole_file(evaluation / HEADLINE_FILE) as partial:
        partial.write_text(json.dumps(headline(result.metrics), indent=2) + "\n", encoding="utf-8")
    return result


def headline(scores: Mapping[str, Any]) -> dict[str, float]:
    """Give the few numbers of a metrics.json that a reader looks at first; undefined ones are left out."""
    numbers = {
        "ap_0.50": scores.get("ap", {}).get("0.50"),
        "ap_0.75": scores.get("ap", {}).get("0.75"),
        "f1_0.50": scores.get("f1", {}).get("0.50"),
        "precision": scores.get("precision"),
        "recall": scores.get("recall"),
        "recall_faint": scores.get("recall_faint"),
        "recall_bright": scores.get("recall_bright"),
        "seg": scores.get("seg"),
        "det": scores.get("det"),
        "splits": scores.get("splits"),
        "merges": scores.get("merges"),
    }
    return {name: value for name, value in numbers.items() if value is not None}
