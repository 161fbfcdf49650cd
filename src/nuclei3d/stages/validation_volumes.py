"""Validation in 3D while a network is trained: a few frames of the validation embryos, segmented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.volumes.embryos import LabelledVolume, find_embryos, read_labelled, split_embryos
from nuclei3d.volumes.missing import missing

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nuclei3d.core.segmentation.settings import SegmentationSettings
    from nuclei3d.models.info import ModelInfo
    from nuclei3d.stages.training_planes import Slices


@dataclass(frozen=True)
class ValidationVolumes:
    """Labelled validation frames: those that judge epochs and those that choose the thresholds."""

    judging: tuple[LabelledVolume, ...] = ()
    calibrating: tuple[LabelledVolume, ...] = ()


def read_validation_volumes(params: Params, data: Path | None, described: Slices) -> ValidationVolumes:
    """Read the validation frames that a training needs, before it starts.

    Parameters
    ----------
    params
        The sections data, calibrate and train.
    data
        Labelled embryos; None: those that the slices were made from, if they are still there. Where they are
        not, or the split has changed, that is said and the training goes without.
    described
        The slices.

    Raises
    ------
    InputError
        If `data` is given and unusable.
    """
    from nuclei3d.stages.calibrate import read_calibration_volumes

    wanted = params.train.validation_volumes if params.train.validate_volumes_every else 0
    if not wanted and params.calibrate.volumes == 0:
        return ValidationVolumes()
    source = data if data is not None else Path(str(described.summary.get("data", "")))
    try:
        if not source.is_dir():
            raise missing(source, f"there is no folder {source} of labelled embryos (--data)")
        frames = split_embryos(find_embryos(source), params.data.split).validation
        if not frames:
            raise InputError(f"the split of {source} names no validation embryos with labels (data.split)")
        count = min(wanted, len(frames))
        chosen = [frames[int((i + 0.5) * len(frames) / count)] for i in range(count)]
        return ValidationVolumes(
            judging=tuple(read_labelled(frame, params.data) for frame in chosen),
            calibrating=tuple(read_calibration_volumes(params, source))
            if params.calibrate.volumes != 0
            else (),
        )
    except InputError as error:
        if data is not None:
            raise
        say(f"nothing is validated in 3D and the thresholds stay at their defaults: {error}")
        return ValidationVolumes()


def volumes_ap(
    network: nn.Module,
    volumes: Sequence[LabelledVolume],
    settings: SegmentationSettings,
    device: torch.device,
) -> float:
    """Segment volumes with a network under training; give the average precision at IoU 0.5, counts pooled."""
    from nuclei3d.core.scoring.matching import match, overlap_table
    from nuclei3d.core.segmentation.prediction import segment_volume

    true = predicted = hits = 0
    for volume in volumes:
        labels = segment_volume(volume.image, volume.voxel_size, network, settings, device).labels
        table = overlap_table(volume.labels, labels)
        true += table.n_true
        predicted += table.n_pred
        hits += match(table, 0.5).tp
    return hits / max(1, true + predicted - hits)


def validation_settings(info: ModelInfo, params: Params) -> SegmentationSettings:
    """Give the settings with which epochs are judged: those of a prediction with the model."""
    from nuclei3d.models.settings import segmentation_settings

    return segmentation_settings(info, params.predict.model_copy(update={"mode": "auto"}))
