"""Settings of a segmentation: what the user asks, else what the model was made with."""

from __future__ import annotations

from typing import Any

from nuclei3d.config.predict import PredictParams
from nuclei3d.core.segmentation.dynamics import MaskSettings
from nuclei3d.core.segmentation.settings import SegmentationSettings
from nuclei3d.errors import InputError
from nuclei3d.models.info import ModelInfo
from nuclei3d.volumes.voxel_size import VoxelSize


def segmentation_settings(
    info: ModelInfo, predict: PredictParams, voxel_size: VoxelSize | None = None
) -> SegmentationSettings:
    """Join a model's values with the user's wishes.

    Parameters
    ----------
    info
        Of the model.
    predict
        Wishes; None leaves a value to the model.
    voxel_size
        Of the volume; only for the message if the diameter is unknown.

    Raises
    ------
    InputError
        If neither says the diameter of a nucleus, or the mode is not for this kind of model.
    """
    diameter_um = predict.diameter_um if predict.diameter_um is not None else info.nucleus_diameter_um
    if diameter_um is None:
        example = f" (17 voxels of this volume are {17 * voxel_size.x:.3g} um)" if voxel_size else ""
        raise InputError(
            f"the model '{info.name}' does not say how large its nuclei are in um; give the diameter of "
            f"yours: --set predict.diameter_um=NUMBER{example}"
        )
    mode = predict.mode
    if mode == "auto":
        mode = "full3d" if info.kind == "full3d" else "ortho"
    if (mode == "full3d") != (info.kind == "full3d"):
        fitting = "full3d" if info.kind == "full3d" else "ortho or stitch"
        raise InputError(
            f"mode '{predict.mode}' is not for the model '{info.name}' of kind '{info.kind}'; use {fitting}"
        )
    return SegmentationSettings(
        mode=mode,
        diameter_px=info.diameter_px,
        nucleus_diameter_um=diameter_um,
        fusion=predict.fusion,
        views=predict.views,
        view_weights=predict.view_weights,
        orthogonal_step=predict.orthogonal_step,
        masks=MaskSettings(
            cellprob_threshold=_wish(predict.cellprob_threshold, info.cellprob_threshold),
            score_threshold=_wish(predict.score_threshold, info.score_threshold),
            min_volume_um3=_wish(predict.min_volume_um3, info.min_volume_um3),
            max_volume_um3=predict.max_volume_um3,
        ),
        flip_average=predict.flip_average,
        lower_percentile=info.lower_percentile,
        upper_percentile=info.upper_percentile,
        noise_floor=info.noise_floor,
        precision=predict.precision,
        engine=predict.engine,
        stitch_min_iou=predict.stitch_min_iou,
        stitch_max_gap=predict.stitch_max_gap,
        flow3d_smooth=predict.flow3d_smooth,
    )


def effective_parameters(
    info: ModelInfo, predict: PredictParams, voxel_size: VoxelSize | None = None
) -> dict[str, Any]:
    """Give the values that a segmentation with these wishes really uses, as plain data."""
    settings = segmentation_settings(info, predict, voxel_size)
    effective: dict[str, Any] = {
        "mode": settings.mode,
        "diameter_um": settings.nucleus_diameter_um,
        "diameter_px": settings.diameter_px,
        "fusion": settings.fusion,
        "views": list(settings.views),
        "view_weights": None if settings.view_weights is None else list(settings.view_weights),
        "orthogonal_step": settings.orthogonal_step,
        "cellprob_threshold": settings.masks.cellprob_threshold,
        "score_threshold": settings.masks.score_threshold,
        "min_volume_um3": settings.masks.min_volume_um3,
        "max_volume_um3": settings.masks.max_volume_um3,
        "flip_average": settings.flip_average,
        "precision": settings.precision,
        "stitch_min_iou": settings.stitch_min_iou,
        "stitch_max_gap": settings.stitch_max_gap,
        "flow3d_smooth": settings.flow3d_smooth,
    }
    if voxel_size is not None:
        effective["voxel_size_um"] = list(voxel_size.zyx)
    return effective


def _wish(wish: float | None, stored: float) -> float:
    return stored if wish is None else wish
