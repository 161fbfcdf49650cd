"""The flow of a volume from a 2D network: normalise, run the network over the planes of each view, fuse.

The volume as a network is shown it: at its scale, normalised, with the space where nuclei can be.

The network pass on a GPU: the volume is brought there once, the sum of the views fetched once.

It gives the field that `views` sums up on the host, up to the rounding of a unit or two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nuclei3d.grid import measure_range, resize_linear, resize_tensor
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import choose_precision
from nuclei3d.segmentation.flow_field import FLOW_UNITS, LOGIT_UNITS, FlowField
from nuclei3d.segmentation.foreground import OccupiedSpace, occupied_space
from nuclei3d.segmentation.fusion import VIEW_AXES, View, ViewPrediction, VolumeLook, fuse_views
from nuclei3d.segmentation.plane_network import PlaneNetwork
from nuclei3d.segmentation.settings import SegmentationSettings, view_grid
from nuclei3d.segmentation.views import (
    EMPTY_LOGIT,
    VIEW_AXIS,
    FlowAccumulator,
    PlaneGroup,
    PlanePrediction,
    computed_indices,
    plane_groups,
    predict_view,
)


def show_volume(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    shape: tuple[int, int, int],
    grid_voxel_size: VoxelSize,
    settings: SegmentationSettings,
) -> tuple[NDArray[np.float32], OccupiedSpace]:
    """Bring a volume to a network's grid.

    Parameters
    ----------
    image
        (z, y, x), any real dtype, finite.
    voxel_size
        Of the image.
    shape, grid_voxel_size
        Of the grid.
    settings
        Normalisation, and whether empty space is left out.

    Returns
    -------
    volume : float32 array of that shape
        Normalised.
    occupied : OccupiedSpace
        Where nuclei can be.
    """
    intensity = settings.intensity_range or measure_range(
        image, settings.lower_percentile, settings.upper_percentile, settings.noise_floor
    )
    volume = intensity.apply(resize_linear(image, shape))
    diameter_um = settings.nucleus_diameter_um if settings.skip_empty else None
    return volume, occupied_space(volume, intensity, voxel_size, grid_voxel_size, diameter_um)


_BYTES_PER_VOXEL = 40
"""Volume, sums, and the packed field with what packing takes."""

_SHARE_OF_MEMORY = 0.5
"""What a volume may take of the memory that is free; the network needs the rest."""

_MOST = 32767


def fits_on(device: torch.device, shape: Sequence[int]) -> bool:
    """Say whether a volume of this shape can lie on the device, which is a GPU."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    # what torch keeps for itself from the frame before is free as well
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _BYTES_PER_VOXEL * float(np.prod(shape)) <= _SHARE_OF_MEMORY * free


@torch.inference_mode()
def sum_views(
    volume: NDArray[np.float32],
    grid_voxel_size: VoxelSize,
    views: Sequence[View],
    networks: Mapping[View, PlaneNetwork],
    occupied: OccupiedSpace,
    *,
    stretched_depth: int,
    step: int = 1,
    trust: Sequence[float] | None = None,
    progress: Callable[[View], Callable[[float], None] | None] = lambda view: None,
) -> FlowField:
    """Run the network over the planes of the views and take the mean.

    Parameters
    ----------
    volume
        Normalised (z, y, x) on the view grid.
    grid_voxel_size
        Of that grid.
    views
        Which.
    networks
        The network of each view.
    occupied, stretched_depth, step
        As in `nuclei3d.segmentation.views.predict_view`; `step` is for xz and yz.
    trust
        Weight of each view; None for equal ones.
    progress
        Gives for each view what is called with the number of planes that were dealt with.
    """
    weights = dict(zip(views, trust or [1.0] * len(views), strict=True))
    device = networks[views[0]].device
    image = torch.from_numpy(volume).to(device)
    total = torch.zeros((4, *volume.shape), device=device)
    # what is not computed says that nothing is there
    total[3] = EMPTY_LOGIT
    for view in views:
        shares = [
            weights[view] / sum(weights[other] for other in views if component in VIEW_AXES[other])
            for component in VIEW_AXES[view]
        ] + [weights[view] / sum(weights.values())]
        _add_view(
            image,
            total,
            view,
            shares,
            networks[view],
            occupied,
            stretched_depth,
            1 if view == "xy" else step,
            progress(view),
        )
    return _fetch(total, grid_voxel_size)


