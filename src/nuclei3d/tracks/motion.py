"""The embryo's own motion between frames, drift and rotation, from the places of its nuclei alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

Floats = NDArray[np.float64]

# Fewer pairs say nothing about a rotation, fewest nothing about a drift.
_LEAST_FOR_ROTATION = 8
_LEAST_FOR_DRIFT = 3
_ITERATIONS = 30
_GOOD_FIT_DIAMETERS = 0.25


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

    @property
    def degrees(self) -> float:
        """Angle of the rotation."""
        return float(np.degrees(np.arccos(np.clip((np.trace(self.rotation) - 1) / 2, -1, 1))))


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
