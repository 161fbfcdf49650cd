"""Volumes and labels on grids of voxels: resampling, boxes and outlines of labels.

Resampling puts voxel centres at half-integer positions (``align_corners=False``): voxel ``i`` of ``n`` covers
the interval ``[i / n, (i + 1) / n]`` of the box, so that nothing shifts when the grid changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter, shift

from nuclei3d.images.voxel_size import VoxelSize


def isotropic_shape(shape: Sequence[int], voxel_size: VoxelSize, voxel_um: float) -> tuple[int, int, int]:
    """Give the shape (z, y, x) of the grid of cubic voxels, of edge `voxel_um`, that covers the same box."""
    z, y, x = (
        max(1, round(size * edge / voxel_um)) for size, edge in zip(shape, voxel_size.zyx, strict=True)
    )
    return z, y, x


def resize_linear(volume: NDArray[np.generic], shape: Sequence[int]) -> NDArray[np.float32]:
    """Resample an image, of any real dtype and number of axes, to another number of voxels, linearly; a copy.

    Along an axis that grows the values are interpolated linearly between voxel centres and held constant
    beyond the outermost ones. Along an axis that shrinks each new voxel is the mean of the old ones that
    it covers, parts weighted by their length, so that noise is averaged and nothing is aliased; at exactly
    half the size this is the same as linear interpolation.
    """
    result = resize_tensor(torch.from_numpy(np.array(volume, dtype=np.float32)), shape)
    return np.ascontiguousarray(result.numpy())


def resize_tensor(volume: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Resample a float32 tensor as `resize_linear` does, on its device; where nothing changes, the same."""
    # Shrinking axes first keeps the intermediate arrays small.
    for axis in sorted(range(volume.ndim), key=lambda axis: shape[axis] / volume.shape[axis]):
        if volume.shape[axis] != shape[axis]:
            volume = _resize_axis(volume, axis, shape[axis])
    return volume


def resize_nearest(labels: NDArray[np.generic], shape: Sequence[int]) -> NDArray[np.generic]:
    """Resample labels of any shape and dtype; each new voxel takes the old one at its centre. A copy."""
    result = labels
    for axis, (old, new) in enumerate(zip(labels.shape, shape, strict=True)):
        if old != new:
            # Integers throughout: floating point would round some exact ties down and some up.
            centres = (2 * np.arange(new, dtype=np.int64) + 1) * old // (2 * new)
            result = np.take(result, centres, axis=axis)
    return np.array(result, copy=result is labels, order="C")


def resize_labels(labels: NDArray[np.uint32], shape: Sequence[int]) -> NDArray[np.uint32]:
    """Resample labels (z, y, x): each new voxel takes the label that trilinear weights favour. A copy.

    Outlines come out smoother than by `resize_nearest`. Axes that shrink take the old voxel at their centre.
    """
    larger = [max(old, new) for old, new in zip(labels.shape, shape, strict=True)]
    z, y, x = (linear_taps(old, new) for old, new in zip(labels.shape, larger, strict=True))
    result = np.empty(larger, np.uint32)
    _vote(np.ascontiguousarray(labels), z[0][:2], y[0][:2], x[0][:2], z[1][:2], y[1][:2], x[1][:2], result)
    return np.asarray(resize_nearest(result, shape), np.uint32)


@njit(cache=True, nogil=True)
def _vote(
    labels: NDArray[np.uint32],
    taps_z: NDArray[np.intp],
    taps_y: NDArray[np.intp],
    taps_x: NDArray[np.intp],
    weights_z: NDArray[np.float32],
    weights_y: NDArray[np.float32],
    weights_x: NDArray[np.float32],
    result: NDArray[np.uint32],
) -> None:
    names = np.empty(8, np.uint32)
    votes = np.empty(8, np.float32)
    for z in range(result.shape[0]):
        for y in range(result.shape[1]):
            for x in range(result.shape[2]):
                known = 0
                for corner in range(8):
                    i, j, k = corner >> 2, (corner >> 1) & 1, corner & 1
                    name = labels[taps_z[i, z], taps_y[j, y], taps_x[k, x]]
                    weight = weights_z[i, z] * weights_y[j, y] * weights_x[k, x]
                    at = 0
                    while at < known and names[at] != name:
                        at += 1
                    if at == known:
                        names[known] = name
                        votes[known] = 0.0
                        known += 1
                    votes[at] += weight
                result[z, y, x] = names[np.argmax(votes[:known])]