def _add_view(
    image: Tensor,
    total: Tensor,
    view: View,
    shares: Sequence[float],
    network: PlaneNetwork,
    occupied: OccupiedSpace,
    stretched_depth: int,
    step: int,
    progress: Callable[[float], None] | None,
) -> None:
    """Add the shares of a view to the sums (4, z, y, x)."""
    axis = VIEW_AXIS[view]
    depth = image.shape[1] if axis == 0 else stretched_depth
    indices = computed_indices(image.shape[axis], step)
    reach = _reach_of(indices, image.shape[axis])
    planes = image.movedim(axis, 0)
    sums = [total[component].movedim(axis, 0) for component in (*VIEW_AXES[view], 3)]
    told = 0
    for group in plane_groups(image.shape, axis, network, occupied, depth, indices):
        if isinstance(group, PlaneGroup):
            last = group.indices[-1]
            output = _predict(planes, group, network)
            for sum_, values, share in zip(sums, output.unbind(1), shares, strict=True):
                box = sum_[:, group.box.rows, group.box.columns]
                if step == 1:
                    box[group.indices[0] : group.indices[-1] + 1].add_(values, alpha=share)
                    continue
                for index, plane in zip(group.indices, values, strict=True):
                    for target, part in reach[index]:
                        box[target].add_(plane, alpha=share * part)
        else:
            last = group
        if progress is not None:
            progress(last + 1 - told)
            told = last + 1
    if progress is not None and told < image.shape[axis]:
        progress(image.shape[axis] - told)


def _predict(planes: Tensor, group: PlaneGroup, network: PlaneNetwork) -> Tensor:
    """Run a group; gives flow and logit (n, 3, height, width) of its box, the logit above the empty one."""
    box, first, last = group.box, group.indices[0], group.indices[-1]
    step = group.indices[1] - first if len(group.indices) > 1 else 1
    if list(group.indices) == list(range(first, last + 1, step)):
        stack = planes[first : last + 1 : step, box.rows, box.columns]
    else:
        chosen = torch.tensor(list(group.indices), device=planes.device)
        stack = planes[:, box.rows, box.columns].index_select(0, chosen)
    native = box.rows.stop - box.rows.start
    output = network.run(resize_tensor(stack, (len(stack), box.height, stack.shape[2])))
    output = resize_tensor(output, (*output.shape[:2], native, output.shape[3]))
    flow, logit = output[:, :2], output[:, 2:]
    flow.nan_to_num_(0.0).clamp_(-_MOST / FLOW_UNITS, _MOST / FLOW_UNITS)
    logit.nan_to_num_(-_MOST / LOGIT_UNITS).clamp_(-_MOST / LOGIT_UNITS, _MOST / LOGIT_UNITS)
    logit -= EMPTY_LOGIT
    return output


def _reach_of(indices: Sequence[int], count: int) -> dict[int, list[tuple[int, float]]]:
    """Give for each computed plane the planes that it enters, with its share: linear, flat at the ends."""
    places = np.arange(count)
    reach = {}
    for number, index in enumerate(indices):
        share = np.interp(places, indices, np.eye(len(indices))[number])
        reach[index] = [(int(place), float(share[place])) for place in np.flatnonzero(share)]
    return reach


def _fetch(total: Tensor, voxel_size: VoxelSize) -> FlowField:
    """Pack sums and bring them to the host, slab by slab."""
    units = torch.tensor([FLOW_UNITS] * 3 + [LOGIT_UNITS], device=total.device).view(4, 1, 1, 1)
    packed = np.empty((*total.shape[1:], 4), np.int16)
    slab = max(1, 2**24 // max(1, total[0, 0].numel()))
    for start in range(0, len(packed), slab):
        part = (total[:, start : start + slab] * units).round_().clamp_(-_MOST, _MOST).to(torch.int16)
        packed[start : start + slab] = part.permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return FlowField(packed, voxel_size)


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

    Parameters as `nuclei3d.segmentation.segmenter.segment_volume`, and:

    Parameters
    ----------
    volume_field
        What a 3D network says of the volume, on its own grid: it is fused with the views.
    seconds
        Gets ``network`` (inside the forward pass) and ``views`` (the rest) added.

    Returns
    -------
    FlowField
        On the view grid (`nuclei3d.segmentation.settings.view_grid`).
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
