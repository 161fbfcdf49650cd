"""Thresholds chosen on validation embryos; volumes of them that judge a network while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nuclei3d.config import Params
from nuclei3d.config.sections import CalibrateParams, PredictParams
from nuclei3d.console import progress_bar, say
from nuclei3d.digests import digest_of_frame
from nuclei3d.errors import InputError, missing
from nuclei3d.images.embryos import LabelledVolume, find_embryos, split_embryos
from nuclei3d.networks.folder import INFO_FILE, ModelInfo, TrainingFrames
from nuclei3d.outputs import write_text
from nuclei3d.scoring.matching import leave_out_unknown, match, overlap_table
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.segmentation.settings import SegmentationSettings, segmentation_settings
from nuclei3d.segmentation.thresholds import LabelledFlow, Thresholds, choose_thresholds
from nuclei3d.stages.labelled_frames import read_to_scale, spread_evenly
from nuclei3d.stages.training_data import Slices


@dataclass(frozen=True)
class ValidationVolumes:
    """Labelled validation frames: those that judge epochs and those that choose the thresholds."""

    judging: Sequence[LabelledVolume] = ()
    calibrating: Sequence[LabelledVolume] = ()

    @property
    def frames(self) -> TrainingFrames:
        """What a model has seen that was chosen by these."""
        return frames_of([*self.judging, *self.calibrating])


def frames_of(volumes: Sequence[LabelledVolume]) -> TrainingFrames:
    """Gather the frames that thresholds or an epoch are chosen on."""
    digests = dict.fromkeys(digest_of_frame(volume.image, volume.labels) for volume in volumes)
    return TrainingFrames(train={}, validation={f"calibration/{n}": each for n, each in enumerate(digests)})


def read_validation_volumes(params: Params, data: Path | None, described: Slices) -> ValidationVolumes:
    """Read the validation frames that a training needs, before it starts.

    They come from `data` or, if None, from where the slices were made from: where that is gone, or the split
    has changed, that is said and the training goes without.
    """
    wanted = params.train.validation_volumes if params.train.validate_volumes_every else 0
    if not wanted and params.calibrate.volumes == 0:
        return ValidationVolumes()
    source, summary = data or described.summary.data, described.summary
    try:
        if not source.is_dir():
            raise missing(source, f"there is no folder {source} of labelled embryos (--data)")
        frames = split_embryos(find_embryos(source), params.data.split).validation
        if not frames:
            raise InputError(f"the split of {source} names no validation embryos with labels (data.split)")
        diameter_um = summary.nucleus_diameter_um if summary.embryo_diameters_um else None
        judging, calibrating = (
            list(read_to_scale(spread_evenly(frames, count), params, _unless_given(diameter_um, params)))
            for count in (wanted, params.calibrate.volumes)
        )
        return ValidationVolumes(judging, calibrating)
    except InputError as error:
        if data is not None:
            raise
        say(f"nothing is validated in 3D and the thresholds stay as they are: {error}")
        return ValidationVolumes()


def common_diameter_um(info: ModelInfo, params: Params) -> float | None:
    """Give the diameter to which a model brings the nuclei of every embryo; None if it does not, or one is
    given.
    """
    return _unless_given(info.nucleus_diameter_um if info.embryo_diameters_um else None, params)


def _unless_given(diameter_um: float | None, params: Params) -> float | None:
    return None if isinstance(params.predict.diameter_um, float) else diameter_um


def volumes_ap(segmenter: Segmenter, volumes: Sequence[LabelledVolume]) -> float:
    """Segment labelled volumes; give the average precision at IoU 0.5, counts pooled."""
    true = predicted = hits = 0
    for volume in volumes:
        labels = segmenter.segment(volume.image, volume.voxel_size).labels
        table = overlap_table(volume.labels, leave_out_unknown(labels, volume.labels, volume.unknown))
        true += table.n_true
        predicted += table.n_pred
        hits += match(table, 0.5).tp
    return hits / max(1, true + predicted - hits)


def validation_settings(info: ModelInfo, params: Params) -> SegmentationSettings:
    """Give the settings that judge and calibrate a network: those of a prediction with it alone."""
    return segmentation_settings(info, _as_validated(params))


def _as_validated(params: Params) -> PredictParams:
    """Give the parameters of a prediction of labelled volumes, whose nuclei need no estimate.

    The mode is that of flows in 3D, whichever the predictions will have: only from flows can masks be cut
    anew for every threshold.
    """
    diameter_um = params.predict.diameter_um
    update = {"mode": "auto", "diameter_um": None if diameter_um == "auto" else diameter_um}
    return params.predict.model_copy(update=update)


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
    """Choose a model's thresholds on the validation embryos of a data set; write them into its model.json.

    Where the section predict names further models, the thresholds are for this one with those: a prediction
    takes them from this one. The model must not have been trained on these embryos.
    """
    segmenter = Segmenter(model, _as_validated(params))
    frames = split_embryos(find_embryos(data), params.data.split).validation
    diameter_um = common_diameter_um(segmenter.models["main"].info, params)
    volumes = list(read_to_scale(spread_evenly(frames, params.calibrate.volumes), params, diameter_um))
    if not volumes:
        raise InputError(
            "there is nothing to calibrate on: name validation embryos in data.split.validation and set "
            "calibrate.volumes above 0"
        )
    main, *others = segmenter.models.values()
    if others:
        joined = "' and '".join(each.info.name for each in others)
        say(f"the thresholds are for '{main.info.name}' with '{joined}' beside it")
    info, chosen = with_thresholds(main.info, params.calibrate, segmenter, volumes)
    if info.frames is not None:
        info = info.model_copy(update={"frames": frames_of(volumes).after(info.frames)})
    write_text(main.path.parent / INFO_FILE, info.model_dump_json(indent=2) + "\n")
    return CalibrateResult(model, len(volumes), chosen)


def with_thresholds(
    info: ModelInfo, params: CalibrateParams, segmenter: Segmenter, volumes: Sequence[LabelledVolume]
) -> tuple[ModelInfo, Thresholds]:
    """Segment labelled volumes, choose the thresholds, and give the model's description with them."""
    return choose_for(info, params, segmenter.settings, predict_labelled(segmenter, volumes))


