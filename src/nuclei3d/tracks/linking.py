"""Nuclei linked from frame to frame, over gaps, and over divisions, by two assignments of least cost.

The embryo's own motion, drift and rotation, is taken away before, from the places of its nuclei alone.

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
from nuclei3d.tracks.nuclei import Floats, Integers, Nuclei, Tracks

#: Of the embryo's motion: fewer pairs say nothing about a rotation, fewest nothing about a drift.
_LEAST_FOR_ROTATION = 8
_LEAST_FOR_DRIFT = 3
_ITERATIONS = 30
_GOOD_FIT_DIAMETERS = 0.25
# Before it divides a nucleus condenses for a frame or two: what it was is judged by more frames than that.
_HISTORY_FRAMES = 5


@dataclass(frozen=True)
class _Looks:
    """What nuclei are compared by, without units.

    `place` (n, 3) is in diameters of the typical nucleus, the embryo's motion taken away, `size` the
    logarithm of the volume, `light` the intensity against the median of the frame, in units of its spread, on
    a scale that flattens far out; 0 where it is not known.
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


@dataclass(frozen=True)
class RigidMotion:
    """Takes places (n, 3), in um, to ``places @ rotation.T + shift``."""

    rotation: Floats
    shift: Floats

    @classmethod
    def none(cls) -> RigidMotion:
        """Give the motion that leaves all where it is."""
        return cls(np.eye(3), np.zeros(3))

    def __call__(self, places: Floats) -> Floats:
        """Move places (n, 3)."""
        return np.asarray(places @ self.rotation.T + self.shift)

    def after(self, first: RigidMotion) -> RigidMotion:
        """Give the motion that does `first`, then this one."""
        return RigidMotion(self.rotation @ first.rotation, self(first.shift[None])[0])


def find_motion(before: Floats, after: Floats, diameter_um: float) -> RigidMotion:
    """Find the rigid motion from the nuclei of one frame, (n, 3) in um, to those of the next, (m, 3).

    Iterative closest points (Besl and McKay 1992) on pairs that are each other's nearest, the closer half of
    them counting. Nuclei move by themselves, divide and are missed, so the rest is left out. It starts from
    no motion and, where that does not end well, from the drift that most pairs of nuclei agree on.
    """
    if min(len(before), len(after)) < _LEAST_FOR_DRIFT:
        return RigidMotion.none()
    tree = KDTree(after)
    still = _closest_points(before, after, tree, RigidMotion.none())
    if _misfit(still(before), tree, diameter_um) < _GOOD_FIT_DIAMETERS * diameter_um:
        return still
    start = RigidMotion(np.eye(3), _commonest_shift(before, after, diameter_um))
    fits = (still, _closest_points(before, after, tree, start))
    return min(fits, key=lambda fit: _misfit(fit(before), tree, diameter_um))


def _misfit(moved: Floats, tree: KDTree, diameter_um: float) -> float:
    """Mean distance to the nearest nucleus; what is lost counts as one diameter at most."""
    distance, _ = tree.query(moved)
    return float(np.minimum(distance, diameter_um).mean())


def _commonest_shift(before: Floats, after: Floats, diameter_um: float) -> Floats:
    """The shift around which the differences of all pairs of nuclei lie densest."""
    shifts = (after[None] - before[:, None]).reshape(-1, 3)
    middle = np.median(after, axis=0) - np.median(before, axis=0)
    near = shifts[np.linalg.norm(shifts - middle, axis=1) < 4 * diameter_um]
    if not len(near):
        return np.asarray(middle)
    tree = KDTree(near)
    count = tree.query_ball_point(near, 0.3 * diameter_um, return_length=True)
    inside = tree.query_ball_point(near[int(np.argmax(count))], 0.3 * diameter_um)
    return np.asarray(near[inside].mean(axis=0))


def _closest_points(before: Floats, after: Floats, tree: KDTree, motion: RigidMotion) -> RigidMotion:
    for _ in range(_ITERATIONS):
        moved = motion(before)
        distance, nearest = tree.query(moved)
        _, back = KDTree(moved).query(after)
        mutual = np.flatnonzero(back[nearest] == np.arange(len(before)))
        if len(mutual) < _LEAST_FOR_DRIFT:
            return motion
        chosen = mutual[distance[mutual] <= np.median(distance[mutual]) * 1.5 + 1e-9]
        fitted = _fit(before[chosen], after[nearest[chosen]])
        step = np.abs(fitted(before) - moved).max()
        motion = fitted
        if step < 1e-3:
            break
    return motion


def _fit(places: Floats, targets: Floats) -> RigidMotion:
    """The rotation and shift of least squares (Kabsch 1976); a shift alone for few pairs."""
    middle, aim = places.mean(axis=0), targets.mean(axis=0)
    rotation = np.eye(3)
    if len(places) >= _LEAST_FOR_ROTATION:
        u, _, v = np.linalg.svd((places - middle).T @ (targets - aim))
        mirror = np.sign(np.linalg.det(u @ v))
        rotation = v.T @ np.diag([1.0, 1.0, mirror]) @ u.T
    return RigidMotion(rotation, aim - rotation @ middle)


def follow_motion(frames: list[Floats], diameter_um: float) -> list[RigidMotion]:
    """Give for each frame the motion that takes its places to where they were in the first frame's embryo.

    A frame without nuclei is taken to have stood still.
    """
    motions: list[RigidMotion] = []
    back = RigidMotion.none()
    last: Floats | None = None
    for places in frames:
        if last is not None and len(places):
            step = find_motion(places, last, diameter_um)
            back = back.after(step)
        motions.append(back)
        if len(places):
            last = places
    return motions
