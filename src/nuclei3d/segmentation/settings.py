"""Settings of a segmentation: what the user asks, else what the model was made with.

How a volume is segmented.

The two grids of a prediction: the view grid, on which flows are followed, and the image's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config.sections import Mode, PredictParams
from nuclei3d.errors import InputError
from nuclei3d.grid import (
    LOWER_PERCENTILE,
    NOISE_FLOOR,
    UPPER_PERCENTILE,
    IntensityRange,
    isotropic_shape,
    resize_nearest,
)
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.folder import ModelInfo
from nuclei3d.segmentation.dynamics import MaskSettings
from nuclei3d.segmentation.network_runner import Engine
from nuclei3d.views import VIEWS, View

ResolvedMode = Literal["ortho", "stitch", "cellpose", "full3d", "mixed"]


@dataclass(frozen=True)
class SegmentationSettings:
    """How a volume is segmented.

    Attributes
    ----------
    mode
        ``ortho``: the planes of `views`, fused in 3D; ``stitch``: xy planes, segmented one by one and linked;
        ``full3d``: a 3D network; ``mixed``: as ``ortho``, and a 3D network is fused with the views;
        ``cellpose``: stock Cellpose's do_3D with the same weights, for comparison.
    diameter_px
        Diameter of a nucleus in pixels at the network's scale.
    nucleus_diameter_um
        Diameter of a typical nucleus in the volume.
    fusion
        How views are fused (`nuclei3d.segmentation.fusion`).
    views
        Which views are used in modes ``ortho`` and ``mixed``.
    view_weights
        Relative trust in the views, in the order of `views`; None for equal trust.
    volume
        How the 3D network of mode ``mixed`` sees the volume: settings of mode ``full3d`` with its own scale
        and normalisation, for a network knows images only as it was trained on them; None in other modes.
        The diameter in um is the same: it is the volume's.
    volume_weight
        Relative trust in that network, where a view has 1 or what `view_weights` gives it.
    orthogonal_step
        Every how many planes of the orthogonal views one is computed.
    masks
        Thresholds and dynamics.
    flip_average
        Average the network over the four flips of each plane.
    lower_percentile, upper_percentile, noise_floor
        Normalisation (`nuclei3d.grid`).
    intensity_range
        Given for a block of a larger volume: the range of the whole.
    skip_empty
        Leave out what can hold no nucleus (`nuclei3d.segmentation.foreground`).
    precision
        ``auto``, ``float32`` or ``bfloat16``.
    engine
        ``auto``, ``torch`` or ``openvino`` (`network_runner.NetworkRunner`).
    stitch_min_iou, stitch_max_gap
        Linking of planes in mode ``stitch``.
    flow3d_smooth
        Stock Cellpose's option of that name, in mode ``cellpose`` only.
    """

    mode: ResolvedMode = "ortho"
    diameter_px: float = 30.0
    nucleus_diameter_um: float = 12.0
    fusion: Literal["mean", "consensus"] = "mean"
    views: tuple[View, ...] = VIEWS
    view_weights: tuple[float, ...] | None = None
    volume: SegmentationSettings | None = None
    volume_weight: float = 1.0
    orthogonal_step: int = 1
    masks: MaskSettings = field(default_factory=MaskSettings)
    flip_average: bool = False
    lower_percentile: float = LOWER_PERCENTILE
    upper_percentile: float = UPPER_PERCENTILE
    noise_floor: float = NOISE_FLOOR
    intensity_range: IntensityRange | None = None
    skip_empty: bool = True
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    engine: Engine = "auto"
    stitch_min_iou: float = 0.25
    stitch_max_gap: int = 1
    flow3d_smooth: float = 0.0

    @property
    def seen_views(self) -> tuple[View, ...]:
        """Views that the network is run over: in mode ``stitch`` only xy."""
        return ("xy",) if self.mode == "stitch" else self.views

    @property
    def network_voxel_um(self) -> float:
        """Edge of a voxel at the network's scale."""
        return self.nucleus_diameter_um / self.diameter_px

    @property
    def passes(self) -> tuple[SegmentationSettings, ...]:
        """Settings of each pass of a network over the volume: these, and those of the 3D network beside."""
        return (self,) if self.volume is None else (self, self.volume)


_LEAST_PIXELS = 8
_LEAST_DIAMETER_VOXELS = 3.0
_MOST_UNEQUAL = 3.0
"""Ratio of the edges in y and x beyond which the order of the three was mistaken."""


def view_grid(
    shape: tuple[int, ...], voxel_size: VoxelSize, settings: SegmentationSettings
) -> tuple[tuple[int, int, int], VoxelSize, int]:
    """Choose the view grid.

    Returns
    -------
    shape : tuple of int
        x and y at the network's scale; z as in the image, or at the network's scale if that is coarser.
    voxel_size : VoxelSize
        Of that grid.
    stretched_depth : int
        Number of voxels along z at the network's scale.
    """
    depth, height, width = isotropic_shape(shape, voxel_size, settings.network_voxel_um)
    grid = (min(shape[0], depth), height, width)
    edges = [size * old / new for size, old, new in zip(voxel_size.zyx, shape, grid, strict=True)]
    return grid, VoxelSize.of(edges), max(depth, grid[0])


def check_scale(shape: tuple[int, ...], voxel_size: VoxelSize, settings: SegmentationSettings) -> None:
    """Check that a volume has planes to look at once it is at the network's scale.

    Raises
    ------
    InputError
        If the volume is not 3D or one plane thin, its voxels are far from square in the plane, or the
        diameter makes planes vanish.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"a volume (z, y, x) was expected, got an array of shape {tuple(shape)}")
    if shape[0] < 2 and settings.mode != "stitch":
        raise InputError(
            f"the volume has a single plane (shape {tuple(shape)}); mode '{settings.mode}' needs several: "
            "use --mode stitch for planes"
        )
    if max(voxel_size.y, voxel_size.x) > _MOST_UNEQUAL * min(voxel_size.y, voxel_size.x):
        raise InputError(
            f"voxels of {voxel_size} are not square in the plane; the order is z, y, x: check the voxel size "
            "(data.voxel_size_um)"
        )
    _, height, width = isotropic_shape(shape, voxel_size, settings.network_voxel_um)
    across = settings.nucleus_diameter_um / voxel_size.x
    where = (
        f"a nucleus diameter of {settings.nucleus_diameter_um:g} um is {across:.3g} voxels at voxels of "
        f"{voxel_size}"
    )
    mend = "check the voxel size (data.voxel_size_um) and the diameter (predict.diameter_um)"
    if min(height, width) < _LEAST_PIXELS:
        raise InputError(
            f"{where}: planes of {shape[1]} x {shape[2]} would shrink to {height} x {width}; {mend}"
        )
    if across < _LEAST_DIAMETER_VOXELS:
        raise InputError(f"{where}, too few to see a nucleus; {mend}")


def to_image_grid(
    labels: NDArray[np.uint32], scores: NDArray[np.float32], shape: tuple[int, ...]
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Bring labels to the image's grid by nearest neighbour; a label that vanishes leaves no gap."""
    if labels.shape == tuple(shape):
        return labels, scores
    resized = np.asarray(resize_nearest(labels, shape), dtype=np.uint32)
    present = np.zeros(len(scores), np.bool_)
    present[np.unique(resized)] = True
    present[0] = True
    if not present.all():
        table = np.cumsum(present, dtype=np.uint32) - np.uint32(1)
        table[~present] = 0
        resized = table[resized]
    return resized, scores[present]


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
