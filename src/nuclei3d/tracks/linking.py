"""Nuclei linked from frame to frame, over gaps, and over divisions, by two assignments of least cost.

As Jaqaman et al. (Nature Methods 5:695, 2008): first every frame to the next; then the starts of the pieces
to the ends of others (a gap) or to a mother (a division). A division is judged on all three of its nuclei:
how far the middle of the daughters lies from the mother, how alike they are in volume, and how much smaller
and brighter than the mother was.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.spatial import KDTree

from nuclei3d.config.sections import TracksParams
from nuclei3d.tracks.motion import follow_motion
from nuclei3d.tracks.nuclei import Floats, Integers, Nuclei, Tracks

# Before it divides a nucleus condenses for a frame or two: what it was is judged by more frames than that.
_HISTORY_FRAMES = 5


@dataclass(frozen=True)
class _Looks:
    """What nuclei are compared by, without units.

    place
        (n, 3) in diameters of the typical nucleus, the embryo's motion taken away.
    size
        Logarithm of the volume.
    light
        Intensity against the median of the frame, in units of its spread, on a scale that flattens far out; 0
        where it is not known.
    """

    place: Floats
    size: Floats
    light: Floats

    @classmethod
    def of(cls, nuclei: Nuclei, remove_motion: bool) -> _Looks:
        diameter, rows = nuclei.diameter_um, nuclei.rows_by_frame()
        places = [nuclei.position_um[own] for own in rows]
        if remove_motion:
            motions = follow_motion(places, diameter)
            places = [motion(own) for motion, own in zip(motions, places, strict=True)]
        light = np.zeros(len(nuclei))
        for own in rows:
            intensity = nuclei.intensity[own]
            if np.isfinite(intensity).sum() > 2:
                middle = np.nanmedian(intensity)
                spread = 1.4826 * np.nanmedian(np.abs(intensity - middle))
                light[own] = np.arcsinh((intensity - middle) / max(spread, 1e-9))
        return cls(np.concatenate(places) / diameter, np.log(nuclei.volume_um3), np.nan_to_num(light))


def link_nuclei(nuclei: Nuclei, params: TracksParams) -> Tracks:
    """Link the nuclei of a time-lapse."""
    predecessor = np.full(len(nuclei), -1, np.int64)
    if not len(nuclei):
        return Tracks(nuclei, predecessor)
    looks = _Looks.of(nuclei, params.remove_motion)
    rows = nuclei.rows_by_frame()
    for before, after in pairwise(rows):
        if before.start < before.stop and after.start < after.stop:
            first, second = _link_frames(looks, before, after, params)
            predecessor[after.start + second] = before.start + first
    _join_pieces(nuclei, looks, predecessor, params)
    return Tracks(nuclei, predecessor)


def _link_frames(
    looks: _Looks, before: slice, after: slice, params: TracksParams
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Pairs of nuclei of two frames whose costs sum to the least; dearer than the limit is not linked."""
    rows = np.arange(before.start, before.stop)[:, None], np.arange(after.start, after.stop)[None]
    cost = _link_cost(looks, *rows, params)
    limit = params.max_step**2
    first, second = linear_sum_assignment(np.minimum(cost, limit))
    linked = cost[first, second] < limit
    return first[linked], second[linked]


def _join_pieces(nuclei: Nuclei, looks: _Looks, predecessor: Integers, params: TracksParams) -> None:
    """Give the starts of pieces an origin, in place: the end of another piece, a mother, or none."""
    frame = nuclei.frame
    successor, lasting = _follow(predecessor, frame, params.daughter_frames)
    starts = np.flatnonzero((predecessor < 0) & (frame > 0))
    ends = np.flatnonzero(successor < 0)
    linked = np.flatnonzero(successor >= 0)
    found: list[tuple[Integers, Integers, Floats]] = []
    rows = nuclei.rows_by_frame()
    for gap in range(2, params.max_gap + 2):
        origin, start = _near(looks.place, rows, ends, starts, gap, params.max_step)
        # 1 is the limit, as for divisions
        found.append((origin, start, _link_cost(looks, origin, start, params) / params.max_step**2))
    origin, start = _near(looks.place, rows, linked, starts, 1, params.division_distance)
    origin, start = origin[lasting[start]], start[lasting[start]]
    first = successor[origin]
    cost = _division_cost(looks, predecessor, origin, first, start, params) / params.division_limit
    # the piece that fell off a nucleus was taken for its next, which lasts and has no origin
    stub = ~lasting[first]
    cost[stub] = _link_cost(looks, origin[stub], start[stub], params) / params.max_step**2
    found.append((origin, start, cost))
    origin, start, cost = (np.concatenate(part) for part in zip(*found, strict=True))
    for one, other in _cheapest(origin[cost < 1], start[cost < 1], cost[cost < 1]):
        if successor[one] >= 0 and not lasting[successor[one]]:
            predecessor[successor[one]] = -1
        predecessor[other] = one


