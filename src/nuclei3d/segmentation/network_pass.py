"""The network pass: from an image to its flow field, by a 2D network on planes, a 3D network, or both.

A 2D network sees the volume on the *view grid*: x and y at the network's scale, z at the native planes (or at
the network's scale where the native planes are closer). xy planes are therefore the frame's own planes, never
interpolated ones; planes of the orthogonal views are stretched along z to cubic voxels, a few at a time, and
the results averaged back onto the view grid. Nothing of the size of the stretched volume is ever held. On a
GPU with room for it the image is brought there once, and all that follows happens there.

A 3D network sees overlapping patches of the volume on a grid of its own. In mode ``mixed`` it comes first:
its packed field, 8 bytes a voxel, is all that is kept of it while the views, which need more room, are
computed and summed up.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nuclei3d.errors import InputError
from nuclei3d.grid import resize_tensor
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import choose_precision
from nuclei3d.networks.unet3d import Triple, VolumeNetwork
from nuclei3d.segmentation.flow_field import (
    FLOW_UNITS,
    LOGIT,
    LOGIT_UNITS,
    MOST_UNITS,
    DeviceField,
    FlowField,
)
from nuclei3d.segmentation.foreground import OccupiedSpace, occupied_space
from nuclei3d.segmentation.fusion import VolumeView, add_views, component_weights, fuse_views, keep_planes
from nuclei3d.segmentation.network_runner import MAX_VOXELS, NetworkRunner
from nuclei3d.segmentation.settings import SegmentationSettings, check_scale, view_grid, with_ranges
from nuclei3d.segmentation.tiling import grow_to_lattice, padded, tile_volume
from nuclei3d.views import VIEW_AXES, VIEW_AXIS, View

EMPTY_LOGIT = -10.0
"""Logit where the network was not run because nothing can be there."""

_MOST_WASTE = 1.1
"""Pixels of planes in the box of their group, relative to those of each in its own."""

_SAME_DEPTH = 0.02
_TANH_VOXELS = 5.0

_BYTES_PER_VOXEL = 48
_BYTES_BESIDE = 2**30
"""On a GPU, in all that comes with a volume, from the sums to the labels."""

_SHARE_OF_MEMORY = 0.5
"""What a volume may take of the memory that is free; the network needs the rest."""

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Networks:
    """The networks that see a volume.

    `main` is a 2D network such as CPnet, or in mode ``full3d`` a `VolumeNetwork`; `orthogonal` another 2D
    network for the xz and yz planes; `volume` the `VolumeNetwork` of mode ``mixed``.
    """

    main: nn.Module
    orthogonal: nn.Module | None = None
    volume: VolumeNetwork | None = None

    def of(self, view: View) -> nn.Module:
        """Give the 2D network of a view."""
        return self.main if view == "xy" or self.orthogonal is None else self.orthogonal


def predict_flows(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    networks: Networks,
    settings: SegmentationSettings,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[FlowField | DeviceField, dict[str, float]]:
    """Run the networks over a volume.

    What is fill (`nuclei3d.intensity`) is shown as background, and no nucleus is seen there. The networks are
    moved to the device; their training mode is left as it was.

    Parameters
    ----------
    image
        (z, y, x), any real dtype; what is not finite is fill.
    settings
        In any mode but ``cellpose``.
    progress
        Called with the share done, below 1: the last hundredth is for the masks.

    Returns
    -------
    flows : FlowField or DeviceField
        On the view grid (`settings.view_grid`); in mode ``full3d`` on that of the network (`volume_grid`). In
        the memory of the device, if that is a GPU and they fit there.
    seconds : dict
        ``network``, inside the forward passes, and ``views``, the rest.

    Raises
    ------
    InputError
        If image, voxel size and diameter do not fit together, or mode or engine are not for the networks.
    """
    started = time.perf_counter()
    for each in settings.passes:
        check_scale(image.shape, voxel_size, each)
    settings = with_ranges(settings, image)
    assert settings.intensity_range is not None
    image, outside = settings.intensity_range.clean(image)
    solid = _volume_network(networks, settings)
    views = () if settings.mode == "full3d" else settings.seen_views
    # The 3D network counts as a view in the progress; how long each takes depends on the networks.
    share = 1 / (1 + len(views)) if solid is not None else 0.0
    report = _part_of(progress or (lambda share: None), 0.0, 0.99)
    field: FlowField | DeviceField | None = None
    spent = 0.0
    used = [each for each in (networks.main, networks.orthogonal, networks.volume) if each is not None]
    training = [each.training for each in used]
    patches: FlowField | None = None
    try:
        if solid is not None:
            patches, spent = _predict_patches(image, voxel_size, *solid, device, _part_of(report, 0.0, share))
            field = patches
        if views:
            field, spent_on_views = _predict_views(
                image, voxel_size, networks, settings, device, _part_of(report, share, 1.0), patches
            )
            spent += spent_on_views
    finally:
        for network, mode in zip(used, training, strict=True):
            network.train(mode)
    assert field is not None
    if outside is not None:
        field.exclude(outside)
    if isinstance(field, FlowField) and settings.mode != "stitch" and fits_on(device, field.shape):
        field = field.to(device)
    return field, {"network": spent, "views": time.perf_counter() - started - spent}


def _volume_network(
    networks: Networks, settings: SegmentationSettings
) -> tuple[VolumeNetwork, SegmentationSettings] | None:
    """Give the 3D network that takes part, and its settings; check that mode and networks fit."""
    solid = settings.mode == "full3d"
    if solid != isinstance(networks.main, VolumeNetwork):
        wanted, found, use = ("3D", "2D", "ortho or stitch") if solid else ("2D", "3D", "full3d")
        raise InputError(
            f"mode '{settings.mode}' needs a {wanted} network; this model has a {found} network: use {use}"
        )
    if isinstance(networks.main, VolumeNetwork):
        return networks.main, settings
    if settings.mode != "mixed":
        return None
    if settings.volume is None or not isinstance(networks.volume, VolumeNetwork):
        raise InputError("mode 'mixed' needs a 3D network beside the 2D one: give it, or use ortho")
    return networks.volume, settings.volume


def _part_of(progress: Progress, start: float, stop: float) -> Progress:
    """Report the share done of a part as that of the whole."""
    return lambda done: progress(start + (stop - start) * done)


def _runner(network: nn.Module, settings: SegmentationSettings, device: torch.device) -> NetworkRunner:
    precision = choose_precision(settings.precision, device)
    return NetworkRunner(
        network, device, precision=precision, flip_average=settings.flip_average, engine=settings.engine
    )


def show_volume(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    shape: Triple,
    grid_voxel_size: VoxelSize,
    settings: SegmentationSettings,
    device: torch.device,
) -> tuple[Tensor, OccupiedSpace]:
    """Bring an image to a network's grid on a device, normalised, and find where nuclei can be.

    The volume is float32 (z, y, x).
    """
    intensity = settings.intensity_range
    assert intensity is not None
    # a camera's voxels are half as large as those that a network sees, and converted where they are wanted
    counted = device.type != "cpu" and image.dtype in (np.uint8, np.uint16)
    there = torch.from_numpy(np.array(image, dtype=None if counted else np.float32)).to(device)
    volume = intensity.scale(resize_tensor(there.float(), shape))
    diameter_um = settings.nucleus_diameter_um if settings.skip_empty else None
    return volume, occupied_space(volume, intensity, voxel_size, grid_voxel_size, diameter_um)


def _predict_patches(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    network: VolumeNetwork,
    settings: SegmentationSettings,
    device: torch.device,
    report: Progress,
) -> tuple[FlowField, float]:
    """Run a 3D network over overlapping patches and blend them; gives the field and the network's seconds."""
    runner = _runner(network, settings, device)
    shape, grid_voxel_size = volume_grid(image.shape, voxel_size, settings, network.spec.anisotropy)
    host = torch.device("cpu")
    volume, occupied = show_volume(image, voxel_size, shape, grid_voxel_size, settings, host)
    field = FlowField.zeros(shape, grid_voxel_size)
    field.packed[..., LOGIT] = EMPTY_LOGIT * LOGIT_UNITS
    bounds = occupied.bounds([slice(0, size) for size in shape])
    if bounds is not None:
        multiple = network.spec.architecture.multiple
        box = [
            grow_to_lattice(part, size, pooling=factor)
            for part, size, factor in zip(bounds, shape, multiple, strict=True)
        ]
        overlap = [settings.nucleus_diameter_um / edge for edge in grid_voxel_size.zyx]
        tiling = tile_volume(box, multiple, network.spec.patch, overlap, MAX_VOXELS[device.type])
        field.packed[tuple(box)] = 0
        for done, (z, y, x) in enumerate(tiling.boxes, start=1):
            place, weight = (z, y, x), tiling.weight((z, y, x))
            if occupied.bounds(place) is None:
                field.add(place, LOGIT, np.broadcast_to(np.float32(EMPTY_LOGIT), weight.shape), weight)
            else:
                for component, values in enumerate(runner(volume[place][None].numpy())[0]):
                    field.add(place, component, values, weight)
            report(done / len(tiling.boxes))
    if network.spec.targets == "tanh":
        field = FlowField.of(directions_from_tanh(field.flow, grid_voxel_size), field.logit, grid_voxel_size)
    return field, runner.seconds


