"""The flow of a volume from a 2D network: normalise, run the network over the planes of each view, fuse."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nuclei3d.core.networks import choose_precision
from nuclei3d.core.segmentation.device_views import fits_on, sum_views
from nuclei3d.core.segmentation.flow_field import FlowField
from nuclei3d.core.segmentation.fusion import View, ViewPrediction, fuse_views
from nuclei3d.core.segmentation.grids import view_grid
from nuclei3d.core.segmentation.plane_network import PlaneNetwork
from nuclei3d.core.segmentation.settings import SegmentationSettings
from nuclei3d.core.segmentation.shown_volume import show_volume
from nuclei3d.core.segmentation.views import VIEW_AXIS, FlowAccumulator, PlanePrediction, predict_view
from nuclei3d.core.segmentation.volume_look import VolumeLook
from nuclei3d.volumes.voxel_size import VoxelSize


def predict_plane_flows(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    network: nn.Module,
    settings: SegmentationSettings,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
    *,
    orthogonal_network: nn.Module | None = None,
    volume_field: FlowField | None = None,
    seconds: dict[str, float] | None = None,
) -> FlowField:
    """Run a 2D network over the planes of a volume and fuse the views.

    Parameters as `nuclei3d.core.segmentation.prediction.segment_volume`, and:

    Parameters
    ----------
    volume_field
        What a 3D network says of the volume, on its own grid: it is fused with the views.
    seconds
        Gets ``network`` (inside the forward pass) and ``views`` (the rest) added.

    Returns
    -------
    FlowField
        On the view grid (`nuclei3d.core.segmentation.grids.view_grid`).
    """
    started = time.perf_counter()
    views = settings.seen_views
    shape, grid_voxel_size, depth = view_grid(image.shape, voxel_size, settings)
    volume, occupied = show_volume(image, voxel_size, shape, grid_voxel_size, settings)
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
    # In mode stitch there is one view, whatever weights the settings have for three.
    trust = settings.view_weights if views == settings.views else None
    beside: VolumeLook | None = None
    if volume_field is not None:
        beside = VolumeLook(volume_field, shape, grid_voxel_size, settings.volume_weight)
    report = _ProgressByView(shape, depth, views, settings.orthogonal_step, progress)

    def planes_of(view: View) -> Iterator[PlanePrediction]:
        return predict_view(
            volume,
            view,
            runners[id(networks[view])],
            occupied,
            stretched_depth=depth,
            step=1 if view == "xy" else settings.orthogonal_step,
            progress=report.of(view),
        )

    try:
        if settings.fusion != "mean":
            field = _fuse_whole_views(
                planes_of, settings.fusion, views, trust, shape, grid_voxel_size, beside
            )
        elif beside is None and fits_on(device, shape):
            field = sum_views(
                volume,
                grid_voxel_size,
                views,
                {view: runners[id(networks[view])] for view in views},
                occupied,
                stretched_depth=depth,
                step=settings.orthogonal_step,
                trust=trust,
                progress=report.of,
            )
        else:
            field = FlowField.zeros(shape, grid_voxel_size)
            total = FlowAccumulator(field, views, trust, beside)
            for view in views:
                for plane in planes_of(view):
                    total.add(view, plane)
    finally:
        for each, training in modes:
            each.train(training)
    if seconds is not None:
        seconds["network"] = sum(runner.seconds for runner in runners.values())
        seconds["views"] = time.perf_counter() - started - seconds["network"]
    return field


def _fuse_whole_views(
    planes_of: Callable[[View], Iterator[PlanePrediction]],
    method: Literal["mean", "consensus"],
    views: tuple[View, ...],
    trust: tuple[float, ...] | None,
    shape: tuple[int, int, int],
    grid_voxel_size: VoxelSize,
    beside: VolumeLook | None,
) -> FlowField:
    """Keep all views, and fuse them by a method that has to see a neighbourhood of all."""
    kept = []
    for view in views:
        prediction = ViewPrediction(view, np.empty((2, *shape), np.float16), np.empty(shape, np.float16))
        for plane in planes_of(view):
            place: list[Any] = [slice(None)] * 3
            place[VIEW_AXIS[view]] = plane.index
            prediction.flow[(slice(None), *place)] = plane.output[:2]
            prediction.logit[tuple(place)] = plane.output[2]
        kept.append(prediction)
    weights = dict(zip(map(str, views), trust, strict=True)) if trust else None
    return FlowField.of(*fuse_views(kept, method, weights, beside), grid_voxel_size)


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