def _follow(predecessor: Integers, frame: Integers, least: int) -> tuple[Integers, NDArray[np.bool_]]:
    """Give each row's successor (-1: none), and whether its piece lasts so many frames or to the end."""
    successor = np.full(len(predecessor), -1, np.int64)
    linked = np.flatnonzero(predecessor >= 0)
    successor[predecessor[linked]] = linked
    at = np.arange(len(predecessor))
    lasting = np.ones(len(predecessor), np.bool_)
    for _ in range(least - 1):
        lasting &= (successor[at] >= 0) | (frame[at] == frame[-1])
        at = np.where(successor[at] >= 0, successor[at], at)
    return successor, lasting


def _link_cost(looks: _Looks, one: Integers, other: Integers, params: TracksParams) -> Floats:
    """Cost of taking two nuclei for one, in squared diameters."""
    cost = ((looks.place[one] - looks.place[other]) ** 2).sum(axis=-1)
    cost += params.volume_weight * (looks.size[one] - looks.size[other]) ** 2
    cost += params.intensity_weight * (looks.light[one] - looks.light[other]) ** 2
    return np.asarray(cost)


def _near(
    place: Floats, rows: list[slice], origins: Integers, starts: Integers, gap: int, reach: float
) -> tuple[Integers, Integers]:
    """Pairs of an origin and a start that lie `gap` frames later and at most `reach` apart."""
    pairs: list[tuple[int, int]] = []
    for time in range(len(rows) - gap):
        before, after = rows[time], rows[time + gap]
        own = origins[np.searchsorted(origins, before.start) : np.searchsorted(origins, before.stop)]
        new = starts[np.searchsorted(starts, after.start) : np.searchsorted(starts, after.stop)]
        if len(own) and len(new):
            close = KDTree(place[own]).query_ball_point(place[new], reach)
            pairs += [(int(own[i]), int(new[j])) for j, found in enumerate(close) for i in found]
    table = np.array(pairs, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _division_cost(
    looks: _Looks,
    predecessor: Integers,
    mother: Integers,
    one: Integers,
    other: Integers,
    params: TracksParams,
) -> Floats:
    """Cost of divisions: 0 is what a division looks like."""
    middle = (looks.place[one] + looks.place[other]) / 2 - looks.place[mother]
    cost = (middle**2).sum(axis=1)
    size, light = _history(looks, predecessor, mother)
    unlike = looks.size[one] - looks.size[other]
    together = np.logaddexp(looks.size[one], looks.size[other]) - size
    cost += params.division_volume_weight * (unlike**2 + np.maximum(together, 0) ** 2)
    brighter = np.max([looks.light[mother], looks.light[one], looks.light[other]], axis=0) - light
    cost += params.division_intensity_weight * np.maximum(1 - brighter, 0) ** 2
    return np.asarray(cost)


def _history(looks: _Looks, predecessor: Integers, rows: Integers) -> tuple[Floats, Floats]:
    """Median size and light of nuclei over their last frames, before they rounded up to divide."""
    seen, at = [rows], rows
    for _ in range(_HISTORY_FRAMES - 1):
        before = predecessor[at]
        at = np.where(before >= 0, before, at)
        seen.append(at)
    table = np.stack(seen)
    return np.median(looks.size[table], axis=0), np.median(looks.light[table], axis=0)


def _cheapest(origin: Integers, start: Integers, cost: Floats) -> list[tuple[int, int]]:
    """Pairs of least summed cost, each origin and start at most once; leaving a start alone costs 1."""
    origins, row = np.unique(origin, return_inverse=True)
    starts, column = np.unique(start, return_inverse=True)
    n, m = len(starts), len(origins)
    if not n:
        return []
    # every start may also stay alone: a column of its own; zeros would be no edges
    costs = np.concatenate([cost + 1e-6, np.ones(n)])
    table = coo_array((costs, (np.append(column, np.arange(n)), np.append(row, m + np.arange(n)))))
    chosen, to = min_weight_full_bipartite_matching(table.tocsr())
    joined = to < m
    return [(int(origins[b]), int(starts[a])) for a, b in zip(chosen[joined], to[joined], strict=True)]
