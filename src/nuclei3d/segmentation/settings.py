"""How a volume is segmented: what the user asks, else what the model was made with; and the view grid."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config.sections import Engine, Fusion, Mode, Precision, PredictParams, SegmentationParams, View
from nuclei3d.errors import InputError, TooLargeError
from nuclei3d.grid import isotropic_shape
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import LOWER_PERCENTILE, NOISE_FLOOR, UPPER_PERCENTILE, IntensityRange, measure_range

if TYPE_CHECKING:
    from nuclei3d.networks.folder import ModelInfo

ResolvedMode = Literal["ortho", "stitch", "cellpose", "full3d", "mixed"]
_DEFAULT = PredictParams()


@dataclass(frozen=True)
class MaskSettings:
    """How flows become masks. Lengths are fractions of the diameter of a typical nucleus.

    Attributes
    ----------
    cellprob_threshold
        Voxels with a (mean) logit above this are foreground.
    outline_threshold, outline_threshold_z
        A nucleus that was found reaches as far as the logit is above these, in the plane and along z, where
        they are lower than `cellprob_threshold`; None: outline_threshold_z is as outline_threshold, that as
        cellprob_threshold. The score is that of what lies above cellprob_threshold.
    score_threshold
        Nuclei with a lower score (0..1, see `masks.score_labels`) are dropped. Those below 0.01 always
        are: their flow has nothing to do with their mask.
    min_volume_um3, max_volume_um3
        Bounds of a nucleus' volume; no upper bound if None.
    min_volume_fraction
        Nuclei below this fraction of the volume of a typical nucleus are dropped in any case: what is left
        there are crumbs of the dynamics.
    step
        First step of a particle. It is never below the smallest voxel edge.
    bin_edge
        Edge of the bins in which end points are counted.
    sink_radius
        Sinks closer together than this are one.
    """

    cellprob_threshold: float = 0.0
    outline_threshold: float | None = None
    outline_threshold_z: float | None = None
    score_threshold: float = 0.0
    min_volume_um3: float = 0.0
    max_volume_um3: float | None = None
    min_volume_fraction: float = 0.01
    step: float = 1 / 20
    bin_edge: float = 1 / 16
    sink_radius: float = 0.2

    @property
    def outline_thresholds(self) -> tuple[float, float]:
        """Thresholds of the logit along z and in the plane, not above `cellprob_threshold`."""
        found = self.cellprob_threshold
        plane = found if self.outline_threshold is None else min(found, self.outline_threshold)
        return plane if self.outline_threshold_z is None else min(found, self.outline_threshold_z), plane

    def bounds_um3(self, nucleus_diameter_um: float) -> tuple[float, float]:
        """Least and largest volume of a nucleus, in um3."""
        typical_um3 = np.pi / 6 * nucleus_diameter_um**3
        least = max(self.min_volume_um3, self.min_volume_fraction * typical_um3)
        return least, np.inf if self.max_volume_um3 is None else self.max_volume_um3


@dataclass(frozen=True)
class SegmentationSettings:
    """How a volume is segmented, with nothing left open.

    What is not listed here is as in `nuclei3d.config.sections.PredictParams`.

    Attributes
    ----------
    mode
        ``ortho``: the planes of `views`, fused in 3D; ``stitch``: xy planes, segmented one by one and linked;
        ``full3d``: a 3D network; ``mixed``: as ``ortho``, and a 3D network is fused with the views;
        ``cellpose``: stock Cellpose's do_3D with the same weights, for comparison.
    diameter_px, nucleus_diameter_um
        Diameter of a typical nucleus in pixels at the network's scale, and in the volume.
    volume
        How the 3D network of mode ``mixed`` sees the volume: settings of mode ``full3d`` with its own scale
        and normalisation, for a network knows images only as it was trained on them.
    lower_percentile, upper_percentile, noise_floor
        Normalisation (`nuclei3d.intensity`).
    intensity_range
        Given for a block of a larger volume: the range of the whole.
    skip_empty
        Leave out what can hold no nucleus (`foreground`).
    """

    mode: ResolvedMode = "ortho"
    diameter_px: float = 30.0
    nucleus_diameter_um: float = 12.0
    fusion: Fusion = _DEFAULT.fusion
    views: tuple[View, ...] = _DEFAULT.views
    view_weights: tuple[float, ...] | None = None
    volume: SegmentationSettings | None = None
    volume_weight: float = _DEFAULT.volume_weight
    orthogonal_step: int = _DEFAULT.orthogonal_step
    masks: MaskSettings = field(default_factory=MaskSettings)
    flip_average: bool = _DEFAULT.flip_average
    lower_percentile: float = LOWER_PERCENTILE
    upper_percentile: float = UPPER_PERCENTILE
    noise_floor: float = NOISE_FLOOR
    intensity_range: IntensityRange | None = None
    skip_empty: bool = True
    precision: Precision = _DEFAULT.precision
    engine: Engine = _DEFAULT.engine
    stitch_min_iou: float = _DEFAULT.stitch_min_iou
    stitch_max_gap: int = _DEFAULT.stitch_max_gap
    flow3d_smooth: float = _DEFAULT.flow3d_smooth

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
        """Settings of each pass of a network over the volume: these, and those of a further 3D network."""
        return (self,) if self.volume is None else (self, self.volume)

    def as_parameters(self) -> dict[str, Any]:
        """Give the values that a segmentation really uses, under the names of the parameters."""
        values = {**vars(self), **vars(self.masks), "diameter_um": self.nucleus_diameter_um}
        return {
            name: list(values[name]) if isinstance(values[name], tuple) else values[name]
            for name in (*SegmentationParams.model_fields, "diameter_px")
        }


_LEAST_PIXELS = 8
_LEAST_PADDED = 8
_MOST_VOXELS = 2**33
"""At the network's scale; no microscope's frame comes near in one piece."""
_LEAST_DIAMETER_VOXELS = 3.0
_MOST_UNEQUAL = 3.0
"""Ratio of the edges in y and x beyond which the order of the three was mistaken."""


def view_grid(
    shape: tuple[int, ...], voxel_size: VoxelSize, settings: SegmentationSettings
) -> tuple[tuple[int, int, int], VoxelSize, int]:
    """Choose the view grid: its shape, its voxel size, and how many voxels z has at the network's scale.

    x and y are at the network's scale; z as in the image, or at the network's scale if that is coarser.
    """
    depth, height, width = isotropic_shape(shape, voxel_size, settings.network_voxel_um)
    grid = (min(shape[0], depth), height, width)
    edges = [size * old / new for size, old, new in zip(voxel_size.zyx, shape, grid, strict=True)]
    return grid, VoxelSize.of(edges), max(depth, grid[0])


def network_voxels(shape: tuple[int, ...], voxel_size: VoxelSize, settings: SegmentationSettings) -> int:
    """Count the voxels that the networks look at: of each view, of each flip, thin planes as padded."""
    total = 0
    for each in settings.passes:
        (z, y, x), _, depth = view_grid(shape, voxel_size, each)
        z, y, x, depth = (max(edge, _LEAST_PADDED) for edge in (z, y, x, depth))
        step = each.orthogonal_step
        flat, side = (4, 2) if each.flip_average else (1, 1)
        of_view = {
            "xy": flat * z * y * x,
            "xz": side * -(-y // step) * depth * x,
            "yz": side * -(-x // step) * depth * y,
        }
        # of a 3D network this is the most: it may look at fewer planes
        solid = flat * depth * y * x
        total += solid if each.mode == "full3d" else sum(of_view[view] for view in each.seen_views)
    return total


def with_ranges(
    settings: SegmentationSettings, image: NDArray[np.generic], *, sampled: bool = False
) -> SegmentationSettings:
    """Add the intensity range of a whole volume, for each network as it was trained, unless it is given.

    `image` is (z, y, x), or those planes of it that `nuclei3d.intensity.sampled_planes` names (`sampled`).
    """
    volume = None if settings.volume is None else with_ranges(settings.volume, image, sampled=sampled)
    found = settings.intensity_range or measure_range(
        image, settings.lower_percentile, settings.upper_percentile, settings.noise_floor, sampled=sampled
    )
    return replace(settings, intensity_range=found, volume=volume)


def check_scale(shape: tuple[int, ...], voxel_size: VoxelSize, settings: SegmentationSettings) -> None:
    """Raise InputError if a volume has no planes to look at once it is at the network's scale, or too many.

    It may not be 3D or one plane thin, its voxels far from square in the plane, or the diameter too small.
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
    depth, height, width = isotropic_shape(shape, voxel_size, settings.network_voxel_um)
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
    if depth * height * width > _MOST_VOXELS:
        raise TooLargeError(
            f"{where}: the volume would grow to {depth} x {height} x {width} voxels for the network; {mend}, "
            "or have it cut into blocks (predict.memory_gb)"
        )