def volume_grid(
    shape: Sequence[int], voxel_size: VoxelSize, settings: SegmentationSettings, anisotropy: float
) -> tuple[Triple, VoxelSize]:
    """Choose the grid that a 3D network sees: shape (z, y, x) and voxel size.

    x and y are at the network's scale. In z the image's own planes are taken if they lie, against the
    nucleus, as far apart as the training's; else planes that do.
    """
    (_, height, width), _, _ = view_grid(tuple(shape), voxel_size, settings)
    wanted = anisotropy * settings.network_voxel_um
    depth = shape[0]
    if abs(voxel_size.z / wanted - 1) > _SAME_DEPTH:
        depth = max(1, round(shape[0] * voxel_size.z / wanted))
    grid = (depth, height, width)
    edges = [size * old / new for size, old, new in zip(voxel_size.zyx, shape, grid, strict=True)]
    return grid, VoxelSize.of(edges)


def directions_from_tanh(flow: NDArray[np.floating[Any]], voxel_size: VoxelSize) -> NDArray[np.float16]:
    """Turn tanh(distance to the centre / 5 voxels) along each axis into unit vectors in um.

    Within a voxel of the centre they are shorter, so that they do not turn around at random.
    """
    voxels = _TANH_VOXELS * np.arctanh(np.clip(flow.astype(np.float32), -0.99, 0.99))
    way = voxels * np.array(voxel_size.zyx, np.float32).reshape(3, 1, 1, 1)
    length = np.maximum(np.sqrt(np.square(way).sum(axis=0)), np.float32(voxel_size.x))
    return np.asarray(way / length, np.float16)