def predict_labelled(segmenter: Segmenter, volumes: Sequence[LabelledVolume]) -> list[LabelledFlow]:
    """Run the networks over labelled volumes; give what they say, and the truth."""
    seen = []
    with progress_bar("calibrate", total=len(volumes)) as bar:
        for volume in volumes:
            flows = segmenter.flows(volume.image, volume.voxel_size)
            seen.append(LabelledFlow(flows, volume.labels, volume.voxel_size, volume.unknown))
            bar.advance()
    return seen


def choose_for(
    info: ModelInfo, params: CalibrateParams, settings: SegmentationSettings, seen: Sequence[LabelledFlow]
) -> tuple[ModelInfo, Thresholds]:
    """Choose the thresholds on predictions of this model, or of models trained like it on other embryos."""
    # they are chosen against the defaults of the package, whatever the settings have
    masks = replace(settings.masks, cellprob_threshold=0.0, score_threshold=0.0, min_volume_um3=0.0)
    masks = replace(masks, outline_threshold=None, outline_threshold_z=None)
    chosen = choose_thresholds(
        seen,
        replace(settings, masks=masks),
        params.cellprob,
        params.outline,
        params.iou,
        params.volume_fractions,
    )
    say(
        f"thresholds from {len(seen)} validation volumes: logit {chosen.cellprob:g}, outline "
        f"{chosen.outline:g} and along z {chosen.outline_z:g}, score {chosen.score:g}, volume "
        f"{chosen.min_volume_um3:.3g} um3; mean AP {chosen.ap:.3f}, with the defaults {chosen.ap_default:.3f}"
    )
    # the volume is kept for nuclei of the model's own diameter
    cubed = ((info.nucleus_diameter_um or settings.nucleus_diameter_um) / settings.nucleus_diameter_um) ** 3
    update = {
        "cellprob_threshold": chosen.cellprob,
        "outline_threshold": chosen.outline,
        "outline_threshold_z": chosen.outline_z,
        "score_threshold": chosen.score,
        "min_volume_um3": round(chosen.min_volume_um3 * cubed, 3),
    }
    return info.model_copy(update=update), chosen
