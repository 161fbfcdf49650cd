"""Segmenting a volume in 3D: normalise, run the network over planes, fuse, follow the flow, bring back.

Three steps that can be used on their own: `predict_flows` (the network pass), `label_flows` (everything after
it) and `segment_volume` (both, and measuring the nuclei).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nuclei3d.core.networks import choose_precision
from nuclei3d.core.normalization import (
    LOWER_PERCENTILE,
    NOISE_FLOOR,
    UPPER_PERCENTILE,
    IntensityRange,
    measure_range,
)
from nuclei3d.core.resampling import isotropic_shape, resize_linear, resize_nearest
from nuclei3d.core.segmentation.dynamics import MaskSettings, masks_from_flows
from nuclei3d.core.segmentation.foreground import OccupiedSpace, everywhere, find_occupied
from nuclei3d.core.segmentation.fusion import View, ViewPrediction, fuse_views
from nuclei3d.core.segmentation.nuclei import Nucleus, measure_nuclei
from nuclei3d.core.segmentation.plane_network import Engine, PlaneNetwork
from nuclei3d.core.segmentation.views import VIEW_AXIS, VIEWS, FlowAccumulator, predict_view
from nuclei3d.errors import InputError
from nuclei3d.volumes.voxel_size import VoxelSize

_LEAST_PIXELS = 8
_LEAST_DIAMETER_VOXELS = 3.0


@dataclass(frozen=True)
class SegmentationSettings:
    """How a volume is segmented.

    Attributes
    ----------
    mode
        ``ortho``: the planes of `views`, fused in 3D; ``stitch``: xy planes, segmented one by one and linked;
        ``cellpose``: stock Cellpose's do_3D with the same weights, for comparison.
    diameter_px
        Diameter of a nucleus in pixels at the network's scale.
    nucleus_diameter_um
        Diameter of a typical nucleus in the volume.
    fusion
        How views are fused (`nuclei3d.core.segmentation.fusion`).
    views
        Which views are used in mode ``ortho``.
    view_weights
        Relative trust in the views, in the order of `views`; None for equal trust.
    orthogonal_step
        Every how many planes of the orthogonal views one is computed.
    masks
        Thresholds and dynamics.
    flip_average
        Average the network over the four flips of each plane.
    lower_percentile, upper_percentile, noise_floor
        Normalisation (`nuclei3d.core.normalization`).
    intensity_range
        Given for a block of a larger volume: the range of the whole.
    skip_empty
        Leave out what can hold no nucleus (`nuclei3d.core.segmentation.foreground`).
    precision
        ``auto``, ``float32`` or ``bfloat16``.
    engine
        ``auto``, ``torch`` or ``openvino`` (`plane_network.PlaneNetwork`).
    stitch_min_iou, stitch_max_gap
        Linking of planes in mode ``stitch``.
    flow3d_smooth
        Stock Cellpose's option of that name, in mode ``cellpose`` only.
    """

    mode: Literal["ortho", "stitch", "cellpose", "full3d"] = "ortho"
    diameter_px: float = 30.0
    nucleus_diameter_um: float = 12.0
    fusion: Literal["mean", "consensus"] = "mean"
    views: tuple[View, ...] = VIEWS
    view_weights: tuple[float, ...] | None = None
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


@dataclass(frozen=True)
class FlowField:
    """What the network says about a volume, on the view grid.

    Attributes
    ----------
    flow
        float16 or float32 (3, z, y, x), components (z, y, x), about unit vectors in physical space.
    logit
        float16 or float32 (z, y, x), mean over the views.
    voxel_size
        Of the view grid.
    """

    flow: NDArray[np.floating[Any]]
    logit: NDArray[np.floating[Any]]
    voxel_size: VoxelSize


@dataclass(frozen=True)
class Segmentation:
    """A segmented volume.

    Attributes
    ----------
    labels
        uint32 (z, y, x) on the input's grid, 0 for background, 1..n without gaps.
    nuclei
        One entry per label, in order.
    seconds
        Time by step: ``network`` (inside the forward pass), ``views`` (the rest of the network pass),
        ``masks``, ``total``.
    """

    labels: NDArray[np.uint32]
    nuclei: list[Nucleus]
    seconds: dict[str, float]


def segment_volume(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    network: nn.Module,
    settings: SegmentationSettings,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
    *,
    orthogonal_network: nn.Module | None = None,
) -> Segmentation:
    """Segment the nuclei of a volume.

    Parameters
    ----------
    image
        (z, y, x), any real dtype, finite.
    voxel_size
        Of the image.
    network
        A 2D network such as CPnet; it is moved to `device`, its training mode is left as it was.
    settings
        What to do.
    device
        Where the network runs.
    progress
        Called with the share done, 0 to 1.
    orthogonal_network
        Another network for the xz and yz planes.

    Raises
    ------
    InputError
        If image, voxel size and diameter do not fit together, or the mode is not one for this network.
    """
    started = time.perf_counter()
    labels, scores, seconds = label_volume(
        image, voxel_size, network, settings, device, progress, orthogonal_network=orthogonal_network
    )
    nuclei = measure_nuclei(labels, image, voxel_size, scores)
    if progress is not None:
        progress(1.0)
    return Segmentation(labels, nuclei, {**seconds, "total": time.perf_counter() - started})


def label_volume(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    network: nn.Module,
    settings: SegmentationSettings,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
    *,
    orthogonal_network: nn.Module | None = None,
) -> tuple[NDArray[np.uint32], NDArray[np.float32], dict[str, float]]:
    """Segment the nuclei of a volume without measuring them; parameters and errors as `segment_volume`.

    Returns
    -------
    labels : uint32 array (z, y, x)
        On the input's grid, 1..n without gaps.
    scores : float32 array (n + 1,)
        Score of each nucleus; nan in mode ``cellpose``, which has none.
    seconds : dict
        Time by step.
    """
    check_scale(image.shape, voxel_size, settings)
    seconds: dict[str, float] = {}
    if settings.mode == "cellpose":
        from nuclei3d.core.segmentation.stock import segment_with_cellpose

        labels = segment_with_cellpose(image, voxel_size, network, settings, device)
        return labels, np.full(int(labels.max(initial=0)) + 1, np.nan, np.float32), seconds
    if settings.mode == "full3d":
        raise InputError("mode 'full3d' needs a 3D network; this model has a 2D network: use ortho or stitch")
    views: tuple[View, ...] = ("xy",) if settings.mode == "stitch" else settings.views
    flows = predict_flows(
        image,
        voxel_size,
        network,
        settings,
        device,
        progress,
        views=views,
        orthogonal_network=orthogonal_network,
        seconds=seconds,
    )
    started = time.perf_counter()
    label = stitch_flows if settings.mode == "stitch" else label_flows
    labels, scores = label(flows, image.shape, settings)
    seconds["masks"] = time.perf_counter() - started
    return labels, scores, seconds


def predict_flows(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    network: nn.Module,
    settings: SegmentationSettings,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
    *,
    views: tuple[View, ...] | None = None,
    orthogonal_network: nn.Module | None = None,
    seconds: dict[str, float] | None = None,
) -> FlowField:
    """Run the network over the planes of a volume and fuse the views.

    Parameters
    ----------
    views
        Instead of those of the settings.
    seconds
        Gets ``network`` and ``views`` added.

    Returns
    -------
    FlowField
    """
    started = time.perf_counter()
    views = settings.views if views is None else views
    check_scale(image.shape, voxel_size, settings)
    shape, grid_voxel_size, depth = view_grid(image.shape, voxel_size, settings)
    intensity = settings.intensity_range or measure_range(
        image, settings.lower_percentile, settings.upper_percentile, settings.noise_floor
    )
    volume = intensity.apply(resize_linear(image, shape))
    occupied = _occupied(volume, intensity, voxel_size, grid_voxel_size, settings)
    networks = {view: network for view in views}
    if orthogonal_network is not None:
        networks.update({view: orthogonal_network for view in views if view != "xy"})
    modes = [(each, each.training) for each in {id(n): n for n in networks.values()}.values()]
    runners = {
        id(each): PlaneNetwork(
            each,
            device,
            precision=choose_precision(settings.precision, device),
            flip_average=settings.flip_average,
            engine=settings.engine,
        )
        for each in networks.values()
    }
    keep_views = settings.fusion == "consensus" or settings.view_weights is not None
    fused = None if keep_views else FlowAccumulator(shape, views)
    kept: list[ViewPrediction] = []
    report = _ProgressByView(shape, depth, views, settings.orthogonal_step, progress)
    try:
        for view in views:
            planes = predict_view(
                volume,
                view,
                runners[id(networks[view])],
                occupied,
                stretched_depth=depth,
                step=1 if view == "xy" else settings.orthogonal_step,
                progress=report.of(view),
            )
            if fused is not None:
                for plane in planes:
                    fused.add(view, plane)
            else:
                prediction = ViewPrediction(
                    view, np.empty((2, *shape), np.float16), np.empty(shape, np.float16)
                )
                for plane in planes:
                    place: list[Any] = [slice(None)] * 3
                    place[VIEW_AXIS[view]] = plane.index
                    prediction.flow[(slice(None), *place)] = plane.output[:2]
                    prediction.logit[tuple(place)] = plane.output[2]
                kept.append(prediction)
    finally:
        for each, training in modes:
            each.train(training)
    flow: NDArray[np.floating[Any]]
    logit: NDArray[np.floating[Any]]
    if fused is not None:
        flow, logit = fused.flow, fused.logit
    else:
        trust = settings.view_weights
        flow, logit = fuse_views(
            kept, settings.fusion, dict(zip(settings.views, trust, strict=True)) if trust else None
        )
    if seconds is not None:
        seconds["network"] = sum(runner.seconds for runner in runners.values())
        seconds["views"] = time.perf_counter() - started - seconds["network"]
    return FlowField(flow, logit, grid_voxel_size)


def label_flows(
    flows: FlowField, shape: tuple[int, ...], settings: SegmentationSettings
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Follow the flow and bring the labels to the image's grid.

    Parameters
    ----------
    flows
        From `predict_flows`.
    shape
        Shape (z, y, x) of the image.

    Returns
    -------
    labels : uint32 array of that shape
        1..n without gaps.
    scores : float32 array (n + 1,)
        Score of each nucleus.
    """
    labels, scores = masks_from_flows(
        flows.flow, flows.logit, flows.voxel_size, settings.nucleus_diameter_um, settings.masks
    )
    return to_image_grid(labels, scores, shape)