def _predict_views(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    networks: Networks,
    settings: SegmentationSettings,
    device: torch.device,
    report: Progress,
    solid: FlowField | None = None,
) -> tuple[FlowField | DeviceField, float]:
    """Run 2D networks over the planes of the views, and fuse these with what a 3D network says."""
    views = settings.seen_views
    runners = {
        network: _runner(network, settings, device) for network in dict.fromkeys(map(networks.of, views))
    }
    steps = {view: 1 if view == "xy" else settings.orthogonal_step for view in views}
    weights = dict.fromkeys(views, 1.0)
    # In mode stitch there is one view, whatever weights the settings have for three.
    if settings.view_weights is not None and views == settings.views:
        weights = dict(zip(views, settings.view_weights, strict=True))
    shape, grid_voxel_size, depth = view_grid(image.shape, voxel_size, settings)
    volume_view = None
    if solid is not None:
        volume_view = VolumeView(solid, shape, settings.volume_weight)
    on_device = settings.fusion == "mean" and volume_view is None and fits_on(device, shape)
    there = device if on_device else torch.device("cpu")
    shown, occupied = show_volume(image, voxel_size, shape, grid_voxel_size, settings, there)
    # Pixels of each view, which share out the progress.
    z, y, x = shape
    pixels = {
        "xy": z * y * x,
        "xz": y * depth * x / steps.get("xz", 1),
        "yz": x * depth * y / steps.get("yz", 1),
    }
    ends = list(itertools.accumulate((pixels[view] for view in views), initial=0.0))

    def computed(view: View) -> Iterator[ComputedPlanes]:
        number, runner = views.index(view), runners[networks.of(view)]
        done = _part_of(report, ends[number] / ends[-1], ends[number + 1] / ends[-1])
        return compute_view(shown, view, runner, occupied, depth, steps[view], done)

    def planes_of(view: View) -> Iterator[tuple[int, NDArray[np.float32]]]:
        return whole_planes(computed(view), view, shape)

    field: FlowField | DeviceField
    if settings.fusion != "mean":
        kept = {view: keep_planes(view, planes_of(view), shape) for view in views}
        field = FlowField.of(*fuse_views(kept, settings.fusion, weights, volume_view), grid_voxel_size)
    elif on_device:
        field = sum_on_device(computed, weights, steps, shape, grid_voxel_size, device)
    else:
        field = FlowField.zeros(shape, grid_voxel_size)
        add_views(field, planes_of, weights, volume_view)
    return field, sum(runner.seconds for runner in runners.values())


