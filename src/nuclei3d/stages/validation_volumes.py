"""Validation in 3D while a network is trained: a few frames of the validation embryos, segmented."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.volumes.embryos import LabelledVolume, find_embryos, read_labelled, split_embryos

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nuclei3d.core.prediction import SegmentationSettings
    from nuclei3d.models.info import ModelInfo
    from nuclei3d.stages.training_planes import Slices


def read_validation_volumes(params: Params, data: Path | None, described: Slices) -> list[LabelledVolume]:
    """Read a few validation frames, spread evenly; say so if there are none."""
    source = data if data is not None else Path(str(described.summary.get("data", "")))
    if not source.is_dir():
        if data is not None:
            raise InputError(f"there is no folder {data}; give the labelled embryos, or leave --data out")
        say("the embryos behind the slices are not there, so epochs are judged by planes only (give --data)")
        return []
    frames = split_embryos(find_embryos(source), params.data.split).validation
    count = min(params.train.validation_volumes, len(frames))
    if not count:
        say("the split leaves no validation volumes, so epochs are judged by planes only")
    chosen = [frames[int((i + 0.5) * len(frames) / count)] for i in range(count)]
    return [read_labelled(frame, params.data) for frame in chosen]


def volumes_ap(
    network: nn.Module,
    volumes: Sequence[LabelledVolume],
    settings: SegmentationSettings,
    device: torch.device,
) -> float:
    """Segment volumes with a network under training; give the average precision at IoU 0.5, counts pooled."""
    from nuclei3d.core.matching import match, overlap_table
    from nuclei3d.core.prediction import segment_volume

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

    return segmentation_settings(info, params.predict.model_copy(update={"mode": "ortho"}))