def stitch_flows(
    flows: FlowField, shape: tuple[int, ...], settings: SegmentationSettings
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Segment each xy plane on its own and link the planes; parameters and results as `label_flows`."""
    from concurrent.futures import ThreadPoolExecutor

    from nuclei3d.core.label_boxes import available_threads
    from nuclei3d.core.segmentation.dynamics import masks_2d_from_flows
    from nuclei3d.core.segmentation.masks import clean_labels, keep_labels, score_labels
    from nuclei3d.core.segmentation.stitching import stitch_planes

    diameter_px = settings.nucleus_diameter_um / flows.voxel_size.x
    planes = np.zeros(flows.logit.shape, np.uint32)

    def segment(z: int) -> None:
        planes[z] = masks_2d_from_flows(flows.flow[1:, z], flows.logit[z], diameter_px, settings.masks)

    with ThreadPoolExecutor(available_threads()) as pool:
        list(pool.map(segment, range(len(planes))))
    labels = stitch_planes(planes, settings.stitch_min_iou, settings.stitch_max_gap)
    masks = settings.masks
    typical_um3 = np.pi / 6 * settings.nucleus_diameter_um**3
    voxel_um3 = flows.voxel_size.volume_um3
    least = max(masks.min_volume_um3, masks.min_volume_fraction * typical_um3) / voxel_um3
    most = np.inf if masks.max_volume_um3 is None else masks.max_volume_um3 / voxel_um3
    where = clean_labels(labels, least, most)
    scores = score_labels(labels, where, flows.flow, flows.logit, flows.voxel_size)
    keep = scores >= masks.score_threshold
    keep[0] = True
    if not keep.all():
        keep_labels(labels, keep)
        scores = scores[keep]
    return to_image_grid(labels, scores, shape)


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
    voxel_um = settings.nucleus_diameter_um / settings.diameter_px
    depth, height, width = isotropic_shape(shape, voxel_size, voxel_um)
    grid = (min(shape[0], depth), height, width)
    edges = [size * old / new for size, old, new in zip(voxel_size.zyx, shape, grid, strict=True)]
    return grid, VoxelSize.of(edges), max(depth, grid[0])


def check_scale(shape: tuple[int, ...], voxel_size: VoxelSize, settings: SegmentationSettings) -> None:
    """Check that a volume has planes to look at once it is at the network's scale.

    Raises
    ------
    InputError
        If the volume is not 3D or one plane thin, or the diameter makes planes vanish or explode.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"a volume (z, y, x) was expected, got an array of shape {tuple(shape)}")
    if shape[0] < 2 and settings.mode != "stitch":
        raise InputError(
            f"the volume has a single plane (shape {tuple(shape)}); mode '{settings.mode}' needs several: "
            "use --mode stitch for planes"
        )
    voxel_um = settings.nucleus_diameter_um / settings.diameter_px
    _, height, width = isotropic_shape(shape, voxel_size, voxel_um)
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


