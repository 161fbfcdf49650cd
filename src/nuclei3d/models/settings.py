"""Settings of a segmentation: what the user asks, else what the model was made with."""

from __future__ import annotations

from typing import Any

from nuclei3d.config.predict import Mode, PredictParams
from nuclei3d.core.segmentation.dynamics import MaskSettings
from nuclei3d.core.segmentation.settings import ResolvedMode, SegmentationSettings
from nuclei3d.errors import InputError
from nuclei3d.models.info import ModelInfo
from nuclei3d.volumes.voxel_size import VoxelSize


def segmentation_settings(
    info: ModelInfo,
    predict: PredictParams,
    voxel_size: VoxelSize | None = None,
    *,
    volume: ModelInfo | None = None,
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
    volume
        Of the 3D model of mode ``mixed``, which mode ``auto`` then is. Its scale and normalisation are its
        own; the diameter of a nucleus, being the volume's, and the thresholds are those of `info`.

    Raises
    ------
    InputError
        If neither says the diameter of a nucleus, or the mode is not for this kind of model.
    """
    mode = _mode(info, predict.mode, volume)
    diameter_um = predict.diameter_um if predict.diameter_um is not None else info.nucleus_diameter_um
    if diameter_um is None:
        example = f" (17 voxels of this volume are {17 * voxel_size.x:.3g} um)" if voxel_size else ""
        raise InputError(
            f"the model '{info.name}' does not say how large its nuclei are in um; give the diameter of "
            f"yours: --set predict.diameter_um=NUMBER{example}"
        )
    solid: SegmentationSettings | None = None
    if volume is not None:
        # OpenVINO is for the 2D network, the 3D one runs in torch beside it
        wishes = predict.model_copy(update={"mode": "full3d", "engine": "auto", "diameter_um": diameter_um})
        solid = segmentation_settings(volume, wishes)
    return SegmentationSettings(
        mode=mode,
        diameter_px=info.diameter_px,
        nucleus_diameter_um=diameter_um,
        fusion=predict.fusion,
        views=predict.views,
        view_weights=predict.view_weights,
        volume=solid,
        volume_weight=predict.volume_weight,
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


def _mode(info: ModelInfo, wished: Mode, volume: ModelInfo | None) -> ResolvedMode:
    """Resolve mode ``auto`` and check that model and mode go together."""
    solid = info.kind == "full3d"
    if wished != "auto":
        mode: ResolvedMode = wished
    elif volume is not None:
        mode = "mixed"
    else:
        mode = "full3d" if solid else "ortho"
    if mode == "mixed" and solid:
        raise InputError(
            f"mode 'mixed' takes a 2D model and, beside it, a 3D one (predict.volume_model); '{info.name}' "
            f"is of kind '{info.kind}': give a 2D model as --model, or leave predict.volume_model out"
        )
    if (mode == "full3d") != solid:
        fitting = "full3d" if solid else "ortho or stitch"
        raise InputError(
            f"mode '{wished}' is not for the model '{info.name}' of kind '{info.kind}'; use {fitting}"
        )
    if (mode == "mixed") != (volume is not None):
        raise InputError(
            "mode 'mixed' and a 3D model beside the 2D one (predict.volume_model) belong together; "
            "give both or neither"
        )
    return mode


def _wish(wish: float | None, stored: float) -> float:
    return stored if wish is None else wish
