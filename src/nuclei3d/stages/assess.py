"""The held-out embryos of a data set: predicted with a model, then evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuclei3d.config import Params
from nuclei3d.errors import InputError
from nuclei3d.volumes.whole import whole_file

if TYPE_CHECKING:
    from nuclei3d.stages.evaluate import EvaluateResult
    from nuclei3d.volumes.embryos import EmbryoFrame

#: The few main numbers, for `dvc metrics`; metrics.json has all of them, per volume too.
HEADLINE_FILE = "headline.json"


def assess(
    params: Params,
    data: Path,
    model: str,
    folders: AssessFolders,
    *,
    slices: Path | None = None,
) -> EvaluateResult:
    """Predict the held-out (test) frames of a data set and evaluate them.

    Parameters
    ----------
    params
        `data.split` says which frames are held out, `evaluate.baselines` what is put beside the model.
    data
        The data set.
    model
        A model folder, weights file, or URI.
    folders
        Where the masks go, a folder per embryo, and metrics.json and the report.
    slices
        The slice data set of the training, whose bins of contrast the evaluation then takes.
    """
    predict_held_out(params, data, model, folders.predictions)
    baselines = predict_baselines_held_out(params, data, model, folders.baselines)
    return evaluate_held_out(params, data, folders, baselines, slices=slices, model=Path(model))


@dataclass(frozen=True)
class AssessFolders:
    """Where an assessment puts its results.

    Attributes
    ----------
    predictions
        Masks of the model, a folder per embryo.
    baselines
        Those of the baselines that are predictions too, a folder each.
    evaluation
        metrics.json, nuclei.csv, report.
    """

    predictions: Path
    baselines: Path
    evaluation: Path

    @classmethod
    def below(cls, out: Path) -> AssessFolders:
        """Give the usual names below a folder."""
        return cls(out / "predictions", out / "baselines", out / "evaluation")


def predict_held_out(params: Params, data: Path, model: str, predictions: Path) -> dict[str, Any]:
    """Predict the held-out frames, a folder per embryo.

    Frames that were done before with the same model are kept; masks of frames that are no longer held out
    are removed, for the evaluation would take them in.
    """
    from nuclei3d.stages.baselines import keep_only
    from nuclei3d.stages.tracked import predict_tracked
    from nuclei3d.tracking.runs import stage_run

    frames = _images_by_embryo(params, data)
    inputs = {"data": data} | ({"model": Path(model)} if Path(model).exists() else {})
    with stage_run("predict", params, inputs=inputs):
        for embryo, images in frames.items():
            predict_tracked(params, images, model, predictions / embryo)
    keep_only(frames, predictions)
    return {"out": str(predictions), "frames": {embryo: len(images) for embryo, images in frames.items()}}


def predict_baselines_held_out(params: Params, data: Path, model: str, baselines: Path) -> dict[str, str]:
    """Predict the held-out frames with the baselines; give their folders by name."""
    from nuclei3d.stages.baselines import predict_baselines

    made = predict_baselines(params, _images_by_embryo(params, data), model, baselines)
    return {name: str(folder) for name, folder in made.items()}


def _held_out(params: Params, data: Path) -> tuple[EmbryoFrame, ...]:
    from nuclei3d.volumes.embryos import find_embryos, split_embryos

    frames = split_embryos(find_embryos(data), params.data.split).test
    if not frames:
        raise InputError(f"no labelled test frames in {data}; name test embryos in data.split.test")
    return frames


def _images_by_embryo(params: Params, data: Path) -> dict[str, list[Path]]:
    images: dict[str, list[Path]] = {}
    for frame in _held_out(params, data):
        images.setdefault(frame.embryo, []).append(frame.image_path)
    return images


def evaluate_held_out(
    params: Params,
    data: Path,
    folders: AssessFolders,
    baselines: Mapping[str, str],
    *,
    slices: Path | None = None,
    model: Path | None = None,
) -> EvaluateResult:
    """Evaluate the predictions of the held-out frames; the main numbers also go to `HEADLINE_FILE`."""
    from nuclei3d.stages.tracked import evaluate_tracked

    history = None if model is None else model / "history.csv"
    named = {"data": data, "slices": slices, "model": model}
    origin = {name: path for name, path in named.items() if path is not None and path.exists()}
    result = evaluate_tracked(
        params,
        data,
        folders.predictions,
        folders.evaluation,
        images=data,
        baselines={name: Path(folder) for name, folder in baselines.items()},
        summary=slices,
        history=history if history is not None and history.is_file() else None,
        only=[frame.label_path for frame in _held_out(params, data) if frame.label_path is not None],
        origin=origin,
    )
    with whole_file(folders.evaluation / HEADLINE_FILE) as partial:
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