@dataclass(frozen=True)
class PlaneBox:
    """The part of a plane that goes through the network; `height` is its rows at the network's scale."""

    rows: slice
    columns: slice
    height: int

    @classmethod
    def around(cls, box: Sequence[slice], height: int, width: int, depth: int) -> PlaneBox:
        """Grow a box of a plane (height, width) so that the network sees in it what it sees in the plane."""
        rows = grow_to_lattice(box[0], height, depth / height)
        columns = grow_to_lattice(box[1], width)
        return cls(rows, columns, max(1, round((rows.stop - rows.start) * depth / height)))

    @property
    def pixels(self) -> int:
        """Pixels of the network, padding included."""
        return padded(self.height) * padded(int(self.columns.stop - self.columns.start))


@dataclass(frozen=True)
class ComputedPlanes:
    """What the network says of some planes of a view, in the box of each that was computed.

    `output` is float32 (n, 3, rows, columns) on the view grid: flow along the plane's axes, logit. Box and
    output are None if nothing can be in the planes.
    """

    indices: Sequence[int]
    box: PlaneBox | None = None
    output: Tensor | None = None


def compute_view(
    volume: Tensor,
    view: View,
    runner: NetworkRunner,
    occupied: OccupiedSpace,
    stretched_depth: int,
    step: int = 1,
    report: Progress = lambda share: None,
) -> Iterator[ComputedPlanes]:
    """Run a network over the planes of one view, every `step`-th, and yield them in order.

    The volume is normalised, float32 (z, y, x) on the view grid, on any device, which the results are on too;
    `stretched_depth` is its number of cubic voxels along z at the network's scale. Planes and margins that
    are not `occupied` are not computed.
    """
    axis = VIEW_AXIS[view]
    planes = volume.movedim(axis, 0)
    # In an xy plane nothing is stretched: its rows are y.
    depth = volume.shape[1] if axis == 0 else stretched_depth
    for indices, box in _group_planes(volume.shape, axis, runner, occupied, depth, step):
        if box is None:
            yield ComputedPlanes(indices)
        else:
            apart = indices[1] - indices[0] if len(indices) > 1 else 1
            if list(indices) == list(range(indices[0], indices[-1] + 1, apart)):
                stack = planes[indices[0] : indices[-1] + 1 : apart, box.rows, box.columns]
            else:
                chosen = torch.tensor(indices, device=planes.device)
                stack = planes[:, box.rows, box.columns].index_select(0, chosen)
            native = stack.shape[1]
            stack = resize_tensor(stack, (len(stack), box.height, stack.shape[2]))
            output = runner.run(stack, upright=axis != 0)
            output = output.to(volume.device)
            yield ComputedPlanes(
                indices, box, resize_tensor(output, (*output.shape[:2], native, output.shape[3]))
            )
        report((indices[-1] + 1) / len(planes))
    report(1.0)


