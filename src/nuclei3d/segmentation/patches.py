"""The flow of a volume from a 2D network on planes and a 3D network together.

Patches that cover a box of a volume, and the Gaussian weights with which they are blended.

The flow of a volume from a 3D network: normalise, run the network over overlapping patches, blend.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import FLOW_SCALE, choose_precision
from nuclei3d.networks.unet3d import OUTPUTS, Triple, VolumeNetwork, VolumeSpec
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.foreground import OccupiedSpace
from nuclei3d.segmentation.plane_flows import predict_plane_flows, show_volume
from nuclei3d.segmentation.plane_network import grow_to_lattice
from nuclei3d.segmentation.settings import SegmentationSettings, view_grid
from nuclei3d.segmentation.views import EMPTY_LOGIT

Box = tuple[slice, slice, slice]

_SIGMAS = 8.0
"""A patch is this many sigmas of its Gaussian weight wide (nnU-Net)."""


@dataclass(frozen=True)
class _Axis:
    """Equal patches over one axis of the box, the same overlap between all; the last may reach beyond it."""

    start: int
    stop: int
    starts: tuple[int, ...]
    size: int

    @cached_property
    def weights(self) -> dict[int, NDArray[np.float32]]:
        """Share of each patch in each of its voxels; over all patches the shares of a voxel add up to 1."""
        place = (np.arange(self.size) + 0.5) / self.size - 0.5
        bell = np.exp(-0.5 * (_SIGMAS * place) ** 2)
        total = np.zeros(self.starts[-1] + self.size)
        for start in self.starts:
            total[start : start + self.size] += bell
        return {start: (bell / total[start : start + self.size]).astype(np.float32) for start in self.starts}


class PatchTiling:
    """Patches that cover a box of a volume.

    Parameters
    ----------
    box
        What is to be covered.
    spec
        Of the network: patches are multiples of its pooling, and at least as large as those it was trained on
        where the box is.
    overlap
        Voxels (z, y, x) by which neighbours overlap at least; about a nucleus.
    max_voxels
        Of a patch.

    Attributes
    ----------
    box
        As given.
    places
        Of all patches, cut at the box.
    """

    def __init__(self, box: Box, spec: VolumeSpec, overlap: Sequence[float], max_voxels: int) -> None:
        self.box = box
        multiple, trained = spec.architecture.multiple, spec.patch
        lengths = [part.stop - part.start for part in box]
        sizes = [padded(length, factor) for length, factor in zip(lengths, multiple, strict=True)]
        while math.prod(sizes) > max_voxels:
            # the axis that is longest against the patches of the training is cut first
            spare = [
                size / least if size > least else 0.0 for size, least in zip(sizes, trained, strict=True)
            ]
            longest = int(np.argmax(spare))
            if not spare[longest]:
                break
            half = padded(math.ceil((sizes[longest] + overlap[longest]) / 2), multiple[longest])
            smaller = max(half, trained[longest])
            if smaller >= sizes[longest]:
                smaller = trained[longest]
            sizes[longest] = smaller
        self._axes = [
            _cover(part.start, part.stop, size, min(over, size / 2), factor)
            for part, size, over, factor in zip(box, sizes, overlap, multiple, strict=True)
        ]
        self.size = tuple(sizes)
        self.places = [
            self._place(starts) for starts in itertools.product(*(axis.starts for axis in self._axes))
        ]

    def _place(self, starts: Sequence[int]) -> Box:
        z, y, x = (
            slice(axis.start + start, min(axis.start + start + axis.size, axis.stop))
            for axis, start in zip(self._axes, starts, strict=True)
        )
        return z, y, x

    def weight(self, place: Box) -> NDArray[np.float32]:
        """Share (z, y, x) of a patch in each of its voxels."""
        z, y, x = (
            axis.weights[part.start - axis.start][: part.stop - part.start]
            for axis, part in zip(self._axes, place, strict=True)
        )
        return np.asarray(z[:, None, None] * y[:, None] * x)


def _cover(start: int, stop: int, size: int, overlap: float, multiple: int) -> _Axis:
    """Place patches that start on the network's lattice; it pools `multiple` voxels into one."""
    length = stop - start
    if length <= size:
        return _Axis(start, stop, (0,), size)
    last = padded(length - size, multiple)
    count = 1 + math.ceil(last / max(multiple, (size - overlap) // multiple * multiple))
    starts = (np.linspace(0, last, count) / multiple).round().astype(int) * multiple
    return _Axis(start, stop, tuple(int(first) for first in starts), size)


def padded(length: int, multiple: int) -> int:
    """Round up to the next multiple."""
    return -(-length // multiple) * multiple


MAX_VOXELS = {"cpu": 2**19, "cuda": 2**23}
"""Voxels that go through the network at once; patches are as large as this and the volume allow."""

_SAME_DEPTH = 0.02
_TANH_VOXELS = 5.0


def predict_patch_flows(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    network: VolumeNetwork,
    settings: SegmentationSettings,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
    *,
    seconds: dict[str, float] | None = None,
) -> FlowField:
    """Run a 3D network over a volume.

    Parameters as `nuclei3d.segmentation.segmenter.segment_volume` (of the settings, none for views is
    used), and:

    Parameters
    ----------
    seconds
        Gets ``network`` (inside the forward pass) and ``views`` (the rest) added.

    Returns
    -------
    FlowField
        On the network's grid (`volume_grid`).
    """
    if settings.engine == "openvino":
        raise InputError("engine 'openvino' runs Cellpose's 2D CNN only; use engine auto or torch")
    started = time.perf_counter()
    shape, grid_voxel_size = volume_grid(image.shape, voxel_size, settings, network.spec.anisotropy)
    volume, occupied = show_volume(image, voxel_size, shape, grid_voxel_size, settings)
    training = network.training
    runner = _PatchRunner(network, device, settings)
    field = FlowField.zeros(shape, grid_voxel_size)
    whole = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
    field.add(whole, 3, np.broadcast_to(np.float32(EMPTY_LOGIT), shape), 1.0)
    try:
        overlap = [settings.nucleus_diameter_um / edge for edge in grid_voxel_size.zyx]
        box = _occupied_box(occupied, network.spec.architecture.multiple)
        tiling = PatchTiling(box, network.spec, overlap, MAX_VOXELS[device.type])
        field.packed[tiling.box] = 0
        for done, place in enumerate(tiling.places, start=1):
            weight = tiling.weight(place)
            if _any_occupied(occupied, place):
                for component, values in enumerate(runner(volume[place])):
                    field.add(place, component, values, weight)
            else:
                field.add(place, 3, np.broadcast_to(np.float32(EMPTY_LOGIT), weight.shape), weight)
            if progress is not None:
                # The last hundredth is for the masks.
                progress(0.99 * done / len(tiling.places))
    finally:
        network.train(training)
    if network.spec.targets == "tanh":
        field = FlowField.of(directions_from_tanh(field.flow, grid_voxel_size), field.logit, grid_voxel_size)
    if seconds is not None:
        seconds["network"] = runner.seconds
        seconds["views"] = time.perf_counter() - started - runner.seconds
    return field


def volume_grid(
    shape: Sequence[int], voxel_size: VoxelSize, settings: SegmentationSettings, anisotropy: float
) -> tuple[Triple, VoxelSize]:
    """Choose the grid that the network sees: x and y at its scale, z as far apart as in training.

    Returns
    -------
    shape : tuple of int
        In z the image's own planes if they lie, against the nucleus, as far apart as the training's.
    voxel_size : VoxelSize
        Of that grid.
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


def _occupied_box(occupied: OccupiedSpace, multiple: Sequence[int]) -> Box:
    """Give the box, on the network's lattice, of all that can hold nuclei; an empty one if nothing can."""
    box = []
    for axis, edges in enumerate(occupied.edges):
        found = np.flatnonzero(occupied.blocks.any(axis=tuple(a for a in range(3) if a != axis)))
        first, last = (found[0], found[-1] + 1) if len(found) else (0, 0)
        whole = slice(int(edges[first]), int(edges[last]))
        box.append(grow_to_lattice(whole, int(edges[-1]), pooling=multiple[axis]))
    return box[0], box[1], box[2]


def _any_occupied(occupied: OccupiedSpace, place: Box) -> bool:
    part: list[slice] = []
    for edges, along in zip(occupied.edges, place, strict=True):
        first = int(np.searchsorted(edges, along.start, side="right")) - 1
        last = int(np.searchsorted(edges, along.stop, side="left"))
        part.append(slice(first, last))
    return bool(occupied.blocks[part[0], part[1], part[2]].any())


class _PatchRunner:
    """Runs a network over patches and keeps count of the time spent in it."""

    def __init__(self, network: VolumeNetwork, device: torch.device, settings: SegmentationSettings) -> None:
        self.seconds = 0.0
        self._device = device
        self._precision = choose_precision(settings.precision, device)
        self._flips = _FLIPS if settings.flip_average else _FLIPS[:1]
        self._multiple = network.spec.architecture.multiple
        self._network = network.eval().to(device)
        self._network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def __call__(self, patch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Give flow (about unit vectors) and logit of a patch (z, y, x): float32 (4, z, y, x)."""
        # Zeros beyond the volume's end, as in the patches of the training.
        pad = [
            (0, padded(size, multiple) - size)
            for size, multiple in zip(patch.shape, self._multiple, strict=True)
        ]
        output = self._forward(np.pad(patch, pad))
        z, y, x = patch.shape
        return output[:, :z, :y, :x]

    def _forward(self, patch: NDArray[np.float32]) -> NDArray[np.float32]:
        started = time.perf_counter()
        with torch.inference_mode():
            image = torch.from_numpy(patch)[None, None].to(self._device)
            total = torch.zeros((OUTPUTS, *patch.shape), device=self._device)
            for axes in self._flips:
                output = self._output(torch.flip(image, axes) if axes else image)[0].float()
                if axes:
                    output = torch.flip(output, [axis - 1 for axis in axes])
                    output[[axis - 2 for axis in axes]] *= -1
                total += output
            total /= len(self._flips)
            total[:3] /= FLOW_SCALE
            result: NDArray[np.float32] = total.cpu().numpy()
        self.seconds += time.perf_counter() - started
        return result

    def _output(self, image: Tensor) -> Tensor:
        mixed = self._precision != torch.float32
        alone = not mixed and self._device.type == "cpu" and torch.get_num_threads() == 1
        # torch takes its slow convolution for a single volume on a single thread (50 times slower, measured)
        stack = image.repeat(2, 1, 1, 1, 1) if alone else image
        stack = stack.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(self._device.type, dtype=self._precision, enabled=mixed):
            output: Tensor = self._network(stack)
        return output


_FLIPS: tuple[tuple[int, ...], ...] = tuple(
    axes for count in range(4) for axes in itertools.combinations((2, 3, 4), count)
)
"""The axes that are mirrored in each of the eight ways to look at a volume."""


def predict_mixed_flows(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    network: nn.Module,
    volume_network: VolumeNetwork,
    settings: SegmentationSettings,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
    *,
    orthogonal_network: nn.Module | None = None,
    seconds: dict[str, float] | None = None,
) -> FlowField:
    """Run a 3D network over a volume and a 2D network over its planes, and fuse all looks.

    Parameters as `nuclei3d.segmentation.segmenter.segment_volume` (`settings.volume` is needed), and:

    Parameters
    ----------
    seconds
        Gets ``network`` (inside the forward passes) and ``views`` (the rest) added.

    Returns
    -------
    FlowField
        On the view grid (`nuclei3d.segmentation.settings.view_grid`).

    Notes
    -----
    The 3D network comes first: its packed field, 8 bytes a voxel, is all that is kept of it while the views,
    which need more room, are computed and summed up.
    """
    assert settings.volume is not None
    # Each look counts alike in the progress; how long one takes depends on the two networks.
    share = 1 / (1 + len(settings.seen_views))
    spent_solid: dict[str, float] = {}
    spent_views: dict[str, float] = {}
    field = predict_patch_flows(
        image,
        voxel_size,
        volume_network,
        settings.volume,
        device,
        _part_of(progress, 0.0, share),
        seconds=spent_solid,
    )
    fused = predict_plane_flows(
        image,
        voxel_size,
        network,
        settings,
        device,
        _part_of(progress, share, 1.0),
        orthogonal_network=orthogonal_network,
        volume_field=field,
        seconds=spent_views,
    )
    if seconds is not None:
        seconds.update({step: spent_solid[step] + spent_views[step] for step in spent_solid})
    return fused


def _part_of(
    progress: Callable[[float], None] | None, start: float, stop: float
) -> Callable[[float], None] | None:
    """Report the share done of a part as that of the whole."""
    if progress is None:
        return None
    report = progress
    return lambda done: report(start + (stop - start) * done)
