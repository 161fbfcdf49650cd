"""Fusion of the flows that a 2D network sees in planes of three directions into one 3D flow.

A view shows two of the three components: xy planes y and x, xz planes z and x, yz planes z and y. Each
component is therefore seen twice (or less, if views are left out) and is the *mean* of what was seen, not
the sum as in Cellpose's do_3D, whose steps overshoot. The logit is the mean over the views, so that a
threshold means the same for any number of views. Directions are physical:
the dynamics divide by the voxel's edges.

Two ways to weight the mean: fixed weights of the views, and *consensus*, which trusts a view where its flow
is smooth (inverse local variance, as u-Segment3D, Zhou et al., Nature Methods 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nuclei3d.errors import InputError

View = Literal["xy", "xz", "yz"]

VIEW_AXES: dict[str, tuple[int, int]] = {"xy": (1, 2), "xz": (0, 2), "yz": (0, 1)}
"""The components (0 z, 1 y, 2 x) that the two channels of a view's flow are."""

_VARIANCE_WINDOW = 5
_VARIANCE_FLOOR = 0.1


@dataclass(frozen=True)
class ViewPrediction:
    """What the network says about all planes of one direction, on the grid common to all views.

    Attributes
    ----------
    view : "xy", "xz" or "yz"
    flow : float16 or float32 array, shape (2, Z, Y, X)
        Components in the order of the plane's axes: (y, x), (z, x) or (z, y). Length about 1 (network / 5).
    logit : float16 or float32 array, shape (Z, Y, X)
    """

    view: View
    flow: NDArray[np.floating[Any]]
    logit: NDArray[np.floating[Any]]


def fuse_views(
    views: Sequence[ViewPrediction],
    method: Literal["mean", "consensus"] = "mean",
    weights: Mapping[str, float] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fuse one, two or three views into a 3D flow and a logit.

    A component that no view shows (z, if there are only xy planes) is 0. Two views show all three.

    Parameters
    ----------
    views : sequence of ViewPrediction
        Any subset of the three, each at most once, all of the same shape.
    method : "mean" or "consensus"
        Consensus divides the weight of a view by (v + 0.1), v the variance of the component in the 5 x 5 x 5
        voxels around.
    weights : mapping from view to weight, optional
        Relative trust in each view; 1 where not given. Applies to flows and logits.

    Returns
    -------
    flow : float32 array, shape (3, Z, Y, X)
        Components (z, y, x), about unit vectors in physical space.
    logit : float32 array, shape (Z, Y, X)

    Raises
    ------
    InputError
        If there is no view, one comes twice, shapes differ, or weights are not positive.
    """
    trust = _checked_weights(views, weights)
    shape = views[0].logit.shape
    flow = np.zeros((3, *shape), np.float32)
    for component in range(3):
        seen = [
            (view.flow[VIEW_AXES[view.view].index(component)], trust[view.view])
            for view in views
            if component in VIEW_AXES[view.view]
        ]
        if len(seen) == 2 and method == "consensus":
            _consensus(seen[0], seen[1], flow[component])
        elif seen:
            _mean(seen, flow[component])
    logit = np.zeros(shape, np.float32)
    _mean([(view.logit, trust[view.view]) for view in views], logit)
    return flow, logit


def _checked_weights(
    views: Sequence[ViewPrediction], weights: Mapping[str, float] | None
) -> dict[str, float]:
    names = [view.view for view in views]
    if not names or len(set(names)) != len(names) or not set(names) <= set(VIEW_AXES):
        raise InputError(
            f"view fusion: expected each of xy, xz, yz at most once and one at least, got {names}"
        )
    shape = views[0].logit.shape
    for view in views:
        if view.logit.shape != shape or view.flow.shape != (2, *shape):
            raise InputError(
                f"view fusion: view {view.view} has flow {view.flow.shape} and logit {view.logit.shape}, "
                f"expected (2, Z, Y, X) and (Z, Y, X) with {shape} as in view {names[0]}"
            )
    trust: dict[str, float] = {name: float((weights or {}).get(name, 1.0)) for name in names}
    if not all(np.isfinite(weight) and weight > 0 for weight in trust.values()):
        raise InputError(f"view fusion: weights of views must be positive numbers, got {trust}")
    return trust


def _mean(seen: Sequence[tuple[NDArray[np.floating[Any]], float]], out: NDArray[np.float32]) -> None:
    """Write the weighted mean plane by plane: no temporary of the size of the volume."""
    total = sum(weight for _, weight in seen)
    for z in range(out.shape[0]):
        for values, weight in seen:
            out[z] += values[z] * np.float32(weight / total)


def _consensus(
    first: tuple[NDArray[np.floating[Any]], float],
    second: tuple[NDArray[np.floating[Any]], float],
    out: NDArray[np.float32],
) -> None:
    """Write the mean of two views of one component, weighted by inverse local variance, slab by slab."""
    depth = out.shape[0]
    margin = _VARIANCE_WINDOW // 2
    slab = 16
    for start in range(0, depth, slab):
        stop = min(start + slab, depth)
        low, high = max(start - margin, 0), min(stop + margin, depth)
        inner = slice(start - low, stop - low)
        values_a = first[0][low:high].astype(np.float32)
        values_b = second[0][low:high].astype(np.float32)
        weight_a = np.float32(first[1]) / (_local_variance(values_a) + _VARIANCE_FLOOR)
        weight_b = np.float32(second[1]) / (_local_variance(values_b) + _VARIANCE_FLOOR)
        fused = (weight_a * values_a + weight_b * values_b) / (weight_a + weight_b)
        out[start:stop] = fused[inner]


def _local_variance(values: NDArray[np.float32]) -> NDArray[np.float32]:
    from scipy.ndimage import uniform_filter

    mean = uniform_filter(values, _VARIANCE_WINDOW, mode="nearest")
    variance = uniform_filter(values * values, _VARIANCE_WINDOW, mode="nearest") - mean * mean
    return np.asarray(np.maximum(variance, 0), np.float32)