def computed_indices(count: int, step: int) -> list[int]:
    """Choose the planes to compute: every `step`-th, and the last so that none is extrapolated far."""
    start = min((step - 1) // 2, count - 1)
    chosen = list(range(start, count, step))
    if count - 1 - chosen[-1] > step // 2:
        chosen.append(count - 1)
    return chosen


def _group_planes(
    shape: Sequence[int],
    axis: int,
    runner: NetworkRunner,
    occupied: OccupiedSpace,
    depth: int,
    step: int,
) -> Iterator[tuple[list[int], PlaneBox | None]]:
    """Put the planes to compute into groups that go through the network together, in a common box.

    All of a group are computed in the box that holds what any of them holds. A group ends where that would
    cost much more than each plane in its own box, as at the pole of an embryo, where planes begin small.
    """
    rows, columns = (other for other in range(3) if other != axis)
    indices, edges = computed_indices(shape[axis], step), occupied.edges[axis]
    blocks = (np.searchsorted(edges, range(shape[axis]), side="right") - 1).tolist()

    # what blocks hold is asked once: planes are many, and a GPU waits for the answers
    @functools.cache
    def box_of_blocks(first: int, last: int) -> PlaneBox | None:
        among = [slice(0, size) for size in shape]
        among[axis] = slice(int(edges[first]), int(edges[last + 1]))
        box = occupied.bounds(among)
        if box is None:
            return None
        return PlaneBox.around((box[rows], box[columns]), shape[rows], shape[columns], depth)

    def box_of(first: int, last: int) -> PlaneBox | None:
        return box_of_blocks(blocks[first], blocks[last])

    while indices:
        common = box_of(indices[0], indices[0])
        count, own_pixels = 1, 0 if common is None else common.pixels
        for index in indices[1:] if common is not None else ():
            own, grown = box_of(index, index), box_of(indices[0], index)
            if own is None or grown is None:
                break
            own_pixels += own.pixels
            if count + 1 > runner.planes_per_batch(grown.pixels):
                break
            if (count + 1) * grown.pixels > _MOST_WASTE * own_pixels:
                break
            count, common = count + 1, grown
        yield indices[:count], common
        indices = indices[count:]


def whole_planes(
    groups: Iterator[ComputedPlanes], view: View, shape: Triple
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Give every plane of a view once, in order: its number, and (3, rows, columns) of all of it.

    Those that were not computed are interpolated linearly between their neighbours.
    """
    rows, columns = (shape[axis] for axis in VIEW_AXES[view])
    last, before = -1, None
    for group in groups:
        for number, index in enumerate(group.indices):
            output = np.zeros((3, rows, columns), np.float32)
            output[2] = EMPTY_LOGIT
            if group.box is not None and group.output is not None:
                output[:, group.box.rows, group.box.columns] = group.output[number].numpy()
            for between in range(last + 1, index):
                if before is None:
                    yield between, output
                else:
                    share = np.float32((between - last) / (index - last))
                    yield between, before + share * (output - before)
            yield index, output
            last, before = index, output
    if before is not None:
        for index in range(last + 1, shape[VIEW_AXIS[view]]):
            yield index, before


def fits_on(device: torch.device, shape: Sequence[int]) -> bool:
    """Say whether a volume of this shape can lie on the device, which is a GPU."""
    voxels = math.prod(shape)
    # voxels are numbered by int32
    if device.type != "cuda" or voxels >= 2**31:
        return False
    free, _ = torch.cuda.mem_get_info(device)
    # what torch keeps for itself from the frame before is free as well
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _BYTES_PER_VOXEL * voxels + _BYTES_BESIDE <= _SHARE_OF_MEMORY * free


@torch.inference_mode()
def sum_on_device(
    computed: Callable[[View], Iterator[ComputedPlanes]],
    weights: Mapping[View, float],
    steps: Mapping[View, int],
    shape: Triple,
    voxel_size: VoxelSize,
    device: torch.device,
) -> DeviceField:
    """Sum up the mean of the views where they were computed.

    It is the field that `add_views` sums up on the host, up to the rounding of a unit or two. `computed`
    gives what was computed of a view (`compute_view`), on the device.
    """
    seen = component_weights(weights)
    total = torch.zeros((4, *shape), device=device)
    # what is not computed says that nothing is there
    total[LOGIT] = EMPTY_LOGIT
    for view, weight in weights.items():
        components = (*VIEW_AXES[view], LOGIT)
        sums = [total[component].movedim(VIEW_AXIS[view], 0) for component in components]
        entered = _entered_planes(shape[VIEW_AXIS[view]], steps[view])
        for group in computed(view):
            if group.box is None or group.output is None:
                continue
            flow, logit = group.output[:, :2], group.output[:, 2:]
            flow.nan_to_num_(0.0).clamp_(-MOST_UNITS / FLOW_UNITS, MOST_UNITS / FLOW_UNITS)
            logit.nan_to_num_(-MOST_UNITS / LOGIT_UNITS)
            logit.clamp_(-MOST_UNITS / LOGIT_UNITS, MOST_UNITS / LOGIT_UNITS).sub_(EMPTY_LOGIT)
            for component, sum_, values in zip(components, sums, group.output.unbind(1), strict=True):
                box, share = sum_[:, group.box.rows, group.box.columns], weight / seen[component]
                if steps[view] == 1:
                    box[group.indices[0] : group.indices[-1] + 1].add_(values, alpha=share)
                    continue
                for index, plane in zip(group.indices, values, strict=True):
                    for target, part in entered[index]:
                        box[target].add_(plane, alpha=share * part)
    return _packed(total, voxel_size)


def _entered_planes(count: int, step: int) -> dict[int, list[tuple[int, float]]]:
    """Give for each computed plane those that it enters, with its share: linear, flat at the ends."""
    indices, places = computed_indices(count, step), np.arange(count)
    entered = {}
    for index, peak in zip(indices, np.eye(len(indices)), strict=True):
        share = np.interp(places, indices, peak)
        entered[index] = [(int(place), float(share[place])) for place in np.flatnonzero(share)]
    return entered


def _packed(total: Tensor, voxel_size: VoxelSize) -> DeviceField:
    """Pack sums (4, z, y, x), slab by slab."""
    units = torch.tensor([FLOW_UNITS] * 3 + [LOGIT_UNITS], device=total.device).view(4, 1, 1, 1)
    packed = torch.empty((*total.shape[1:], 4), dtype=torch.int16, device=total.device)
    slab = max(1, 2**24 // max(1, total[0, 0].numel()))
    for start in range(0, len(packed), slab):
        part = (total[:, start : start + slab] * units).round_().clamp_(-MOST_UNITS, MOST_UNITS)
        packed[start : start + slab] = part.permute(1, 2, 3, 0)
    return DeviceField(packed, voxel_size)
