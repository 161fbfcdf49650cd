"""Stitching: 2D masks of successive planes linked into 3D nuclei.

A mask is linked to the mask of the next plane with which it overlaps, one to one, so that the sum of the
IoUs of all links is the highest possible (optimal assignment on the sparse table of overlaps). A mask
that finds no partner there may find one a plane or more further on; the missing plane is then
filled by the shape halfway between the two, so that no label ever lies on separate pieces. Across a
missing plane the masks must be alike and neither may be the tapering end of its nucleus: else every
nucleus would be joined to the next one above it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.errors import InputError

MIN_IOU_ACROSS_GAP = 0.5
"""Least IoU of two masks with a missing plane between them, if `min_iou` asks for less."""

MIN_AREA_AT_GAP = 0.5
"""Least area of a mask next to a missing plane, as a fraction of the largest mask of its nucleus."""


@dataclass(frozen=True)
class _Overlaps:
    """Pairs of overlapping masks of two planes: their numbers and their IoU."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    iou: NDArray[np.float64]


def stitch_planes(
    planes: NDArray[np.integer[Any]], min_iou: float = 0.25, max_gap: int = 1
) -> NDArray[np.uint32]:
    """Link the masks of successive planes.

    Parameters
    ----------
    planes : integer array, shape (Z, Y, X)
        Labels of each plane on its own; equal numbers in different planes mean nothing. A 2D label on
        several pieces counts as several masks.
    min_iou : float
        Masks are linked if their IoU is at least this.
    max_gap : int
        Number of successive planes in which a nucleus may be missing.

    Returns
    -------
    uint32 array, shape (Z, Y, X)
        3D labels 1..n, each one 6-connected piece.

    Raises
    ------
    InputError
        If `planes` is not a volume of integers or a parameter is out of range.
    """
    if planes.ndim != 3 or not np.issubdtype(planes.dtype, np.integer):
        raise InputError(
            f"stitching: expected integer labels (Z, Y, X), got {planes.dtype} of shape {planes.shape}"
        )
    if not 0 < min_iou <= 1 or max_gap < 0:
        raise InputError(
            f"stitching: expected 0 < min_iou <= 1 and max_gap >= 0, got {min_iou:g} and {max_gap}"
        )
    labels, runs = _link_neighbours(planes, min_iou)
    origin = np.arange(len(runs.first))
    for gap in range(1, max_gap + 1):
        _link_across(labels, runs, origin, gap, max(min_iou, MIN_IOU_ACROSS_GAP))
    # Runs are numbered from bottom to top, so the root of a run is settled before those that continue it.
    for run in range(1, len(origin)):
        origin[run] = origin[origin[run]]
    _, names = np.unique(origin, return_inverse=True)
    return np.asarray(names.astype(np.uint32)[labels])


@dataclass(frozen=True)
class _Runs:
    """Masks linked over neighbouring planes, one entry for each label; entry 0 is the background.

    First and last plane, the area of the masks there, and the area of the largest mask.
    """

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    first_area: NDArray[np.int64]
    last_area: NDArray[np.int64]
    largest_area: NDArray[np.int64]


def _link_neighbours(planes: NDArray[np.integer[Any]], min_iou: float) -> tuple[NDArray[np.uint32], _Runs]:
    """Link the masks of each plane to those of the next one."""
    labels = np.zeros(planes.shape, np.uint32)
    first: list[int] = [-1]
    last: list[int] = [-1]
    areas: list[list[int]] = [[0]]
    for z in range(planes.shape[0]):
        masks, count = _separate_masks(planes[z])
        names = np.zeros(count + 1, np.uint32)
        if z:
            for run, mask in _assign(_overlaps(labels[z - 1], masks, min_iou)):
                names[mask] = run
        for mask in range(1, count + 1):
            if names[mask] == 0:
                names[mask] = len(first)
                first.append(z)
                last.append(z)
                areas.append([])
        for run, area in zip(names[1:], np.bincount(masks.ravel(), minlength=count + 1)[1:], strict=True):
            last[run] = z
            areas[run].append(int(area))
        labels[z] = names[masks]
    ends = np.array([(a[0], a[-1], max(a)) for a in areas])
    return labels, _Runs(np.array(first), np.array(last), ends[:, 0], ends[:, 1], ends[:, 2])