def linear_taps(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Give the old voxels that make up each new one along an axis, and their weights: (taps, new), sum 1."""
    scale = old / new
    if scale <= 1:
        centre = np.clip((np.arange(new) + 0.5) * scale - 0.5, 0, old - 1)
        lower = np.minimum(centre.astype(np.intp), max(old - 2, 0))
        fraction = (centre - lower).astype(np.float32)
        return np.stack([lower, np.minimum(lower + 1, old - 1)]), np.stack([1 - fraction, fraction])
    start = np.arange(new) * scale
    first = np.floor(start + 1e-9).astype(np.intp)
    taps = first + np.arange(int(np.ceil(scale)) + 1)[:, None]
    covered = np.minimum(taps + 1, start + scale) - np.maximum(taps, start)
    weights = np.maximum(covered, 0)
    weights /= weights.sum(axis=0)
    return np.minimum(taps, old - 1), weights.astype(np.float32)


def _resize_axis(volume: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    indices, weights = linear_taps(volume.shape[axis], size)
    along = [1] * volume.ndim
    along[axis] = size
    result: torch.Tensor | None = None
    for index, weight in zip(indices, weights, strict=True):
        if not weight.any():
            continue
        there = torch.from_numpy(index).to(volume.device)
        part = volume.index_select(axis, there).mul_(torch.from_numpy(weight).view(along).to(volume.device))
        result = part if result is None else result.add_(part)
    assert result is not None
    return result


def shift_labels(
    labels: NDArray[np.uint32], shift_um: Sequence[float], voxel_size: VoxelSize
) -> NDArray[np.uint32]:
    """Move labels (z, y, x) by (z, y, x) um, by parts of a voxel too; nuclei that a border cuts go on there.

    What moves is each label's signed distance to its surface (Raya and Udupa 1990), smoothed, for a vote of
    neighbours leaves flat faces where they are up to half a voxel, and then moves them by a whole one. A
    label inside keeps its number of voxels; where two come to lie, the one that is deeper there stays.
    """
    names, places = np.unique(labels, return_inverse=True)
    if len(names) == 1:
        return labels.copy()
    edges = voxel_size.zyx
    voxels = [way / edge for way, edge in zip(shift_um, edges, strict=True)]
    margin = [2 + ceil(abs(way)) for way in voxels]
    numbers = places.reshape(labels.shape) + (0 if names[0] == 0 else 1)
    result = np.zeros(labels.shape, np.uint32)
    deepest = np.zeros(labels.shape, np.float32)
    for name, (number, box) in zip(names[names > 0], enumerate(find_objects(numbers), 1), strict=True):
        around = tuple(slice(max(b.start - m, 0), b.stop + m) for b, m in zip(box, margin, strict=True))
        own = numbers[around] == number
        depth = distance_transform_edt(own, edges) - distance_transform_edt(~own, edges)
        moved = shift(gaussian_filter(depth, 1.0, mode="nearest"), voxels, order=3, mode="nearest")
        count = np.count_nonzero(shift(own.view(np.uint8), voxels, order=0, mode="nearest"))
        if count == 0:
            continue
        moved -= np.partition(moved, -count, axis=None)[-count]
        here = (moved >= 0) & ((moved > deepest[around]) | (result[around] == 0))
        result[around][here] = name
        deepest[around][here] = moved[here]
    return result


@dataclass(frozen=True)
class LabelBoxes:
    """Where each label of a volume lies: a row for each label, undefined for those without voxels.

    `boxes`, int32 (n + 1, 6), are first and last index on z, y and x; `voxels`, int64 (n + 1,), the number of
    voxels of each label, that of the background being 0.
    """

    boxes: NDArray[np.int32]
    voxels: NDArray[np.int64]


@njit(cache=True, nogil=True)
def _scan(labels: NDArray[np.uint32], boxes: NDArray[np.int32], voxels: NDArray[np.int64]) -> None:
    depth, height, width = labels.shape
    boxes[:, 0::2] = 2**31 - 1
    boxes[:, 1::2] = -1
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                label = labels[z, y, x]
                if label != 0:
                    box = boxes[label]
                    voxels[label] += 1
                    box[0] = min(box[0], z)
                    box[1] = max(box[1], z)
                    box[2] = min(box[2], y)
                    box[3] = max(box[3], y)
                    box[4] = min(box[4], x)
                    box[5] = max(box[5], x)


def find_boxes(labels: NDArray[np.uint32]) -> LabelBoxes:
    """Find the box and the size of every label in one pass over a volume (Z, Y, X)."""
    count = int(labels.max(initial=0)) + 1
    boxes = np.empty((count, 6), np.int32)
    voxels = np.zeros(count, np.int64)
    _scan(labels, boxes, voxels)
    return LabelBoxes(boxes, voxels)


def compact_labels(labels: NDArray[np.integer[Any]]) -> NDArray[np.uint32]:
    """Give labels as contiguous uint32; numbers far above the number of voxels are renumbered.

    Negative numbers become background. Tables by label number stay small after this.
    """
    highest = int(labels.max(initial=0))
    if highest > max(labels.size, 2**16):
        values, inverse = np.unique(np.maximum(labels, 0), return_inverse=True)
        first = 0 if values[0] == 0 else 1
        return np.ascontiguousarray(inverse.reshape(labels.shape) + first, dtype=np.uint32)
    if np.issubdtype(labels.dtype, np.signedinteger) and int(labels.min(initial=0)) < 0:
        labels = np.maximum(labels, 0)
    return np.ascontiguousarray(labels, dtype=np.uint32)


def available_threads() -> int:
    """Count the processors that this process may use, or fewer if NUMBA_NUM_THREADS says so."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wished = os.environ.get("NUMBA_NUM_THREADS", "")
    return min(usable, int(wished)) if wished.isdecimal() and int(wished) > 0 else usable


def share_labels(
    work: Callable[[NDArray[np.int64]], Any], where: LabelBoxes, threads: int | None = None
) -> None:
    """Run `work` on groups of labels in threads; the kernels that it calls must release the GIL.

    Plain threads instead of numba's own: they may be started from any number of threads (Dask) and
    survive a fork. Labels are dealt out by size, so that no thread is left with the largest at the end.
    """
    chosen = np.flatnonzero(where.voxels).astype(np.int64)
    threads = available_threads() if threads is None else threads
    if threads <= 1 or len(chosen) <= 1:
        work(chosen)
        return
    ordered = chosen[np.argsort(-where.voxels[chosen], kind="stable")]
    groups = [ordered[start :: 4 * threads] for start in range(min(4 * threads, len(ordered)))]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, groups))


