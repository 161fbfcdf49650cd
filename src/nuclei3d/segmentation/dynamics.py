"""Dynamics: from a flow and a logit to labelled nuclei.

1. Every foreground voxel becomes a particle that moves along the interpolated flow, in steps of fixed
   physical length, to its sink. Interpolation is trilinear with voxel centres at whole coordinates and holds
   up to the border of the volume. Flows of background voxels are used too: a nucleus may have holes in its
   foreground, and a particle must not be caught in them. When it turns back by more than a right angle, it
   has passed its sink, and its step is halved: it cannot overshoot for good, and it stops as soon as its
   steps have become small (early stopping particle by particle).
2. End points are counted in bins of equal physical size. Every bin that holds some looks for the densest bin
   within a given distance and becomes its child (quick shift, Vedaldi and Soatto, ECCV 2008); a bin that is
   the densest around is a sink, and all its descendants belong to it. No end point is left over, none is
   handled one by one, and two sinks are two only if they lie further apart than that distance.
3. What flows to one sink is a nucleus, made whole and scored (`masks`).

Lengths are in um or fractions of the nucleus' diameter, so the same settings serve any grid. A field in a
GPU's memory (`DeviceField`) is followed there (`nuclei3d.segmentation.device`); labels come back at the end.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from nuclei3d.errors import InputError
from nuclei3d.grid import available_threads, resize_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation import device
from nuclei3d.segmentation.flow_field import FLOW_UNITS, LOGIT, LOGIT_UNITS, DeviceField, FlowField
from nuclei3d.segmentation.masks import (
    Labels,
    box_labels,
    fetch_labels,
    finish_labels,
    grow_labels,
    keep_labels,
    renumber_labels,
)
from nuclei3d.segmentation.paths import SLOW, Paths, plan_paths
from nuclei3d.segmentation.settings import MaskSettings, SegmentationSettings
from nuclei3d.segmentation.stitching import stitch_planes


@njit(cache=True, nogil=True, fastmath=True)
def _follow(
    packed: NDArray[np.int16],
    threshold_units: float,
    outline_units: tuple[float, float],
    edges: NDArray[np.float32],
    step_um: float,
    smallest_step_um: float,
    rounds: int,
    bin_edges: NDArray[np.float32],
    bin_shape: tuple[int, int, int],
    ends: NDArray[np.uint32],
    start: int,
    stop: int,
) -> int:
    """Follow all foreground voxels of the planes start..stop; write 1 + the bin of their end into `ends`.

    `packed` is a `FlowField`'s; voxels whose logit, in its units, is above the threshold are foreground, and
    so are those above that of the outline, where it is lower: of its two values, for flow along z and in the
    plane, one is mixed by the squared share of z in the flow.
    `edges` are the voxel's edges in um, (z, y, x). Returns the number of foreground voxels.
    """
    depth, height, width, _ = packed.shape
    last_z = np.float32(depth - 1)
    last_y = np.float32(height - 1)
    last_x = np.float32(width - 1)
    per_z = np.float32(1.0) / edges[0]
    per_y = np.float32(1.0) / edges[1]
    per_x = np.float32(1.0) / edges[2]
    slow = np.float32(SLOW * FLOW_UNITS)
    one = np.float32(1.0)
    zero = np.float32(0.0)
    smallest = np.float32(smallest_step_um)
    threshold = np.float32(threshold_units)
    outline_z = np.float32(outline_units[0])
    outline_xy = np.float32(outline_units[1])
    lowest = min(threshold, outline_z, outline_xy)
    foreground = 0
    for z in range(start, stop):
        for y in range(height):
            for x in range(width):
                logit = np.float32(packed[z, y, x, 3])
                if not logit > threshold:
                    inside = logit > lowest
                    if inside:
                        fz = np.float32(packed[z, y, x, 0])
                        fy = np.float32(packed[z, y, x, 1])
                        fx = np.float32(packed[z, y, x, 2])
                        share = fz * fz / max(fz * fz + fy * fy + fx * fx, one)
                        inside = logit > outline_xy + share * (outline_z - outline_xy)
                    if not inside:
                        ends[z, y, x] = 0
                        continue
                foreground += 1
                pz = np.float32(z)
                py = np.float32(y)
                px = np.float32(x)
                step = np.float32(step_um)
                oz = zero
                oy = zero
                ox = zero
                for _ in range(rounds):
                    iz = min(int(pz), depth - 2) if depth > 1 else 0
                    iy = min(int(py), height - 2) if height > 1 else 0
                    ix = min(int(px), width - 2) if width > 1 else 0
                    jz = iz + 1 if depth > 1 else 0
                    jy = iy + 1 if height > 1 else 0
                    jx = ix + 1 if width > 1 else 0
                    tz = pz - np.float32(iz)
                    ty = py - np.float32(iy)
                    tx = px - np.float32(ix)
                    fz = zero
                    fy = zero
                    fx = zero
                    for corner in range(4):
                        cz = iz if corner < 2 else jz
                        cy = iy if corner % 2 == 0 else jy
                        weight = ((one - tz) if corner < 2 else tz) * ((one - ty) if corner % 2 == 0 else ty)
                        left = packed[cz, cy, ix]
                        right = packed[cz, cy, jx]
                        wl = weight * (one - tx)
                        wr = weight * tx
                        fz += wl * np.float32(left[0]) + wr * np.float32(right[0])
                        fy += wl * np.float32(left[1]) + wr * np.float32(right[1])
                        fx += wl * np.float32(left[2]) + wr * np.float32(right[2])
                    if fz * oz + fy * oy + fx * ox < zero:
                        step *= np.float32(0.5)
                        if step < smallest:
                            break
                    oz = fz
                    oy = fy
                    ox = fx
                    length = np.sqrt(fz * fz + fy * fy + fx * fx)
                    if length * step < smallest * slow:
                        break
                    stride = step / max(length, slow)
                    pz = min(max(pz + fz * stride * per_z, zero), last_z)
                    py = min(max(py + fy * stride * per_y, zero), last_y)
                    px = min(max(px + fx * stride * per_x, zero), last_x)
                bz = min(int(pz * edges[0] / bin_edges[0]), bin_shape[0] - 1)
                by = min(int(py * edges[1] / bin_edges[1]), bin_shape[1] - 1)
                bx = min(int(px * edges[2] / bin_edges[2]), bin_shape[2] - 1)
                ends[z, y, x] = np.uint32(1 + (bz * bin_shape[1] + by) * bin_shape[2] + bx)
    return foreground


@njit(cache=True, nogil=True)
def _count(
    ends: NDArray[np.uint32], packed: NDArray[np.int16], threshold_units: float, counts: NDArray[np.uint32]
) -> None:
    """Count the ends of voxels above the threshold: those of an outline below it make no sinks."""
    flat = ends.reshape(-1)
    voxels = packed.reshape(-1, 4)
    threshold = np.float32(threshold_units)
    for i in range(len(flat)):
        if flat[i] > 0 and np.float32(voxels[i, 3]) > threshold:
            counts[flat[i]] += np.uint32(1)


@njit(cache=True, nogil=True)
def _densities(
    counts: NDArray[np.uint32], shape: tuple[int, int, int], bins: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Count end points around each of the given bins, with weights 1 2 1 on each axis."""
    densities = np.zeros(len(bins), np.int64)
    for i in range(len(bins)):
        z, rest = divmod(bins[i], shape[1] * shape[2])
        y, x = divmod(rest, shape[2])
        total = 0
        for nz in range(max(z - 1, 0), min(z + 2, shape[0])):
            for ny in range(max(y - 1, 0), min(y + 2, shape[1])):
                for nx in range(max(x - 1, 0), min(x + 2, shape[2])):
                    weight = (2 - abs(nz - z)) * (2 - abs(ny - y)) * (2 - abs(nx - x))
                    total += weight * np.int64(counts[(nz * shape[1] + ny) * shape[2] + nx])
        densities[i] = total
    return densities


