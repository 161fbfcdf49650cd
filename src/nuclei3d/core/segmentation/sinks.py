"""Grouping of end points into sinks, by physical distance.

End points are counted in bins of equal physical size. Every bin that holds some looks for the densest bin
within a given distance and becomes its child (quick shift, Vedaldi and Soatto, ECCV 2008); a bin that is the
densest around is a sink, and all its descendants belong to it. No end point is left over, none is
handled one by one, and two sinks are two only if they lie further apart than that distance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.core.segmentation.trajectories import BinGrid


@njit(cache=True, nogil=True)
def _count(ends: NDArray[np.uint32], counts: NDArray[np.uint32]) -> None:
    flat = ends.reshape(-1)
    for i in range(len(flat)):
        if flat[i] > 0:
            counts[flat[i] - 1] += np.uint32(1)


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


@njit(cache=True, nogil=True)
def _number_roots(parents: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Number the roots of a forest 1, 2, ... and give every member the number of its root."""
    numbers = np.zeros(len(parents), np.uint32)
    following = np.uint32(0)
    for i in range(len(parents)):
        if parents[i] == i:
            following += np.uint32(1)
            numbers[i] = following
    for i in range(len(parents)):
        root = i
        while parents[root] != root:
            root = parents[root]
        at = i
        while parents[at] != root:
            parents[at], at = root, parents[at]
        numbers[i] = numbers[root]
    return numbers


@njit(cache=True, nogil=True)
def _replace(ends: NDArray[np.uint32], table: NDArray[np.uint32]) -> None:
    flat = ends.reshape(-1)
    for i in range(len(flat)):
        if flat[i] > 0:
            flat[i] = table[flat[i] - 1]


def group_sinks(ends: NDArray[np.uint32], grid: BinGrid, radius_um: float) -> int:
    """Replace, in place, the bin of every voxel's end point by the number of its sink.

    Parameters
    ----------
    ends : uint32 array, shape (Z, Y, X)
        1 + the flat index of the bin of the voxel's end point, 0 for background; overwritten by 1..n.
    grid : BinGrid
        The bins.
    radius_um : float
        Sinks closer than this to a denser one are part of it.

    Returns
    -------
    int
        The number n of sinks.
    """
    counts = np.zeros(int(np.prod(grid.shape)), np.uint32)
    _count(ends, counts)
    bins = np.flatnonzero(counts).astype(np.int64)
    if len(bins) == 0:
        return 0
    densities = _densities(counts, grid.shape, bins)
    edges = np.array(grid.edges_um)
    reach = np.floor(radius_um / edges).astype(int)
    around = np.argwhere(np.ones(2 * reach + 1, bool)) - reach
    offsets = around[((around * edges) ** 2).sum(1) <= radius_um**2].astype(np.int64)
    counts[bins] = np.arange(1, len(bins) + 1, dtype=np.uint32)
    parents = _parents(counts, densities, grid.shape, bins, offsets)
    numbers = _number_roots(parents)
    counts[bins] = numbers
    _replace(ends, counts)
    return int(numbers.max())
