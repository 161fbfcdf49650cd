"""The held-out embryos of a data set: predicted with a model, then evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuclei3d.config import Params
from nuclei3d.errors import InputError

if TYPE_CHECKING:
    from nuclei3d.stages.evaluate import EvaluateResult


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
    """Predict the held-out frames, a folder per embryo; they appear together or not at all."""
    from nuclei3d.stages.tracked import predict_tracked
    from nuclei3d.tracking.runs import stage_run
    from nuclei3d.volumes.embryos import find_embryos, split_embryos
    from nuclei3d.volumes.whole import whole_folder

    split = split_embryos(find_embryos(data), params.data.split)
    frames: dict[str, list[Path]] = {}
    for frame in split.test:
        frames.setdefault(frame.embryo, []).append(frame.image_path)
    if not frames:
        raise InputError(f"no labelled test frames in {data}; name test embryos in data.split.test")
    inputs = {"data": data} | ({"model": Path(model)} if Path(model).exists() else {})
    with stage_run("predict", params, inputs=inputs), whole_folder(predictions) as folder:
        for embryo, images in frames.items():
            predict_tracked(params, images, model, folder / embryo)
    return {"out": str(predictions), "frames": {embryo: len(images) for embryo, images in frames.items()}}


def evaluate_held_out(
    params: Params,
    data: Path,
    predictions: Path,
    evaluation: Path,
    *,
    slices: Path | None = None,
    model: Path | None = None,
) -> EvaluateResult:
    """Evaluate the predictions of the held-out frames."""
    from nuclei3d.stages.tracked import evaluate_tracked

    history = None if model is None else model / "history.csv"
    return evaluate_tracked(
        params,
        data,
        predictions,
        evaluation,
        images=data,
        summary=slices,
        history=history if history is not None and history.is_file() else None,
    )
