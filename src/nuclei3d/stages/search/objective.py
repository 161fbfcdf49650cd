"""What a trial of the search computes: a training, then its value on whole validation volumes in 3D."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuclei3d.config import Params
from nuclei3d.config.sections import SearchParams
from nuclei3d.errors import InputError, missing

if TYPE_CHECKING:
    from nuclei3d.images.embryos import EmbryoFrame
    from nuclei3d.scoring.assessment import Assessment
    from nuclei3d.training.loop import EpochReport

_FAINTEST = 0


@dataclass(frozen=True)
class TrialJob:
    """What a trial is to compute, with its own values among the parameters.

    Without `data` it is judged on the embryos that the slices were cut from. What an attempt that was killed
    left in the folder may be used.
    """

    params: Params
    slices: Path
    folder: Path
    data: Path | None


#: Trains and validates; reports every epoch; gives what is maximised.
Objective = Callable[[TrialJob, "Callable[[EpochReport], None]"], float]


def train_and_validate(job: TrialJob, on_epoch: Callable[[EpochReport], None]) -> float:
    """Train with the job's parameters and measure the model on the validation volumes.

    The training keeps no MLflow run of its own: the trial's run has its curves. A trial that was killed goes
    on from its last checkpoint.
    """
    from nuclei3d.stages.train import train

    params = without_idle_work(job.params)
    edges, frames = judged_on(params, job.slices, job.data)
    model = job.folder / params.train.name
    train(params, job.slices, model, data=job.data, resume=True, on_epoch=on_epoch)
    return value_of(assess_model(params, model, frames), params.search, edges)


def without_idle_work(params: Params) -> Params:
    """Give the parameters of a trial's training: without what its value does not depend on.

    The trial has an MLflow run already. Thresholds are chosen only where the prediction takes one of them
    from the model; for faint recall the score is none of them.
    """
    predict = params.predict
    taken = [predict.cellprob_threshold, predict.outline_threshold, predict.min_volume_um3]
    if params.search.objective == "ap":
        taken.append(predict.score_threshold)
    update: dict[str, Any] = {"tracking": params.tracking.model_copy(update={"enabled": False})}
    if None not in taken:
        update["calibrate"] = params.calibrate.model_copy(update={"volumes": 0})
    return params.model_copy(update=update)


def judged_on(params: Params, slices: Path, data: Path | None) -> tuple[tuple[float, ...], list[EmbryoFrame]]:
    """Give the edges of the contrast bins, and the frames that models are judged on."""
    from nuclei3d.stages.training_data import read_slices

    summary = read_slices(slices).summary
    return summary.contrast_quintiles, validation_frames(params, data or summary.data)


def validation_frames(params: Params, data: Path) -> list[EmbryoFrame]:
    """List the validation frames that are segmented: all, or `search.volumes` of them, spread evenly."""
    from nuclei3d.images.embryos import find_embryos, split_embryos
    from nuclei3d.stages.labelled_frames import spread_evenly

    if not data.is_dir():
        raise missing(
            data,
            f"models are judged on whole volumes, but there is no folder '{data}' of labelled embryos; "
            "give it with --data",
        )
    frames = split_embryos(find_embryos(data), params.data.split).validation
    if not frames:
        raise InputError(f"the split leaves no validation volumes in {data}; see data.split in params.yaml")
    return spread_evenly(frames, params.search.volumes or None)


def assess_model(params: Params, model: Path, frames: Sequence[EmbryoFrame]) -> list[Assessment]:
    """Segment labelled frames, one at a time, and compare them with their labels."""
    from nuclei3d.scoring.assessment import assess_volume
    from nuclei3d.segmentation.segmenter import Segmenter
    from nuclei3d.stages.calibrate import common_diameter_um
    from nuclei3d.stages.labelled_frames import read_to_scale

    predict = params.predict.of_one_network()
    if params.search.objective == "faint_recall":
        # the precision is reached by cutting at a score, so nothing is cut before
        predict = predict.model_copy(update={"score_threshold": 0.0})
    segmenter = Segmenter(model, predict)
    assessments = []
    diameter_um = common_diameter_um(segmenter.models["main"].info, params)
    for volume in read_to_scale(frames, params, diameter_um):
        found = segmenter.segment(volume.image, volume.voxel_size)
        assessments.append(
            assess_volume(
                volume.labels,
                found.labels,
                volume.voxel_size,
                image=volume.image if params.search.objective == "faint_recall" else None,
                scores={nucleus.label: nucleus.score for nucleus in found.nuclei},
                surfaces=False,
                unknown=volume.unknown,
            )
        )
    return assessments


def value_of(assessments: Sequence[Assessment], search: SearchParams, edges: Sequence[float]) -> float:
    """Reduce assessed validation volumes, pooled, to what is maximised; `edges` part the contrast bins."""
    from nuclei3d.scoring.assessment import count_by_contrast, recall_at_precision
    from nuclei3d.scoring.metrics import score, stack_tallies

    pooled = score(stack_tallies([assessment.tally for assessment in assessments]).total())
    if not pooled.n_true:
        raise InputError("the validation volumes hold no nuclei, so models cannot be told apart")
    if search.objective == "ap":
        return pooled.ap_at(0.5)
    if not len(edges) or not count_by_contrast(assessments, edges).true[:, _FAINTEST].sum():
        raise InputError(
            "the validation volumes hold no nucleus as faint as the faintest fifth in training; search for "
            "search.objective: ap, or validate on other embryos"
        )
    (recall,), _ = recall_at_precision(assessments, search.precision, edges=edges)
    if not math.isnan(recall):
        return float(recall)
    # below every model that reaches the precision, and the lower the further from it
    precision = float(pooled.precision)
    return -search.precision if math.isnan(precision) else precision - search.precision