def _occupied(
    volume: NDArray[np.float32],
    intensity: IntensityRange,
    voxel_size: VoxelSize,
    grid_voxel_size: VoxelSize,
    settings: SegmentationSettings,
) -> OccupiedSpace:
    if not settings.skip_empty:
        return everywhere(volume.shape)
    # Resampling to larger voxels averages the noise away.
    averaged = max(1.0, grid_voxel_size.volume_um3 / voxel_size.volume_um3)
    noise = intensity.noise / (intensity.high - intensity.low) / averaged**0.5
    diameters = [settings.nucleus_diameter_um / edge for edge in grid_voxel_size.zyx]
    return find_occupied(volume, noise, diameters)


class _ProgressByView:
    """Turns planes done, view by view, into the share done of the whole pass."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        depth: int,
        views: tuple[View, ...],
        step: int,
        report: Callable[[float], None] | None,
    ) -> None:
        areas = {"xy": shape[1] * shape[2], "xz": depth * shape[2] / step, "yz": depth * shape[1] / step}
        self._cost = areas
        self._total = sum(areas[view] * shape[VIEW_AXIS[view]] for view in views)
        self._done = 0.0
        self._report = report

    def of(self, view: View) -> Callable[[float], None] | None:
        """Give the function that counts planes of a view."""
        report = self._report
        if report is None:
            return None

        def count(planes: float) -> None:
            self._done += planes * self._cost[view]
            # The last hundredth is for the masks.
            report(0.99 * min(1.0, self._done / self._total))

        return count