@njit(cache=True, nogil=True)
def _parents(
    rank: NDArray[np.uint32],
    densities: NDArray[np.int64],
    shape: tuple[int, int, int],
    bins: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Find the densest bin around each bin; `rank` holds 1 + a bin's place in `bins`, 0 for empty bins.

    Of equally dense bins the one that comes first is taken, so links never form a circle.
    """
    parents = np.empty(len(bins), np.int64)
    for i in range(len(bins)):
        z, rest = divmod(bins[i], shape[1] * shape[2])
        y, x = divmod(rest, shape[2])
        best: Any = i
        for k in range(len(offsets)):
            nz = z + offsets[k, 0]
            ny = y + offsets[k, 1]
            nx = x + offsets[k, 2]
            if 0 <= nz < shape[0] and 0 <= ny < shape[1] and 0 <= nx < shape[2]:
                other = np.int64(rank[(nz * shape[1] + ny) * shape[2] + nx]) - 1
                if other >= 0 and (
                    densities[other] > densities[best]
                    or (densities[other] == densities[best] and other < best)
                ):
                    best = other
        parents[i] = best
    return parents


def _number_roots(parents: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Number the roots of a forest 1, 2, ... and give every member the number of its root."""
    roots = parents
    while (roots[roots] != roots).any():
        roots = roots[roots]
    return np.cumsum(parents == np.arange(len(parents)), dtype=np.uint32)[roots]


def _group_sinks(ends: NDArray[np.uint32], packed: NDArray[np.int16], paths: Paths) -> None:
    """Replace, in place, 1 + the bin of every voxel's end point (0: background) by the number of its sink."""
    table = np.zeros(1 + int(np.prod(paths.bins)), np.uint32)
    _count(ends, packed, paths.threshold, table)
    counts = table[1:]
    bins = np.flatnonzero(counts).astype(np.int64)
    densities = _densities(counts, paths.bins, bins)
    counts[bins] = np.arange(1, len(bins) + 1, dtype=np.uint32)
    counts[bins] = _number_roots(_parents(counts, densities, paths.bins, bins, paths.offsets))
    renumber_labels(ends, table)


_PLANE_DEPTH = 1e4
"""Depth, in pixels, given to a lone plane: so deep that no heat is lost through it."""


def label_flows(
    flows: FlowField | DeviceField, shape: tuple[int, ...], settings: SegmentationSettings
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Bring a flow to labels on the image's grid: followed in 3D, or (mode ``stitch``) plane by plane.

    Labels are uint32 of the image's shape (z, y, x), 1..n without gaps; scores float32 (n + 1,) by label.
    """
    diameter_um = settings.nucleus_diameter_um
    labels: Labels
    if settings.mode == "stitch":
        flows = flows.fetch()
        planes = _label_planes(flows, diameter_um, settings.masks)
        labels = stitch_planes(planes, settings.stitch_min_iou, settings.stitch_max_gap)
        bounds_um3 = settings.masks.bounds_um3(diameter_um)
        scores = _finish(labels, flows, bounds_um3, settings.masks)
    else:
        labels, scores = _label_field(flows, diameter_um, settings.masks)
    if labels.shape != tuple(shape):
        if isinstance(labels, Tensor):
            labels = device.resize_labels(labels, shape)
        else:
            labels = resize_labels(labels, shape)
        voxels = box_labels(labels).voxels
        present = np.zeros(len(scores), np.bool_)
        present[: len(voxels)] = voxels > 0
        present[0] = True
        keep_labels(labels, present)
        scores = scores[present]
    return fetch_labels(labels), scores


def _label_planes(flows: FlowField, diameter_um: float, settings: MaskSettings) -> NDArray[np.uint32]:
    planes = np.zeros(flows.shape, np.uint32)

    def segment(z: int) -> None:
        flow, logit = flows.unpack((slice(z, z + 1), slice(None), slice(None)))
        planes[z] = masks_2d_from_flows(flow[1:, 0], logit[0], diameter_um / flows.voxel_size.x, settings)

    with ThreadPoolExecutor(available_threads()) as pool:
        list(pool.map(segment, range(len(planes))))
    return planes


def masks_from_field(
    field: FlowField | DeviceField,
    nucleus_diameter_um: float,
    settings: MaskSettings,
    *,
    threads: int | None = None,
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Segment nuclei from their flow, with all processors unless `threads` are given.

    Labels are uint32 (Z, Y, X), nuclei 1..n, each one 6-connected piece without holes; scores, in 0..1 by
    label, float32 (n + 1,).
    """
    labels, scores = _label_field(field, nucleus_diameter_um, settings, threads)
    return fetch_labels(labels), scores


def _label_field(
    field: FlowField | DeviceField,
    nucleus_diameter_um: float,
    settings: MaskSettings,
    threads: int | None = None,
) -> tuple[Labels, NDArray[np.float32]]:
    if not (np.isfinite(nucleus_diameter_um) and nucleus_diameter_um > 0):
        raise InputError(f"dynamics: the nucleus diameter must be positive, got {nucleus_diameter_um} um")
    labels = _sink_of_each_voxel(field, nucleus_diameter_um, settings, threads)
    bounds_um3 = settings.bounds_um3(nucleus_diameter_um)
    return labels, _finish(labels, field, bounds_um3, settings, threads)


def _finish(
    labels: Labels,
    field: FlowField | DeviceField,
    bounds_um3: tuple[float, float],
    settings: MaskSettings,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """Finish labels in place (`masks.finish_labels`): what lies above the threshold, then the outlines."""
    if min(settings.outline_thresholds) >= settings.cellprob_threshold:
        return finish_labels(labels, field, bounds_um3, settings.score_threshold, threads)
    found: Any = field.packed[..., LOGIT] > settings.cellprob_threshold * LOGIT_UNITS
    core: Labels = labels * found
    scores = finish_labels(core, field, (0.0, np.inf), settings.score_threshold, threads)
    return grow_labels(labels, core, scores, np.array(bounds_um3) / field.voxel_size.volume_um3, threads)


def masks_2d_from_flows(
    flow: NDArray[np.floating[Any]],
    logit: NDArray[np.floating[Any]],
    diameter_px: float,
    settings: MaskSettings,
) -> NDArray[np.uint32]:
    """Segment the nuclei of one plane by the same dynamics, for stitching: labels (Y, X), 1..n.

    `flow` (2, Y, X) is the direction to the centre (y, x). Bounds of the volume do not apply to a plane: they
    are for the stitched nucleus. Works in one thread.
    """
    volume_flow = np.zeros((3, 1, *logit.shape), np.float32)
    volume_flow[1:, 0] = flow
    plane = VoxelSize(_PLANE_DEPTH, 1.0, 1.0)
    field = FlowField.of(volume_flow, logit[np.newaxis], plane, 1)
    labels = _sink_of_each_voxel(field, diameter_px, settings, 1)
    min_pixels = settings.min_volume_fraction * np.pi / 4 * diameter_px**2
    bounds = (min_pixels * plane.volume_um3, np.inf)
    _finish(labels, field, bounds, settings, 1)
    return np.asarray(labels[0])


def _sink_of_each_voxel(
    field: FlowField | DeviceField, diameter_um: float, settings: MaskSettings, threads: int | None
) -> Labels:
    """Label every foreground voxel with the number of the sink that it flows to."""
    paths = plan_paths(field.shape, field.voxel_size, diameter_um, settings)
    if isinstance(field, DeviceField):
        return device.label_sinks(field, paths)
    packed, threads = field.packed, available_threads() if threads is None else threads
    ends = np.empty(field.shape, np.uint32)
    edges = np.array(field.voxel_size.zyx, np.float32)
    bin_edges = np.full(3, paths.bin_um, np.float32)

    def run(start: int, stop: int) -> int:
        steps = (paths.step_um, paths.smallest_step_um, paths.rounds)
        threshold, outline, bins = paths.threshold, paths.outline, paths.bins
        return int(_follow(packed, threshold, outline, edges, *steps, bin_edges, bins, ends, start, stop))

    slabs = np.linspace(0, len(ends), min(len(ends), 8 * threads) + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:
        foreground = sum(pool.map(run, slabs[:-1], slabs[1:]))
    if foreground > 0:
        _group_sinks(ends, packed, paths)
    return ends