def trace_outlines(plane: NDArray[np.integer[Any]]) -> list[tuple[int, NDArray[np.float32]]]:
    """Trace the labels of a plane (Y, X) as polygons, in the order of the labels.

    A label in several pieces has several polygons. A polygon is (n, 2), x before y, in the coordinates of
    ImageJ: the first pixel covers 0 to 1, its centre is at 0.5. It holds the centres of exactly the pixels of
    its piece and of the holes therein.
    """
    from skimage.measure import find_contours, regionprops

    outlines = []
    # tables by label number stay small, whatever the numbers
    numbers, places = np.unique(plane, return_inverse=True)
    shift = 0 if numbers.size and numbers[0] == 0 else 1
    compact = places.reshape(plane.shape).astype(np.int32) + shift
    for region in regionprops(compact):  # type: ignore[no-untyped-call]
        # level 0.5 runs half way between a pixel inside and one outside; the padding closes it at the border
        padded = np.pad(region.image, 1).astype(np.float32)
        contours = find_contours(padded, 0.5, fully_connected="high")  # type: ignore[no-untyped-call]
        top, left = region.bbox[:2]
        for contour in contours:
            polygon = contour[:-1, ::-1] - 0.5 + (left, top)
            # the signed area is negative around holes, which are traced the other way
            x, y = polygon.T
            if np.dot(x, np.roll(y, -1)) > np.dot(y, np.roll(x, -1)):
                outlines.append((int(numbers[region.label - shift]), polygon.astype(np.float32)))
    return outlines
