"""Thresholds for a model, chosen on the validation embryos and written into its model.json.

Validation in 3D while a network is trained: a few frames of the validation embryos, segmented.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nuclei3d.config import Params
from nuclei3d.console import progress_bar, say
from nuclei3d.errors import InputError, missing
from nuclei3d.images.embryos import LabelledVolume, find_embryos, read_labelled, split_embryos
from nuclei3d.outputs import whole_file
from nuclei3d.stages.segmenters import SecondModels, load_second_models

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nuclei3d.networks.folder import ModelInfo
    from nuclei3d.networks.unet3d import VolumeNetwork
    from nuclei3d.segmentation.settings import SegmentationSettings
    from nuclei3d.segmentation.thresholds import LabelledFlow, Thresholds
    from nuclei3d.stages.training_data import Slices


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
    from nuclei3d.scoring.matching import match, overlap_table
    from nuclei3d.segmentation.segmenter import segment_volume

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
    from nuclei3d.segmentation.settings import segmentation_settings

    return segmentation_settings(info, params.predict.model_copy(update={"mode": "auto"}))


@dataclass(frozen=True)
class CalibrateResult:
    """The thresholds chosen, the average precision with them and with the defaults."""

    model: Path
    volumes: int
    thresholds: Thresholds

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        return {"model": str(self.model), "volumes": self.volumes, **asdict(self.thresholds)}


def calibrate(params: Params, model: Path, data: Path) -> CalibrateResult:
    """Choose a model's thresholds on the validation embryos of a data set.

    Parameters
    ----------
    params
        The sections calibrate, data (split) and predict are used. Where predict names further models, the
        thresholds are for this one with those beside it: a prediction takes them from this one.
    model
        Model folder; its model.json is replaced.
    data
        Labelled embryos; those that the model was trained on must not be among the validation ones.

    Raises
    ------
    InputError
        If there is no model, or no labelled validation frame.
    """
    from nuclei3d.networks.cpnet import choose_device
    from nuclei3d.networks.folder import INFO_FILE, load_model

    loaded = load_model(model)
    second = load_second_models(params.predict, loaded)
    volumes = read_calibration_volumes(params, data)
    if not volumes:
        raise InputError(
            "there is nothing to calibrate on: name validation embryos in data.split.validation and set "
            "calibrate.volumes above 0"
        )
    if second.models:
        beside = "' and '".join(each.info.name for each in second.models)
        say(f"the thresholds are for '{loaded.info.name}' with '{beside}' beside it")
    device = choose_device(params.predict.device)
    info, chosen = with_thresholds(loaded.network, loaded.info, params, volumes, device, second)
    with whole_file(loaded.path.parent / INFO_FILE) as path:
        path.write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return CalibrateResult(model, len(volumes), chosen)


def read_calibration_volumes(params: Params, data: Path) -> list[LabelledVolume]:
    """Read the validation frames on which thresholds are chosen, spread evenly."""
    frames = split_embryos(find_embryos(data), params.data.split).validation
    wanted = params.calibrate.volumes
    count = len(frames) if wanted is None else min(wanted, len(frames))
    chosen = [frames[int((i + 0.5) * len(frames) / count)] for i in range(count)]
    return [read_labelled(frame, params.data) for frame in chosen]


def with_thresholds(
    network: nn.Module,
    info: ModelInfo,
    params: Params,
    volumes: Sequence[LabelledVolume],
    device: torch.device,
    second: SecondModels | None = None,
) -> tuple[ModelInfo, Thresholds]:
    """Segment labelled volumes, choose the thresholds, and give the model's description with them.

    With `second`, the thresholds are those of the model and what stands beside it.
    """
    return choose_for(info, params, predict_labelled(network, info, params, volumes, device, second))


def predict_labelled(
    network: nn.Module,
    info: ModelInfo,
    params: Params,
    volumes: Sequence[LabelledVolume],
    device: torch.device,
    second: SecondModels | None = None,
) -> list[LabelledFlow]:
    """Run a network over labelled volumes; give what it says beside the truth."""
    from nuclei3d.segmentation.network_pass import Networks, predict_flows
    from nuclei3d.segmentation.thresholds import LabelledFlow

    second = second or SecondModels()
    settings = _without_thresholds(info, params, second.volume_info)
    solid = cast("VolumeNetwork | None", second.volume_network)
    networks = Networks(network, second.orthogonal_network, solid)
    seen = []
    with progress_bar("calibrate", total=len(volumes)) as bar:
        for volume in volumes:
            flows, _ = predict_flows(volume.image, volume.voxel_size, networks, settings, device)
            seen.append(LabelledFlow(flows, volume.labels, volume.voxel_size))
            bar.advance()
    return seen


def choose_for(info: ModelInfo, params: Params, seen: Sequence[LabelledFlow]) -> tuple[ModelInfo, Thresholds]:
    """Choose the thresholds on predictions of this model, or of models trained like it on other embryos."""
    from nuclei3d.segmentation.thresholds import choose_thresholds

    wanted = params.calibrate
    settings = _without_thresholds(info, params)
    chosen = choose_thresholds(seen, settings, wanted.cellprob, wanted.iou, wanted.volume_fractions)
    say(
        f"thresholds from {len(seen)} validation volumes: logit {chosen.cellprob:g}, score "
        f"{chosen.score:g}, volume {chosen.min_volume_um3:.3g} um3; mean AP {chosen.ap:.3f}, with the "
        f"defaults {chosen.ap_default:.3f}"
    )
    update = {
        "cellprob_threshold": chosen.cellprob,
        "score_threshold": chosen.score,
        "min_volume_um3": round(chosen.min_volume_um3, 3),
    }
    return info.model_copy(update=update), chosen


def _without_thresholds(
    info: ModelInfo, params: Params, volume: ModelInfo | None = None
) -> SegmentationSettings:
    from nuclei3d.segmentation.settings import segmentation_settings

    wishes = params.predict.model_copy(
        update={"mode": "auto", "cellprob_threshold": None, "score_threshold": None, "min_volume_um3": None}
    )
    plain = info.model_copy(update={"cellprob_threshold": 0.0, "score_threshold": 0.0, "min_volume_um3": 0.0})
    return segmentation_settings(plain, wishes, volume=volume)