def segmentation_settings(
    info: ModelInfo,
    predict: PredictParams,
    voxel_size: VoxelSize | None = None,
    *,
    volume: ModelInfo | None = None,
) -> SegmentationSettings:
    """Join a model's values with what the user asks.

    Parameters
    ----------
    predict
        What the user asks; None leaves a value to the model. Where the user's nuclei are smaller or larger
        than the model's, the model's volumes are scaled with the cube of the diameter, as is all else that
        is counted in diameters.
    voxel_size
        Of the volume; only for the message if the diameter is unknown.
    volume
        Of the 3D model of mode ``mixed``, which mode ``auto`` then is. Its scale and normalisation are its
        own; the diameter of a nucleus, being the volume's, and the thresholds are those of `info`.

    Raises
    ------
    InputError
        If neither says the diameter of a nucleus, it is still to be estimated, or the mode is not for this
        kind of model.
    """
    mode = _mode(info, predict.mode, volume)
    diameter_um = predict.diameter_um if predict.diameter_um is not None else info.nucleus_diameter_um
    if diameter_um == "auto":
        raise InputError(
            "diameter_um=auto is for 'nuclei3d predict'; give a number, such as 'nuclei3d inspect' and "
            "nuclei3d.diameter.estimate_diameter estimate from an image"
        )
    if diameter_um is None:
        example = f" (17 voxels of this volume are {17 * voxel_size.x:.3g} um)" if voxel_size else ""
        raise InputError(
            f"the model '{info.name}' does not say how large its nuclei are in um; give the diameter of "
            f"yours: --set predict.diameter_um=NUMBER{example}"
        )
    solid: SegmentationSettings | None = None
    if volume is not None:
        # OpenVINO is for the 2D network, the 3D one runs in torch
        precision = "auto" if predict.precision == "int8" else predict.precision
        asked = predict.model_copy(
            update={"mode": "full3d", "engine": "auto", "precision": precision, "diameter_um": diameter_um}
        )
        solid = segmentation_settings(volume, asked)
    masks = MaskSettings(**_given(MaskSettings, predict, info))
    if predict.min_volume_um3 is None and info.nucleus_diameter_um is not None:
        cubed = (diameter_um / info.nucleus_diameter_um) ** 3
        masks = replace(masks, min_volume_um3=masks.min_volume_um3 * cubed)
    resolved = {"mode": mode, "nucleus_diameter_um": diameter_um, "volume": solid, "masks": masks}
    return SegmentationSettings(**_given(SegmentationSettings, predict, info) | resolved)


def _given(kind: type, predict: PredictParams, info: ModelInfo) -> dict[str, Any]:
    """Find the fields of a class to which the user gives a value, else the model."""
    found = {}
    for each in fields(kind):
        value = getattr(predict, each.name, None)
        if value is None:
            value = getattr(info, each.name, None)
        if value is not None:
            found[each.name] = value
    return found


def _mode(info: ModelInfo, wished: Mode, volume: ModelInfo | None) -> ResolvedMode:
    """Resolve mode ``auto`` and check that model and mode go together."""
    solid = info.kind == "full3d"
    if wished != "auto":
        mode: ResolvedMode = wished
    elif volume is not None:
        mode = "mixed"
    else:
        mode = "full3d" if solid else "ortho"
    if mode == "cellpose" and not (solid or info.for_cellpose):
        raise InputError(
            f"mode 'cellpose' is not for the model '{info.name}': Cellpose does not load its width of "
            f"{info.width}; use auto, ortho or stitch"
        )
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