def _link_across(
    labels: NDArray[np.uint32], runs: _Runs, origin: NDArray[np.int64], gap: int, min_iou: float
) -> None:
    """Join runs that end to runs that start after `gap` planes, and fill the planes between.

    `origin` gives for each run the run below that it continues, or itself; it is updated.
    """
    continued = np.zeros(len(origin), bool)
    continued[origin[origin != np.arange(len(origin))]] = True
    ending = ~continued & (runs.last_area >= MIN_AREA_AT_GAP * runs.largest_area)
    starting = (origin == np.arange(len(origin))) & (runs.first_area >= MIN_AREA_AT_GAP * runs.largest_area)
    for before in range(labels.shape[0] - gap - 1):
        after = before + gap + 1
        from_below = ending & (runs.last == before)
        from_above = starting & (runs.first == after)
        if not from_below.any() or not from_above.any():
            continue
        below = np.where(from_below[labels[before]], labels[before], 0)
        above = np.where(from_above[labels[after]], labels[after], 0)
        for low, high in _assign(_overlaps(below, above.astype(np.int64), min_iou)):
            if _bridge(labels, above == high, low, before, after):
                origin[high] = low


def _separate_masks(plane: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], int]:
    """Number the 4-connected pieces of all labels of a plane 1..n."""
    from skimage.measure import label as label_pieces

    masks, count = label_pieces(np.maximum(plane, 0), background=0, connectivity=1, return_num=True)  # type: ignore[no-untyped-call]
    return masks.astype(np.int64), int(count)


def _overlaps(first: NDArray[np.uint32], second: NDArray[np.int64], min_iou: float) -> _Overlaps:
    """List the pairs of masks that overlap with at least `min_iou`, from one pass over the pixels."""
    a = first.ravel().astype(np.int64)
    b = second.ravel()
    size_a = np.bincount(a)
    size_b = np.bincount(b)
    both = (a > 0) & (b > 0)
    keys, shared = np.unique(a[both] * len(size_b) + b[both], return_counts=True)
    pair_a, pair_b = np.divmod(keys, len(size_b))
    iou = shared / (size_a[pair_a] + size_b[pair_b] - shared)
    good = iou >= min_iou
    return _Overlaps(pair_a[good], pair_b[good], iou[good])


def _assign(table: _Overlaps) -> list[tuple[int, int]]:
    """Choose pairs, each mask at most once, with the highest sum of IoUs.

    Groups of masks that overlap directly or through others are independent of each other and small, so the
    assignment is solved group by group; a pair that competes with no other needs no solving.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    first, a = np.unique(table.first, return_inverse=True)
    second, b = np.unique(table.second, return_inverse=True)
    total = len(first) + len(second)
    graph = coo_matrix((np.ones(len(a)), (a, b + len(first))), (total, total))
    groups = connected_components(graph, directed=False)[1][a] if len(a) else np.zeros(0, int)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    chosen: list[tuple[int, int]] = []
    for pairs in np.split(order, starts[1:]):
        if len(pairs) == 0:
            continue
        rows, i = np.unique(a[pairs], return_inverse=True)
        columns, j = np.unique(b[pairs], return_inverse=True)
        gain = np.zeros((len(rows), len(columns)))
        gain[i, j] = table.iou[pairs]
        for row, column in zip(*linear_sum_assignment(gain, maximize=True), strict=True):
            if gain[row, column] > 0:
                chosen.append((int(first[rows[row]]), int(second[columns[column]])))
    return chosen


def _bridge(labels: NDArray[np.uint32], mask: NDArray[np.bool_], label: int, before: int, after: int) -> bool:
    """Fill the planes between two masks of one nucleus; False, and nothing filled, if others are in the way.

    Each plane gets the shape whose signed distance is the mean of those of the two masks, weighted by
    nearness, where it is free. The pixels that all planes share must include one
    common to both masks: through it the pieces are connected.
    """
    from scipy.ndimage import distance_transform_edt
    from skimage.measure import label as label_pieces

    old = labels[before] == label
    rows, columns = np.nonzero(old | mask)
    box = (
        slice(max(rows.min() - 1, 0), rows.max() + 2),
        slice(max(columns.min() - 1, 0), columns.max() + 2),
    )
    old, new = old[box], mask[box]
    free = (labels[before + 1 : after][(slice(None), *box)] == 0).all(0)
    through = old & new & free
    if not through.any():
        return False
    depths = [
        distance_transform_edt(np.pad(m, 1))[1:-1, 1:-1] - distance_transform_edt(~m) for m in (old, new)
    ]
    for z in range(before + 1, after):
        nearness = (z - before) / (after - before)
        shape = ((1 - nearness) * depths[0] + nearness * depths[1] > 0) & (labels[z][box] == 0) | through
        pieces = label_pieces(shape, background=0, connectivity=1)  # type: ignore[no-untyped-call]
        # Keep what hangs together with the common pixels; the rest would be a piece of its own.
        shape &= np.isin(pieces, np.unique(pieces[through]))
        labels[z][box][shape] = label
    return True
