"""Fusion of the flows that a 2D network sees in planes of three directions into one 3D flow.

A view shows two of the three components: xy planes y and x, xz planes z and x, yz planes z and y. Each
component is therefore seen twice (or less, if views are left out) and is the *mean* of what was seen, not
the sum as in Cellpose's do_3D, whose steps overshoot. The logit is the mean over the views, so that a
threshold means the same for any number of views. Directions are physical:
the dynamics divide by the voxel's edges. A 3D network may look as well (`VolumeLook`): it shows all three
components, and counts as one look more at each of them and at the logit.

Two ways to weight the mean: fixed weights of the looks, and *consensus*, which trusts a look where its flow
is smooth (inverse local variance, as u-Segment3D, Zhou et al., Nature Methods 2025).

What a 3D network says of a volume, as one more look beside the views of a 2D network.

Its flow field lies on a grid of its own: another scale in x and y, planes as far apart as in its training.
The dynamics follow the flow on the grid of the views, so the field is resampled to that, linearly. Flows are
in physical directions and the grids' axes are parallel: resampling does not turn them. It is read a few
planes at a time and stays packed; a resampled copy of the whole is never held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nuclei3d.errors import InputError
from nuclei3d.grid import linear_taps, resize_linear
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation.flow_field import FLOW_UNITS, LOGIT_UNITS, FlowField

LOGIT = 3
"""Number of the logit among the components of a field, after the flow's z, y and x."""

_SLAB = 16
_SAME_EXTENT = 1e-3


@dataclass(frozen=True)
class VolumeLook:
    """A flow field, read on the grid of the views.

    Attributes
    ----------
    field
        What the 3D network says, on its own grid.
    shape
        Of the grid of the views (z, y, x).
    voxel_size
        Of that grid.
    weight
        Trust in it; a view has 1 unless it is given another.

    Raises
    ------
    InputError
        If the two grids do not cover the same box, or the weight is not positive.
    """

    field: FlowField
    shape: tuple[int, int, int]
    voxel_size: VoxelSize
    weight: float = 1.0

    def __post_init__(self) -> None:
        own, wanted = (
            [size * edge for size, edge in zip(shape, voxel_size.zyx, strict=True)]
            for shape, voxel_size in (
                (self.field.shape, self.field.voxel_size),
                (self.shape, self.voxel_size),
            )
        )
        if not np.allclose(own, wanted, rtol=_SAME_EXTENT, atol=0):
            boxes = (" x ".join(f"{edge:.4g}" for edge in box) for box in (own, wanted))
            raise InputError(
                "view fusion: the 3D network saw a box of {} um (z, y, x), the views one of {} um; "
                "both must look at the same volume".format(*boxes)
            )
        if not (np.isfinite(self.weight) and self.weight > 0):
            raise InputError(
                f"view fusion: the weight of the 3D network must be a positive number, got {self.weight}"
            )

    def planes(self, component: int, planes: slice) -> NDArray[np.float32]:
        """Read one component of some planes.

        Parameters
        ----------
        component
            0, 1, 2 for the flow along z, y, x; `LOGIT` for the logit.
        planes
            First and last but one, along z of the grid of the views.

        Returns
        -------
        float32 array (planes, Y, X)
        """
        start, stop, _ = planes.indices(self.shape[0])
        if self.shape[0] == self.field.shape[0]:
            return self._own_planes(component, start, stop)
        indices, weights = linear_taps(self.field.shape[0], self.shape[0])
        indices, weights = indices[:, start:stop], weights[:, start:stop]
        low = int(indices.min())
        own = self._own_planes(component, low, int(indices.max()) + 1)
        result = np.zeros((stop - start, *self.shape[1:]), np.float32)
        for tap, share in zip(indices, weights, strict=True):
            result += own[tap - low] * share[:, None, None]
        return result

    def _own_planes(self, component: int, start: int, stop: int) -> NDArray[np.float32]:
        """Read one component of planes of the field, at the scale of the views in y and x."""
        packed = self.field.packed[start:stop, ..., component]
        values = resize_linear(packed, (stop - start, *self.shape[1:]))
        values /= np.float32(LOGIT_UNITS if component == LOGIT else FLOW_UNITS)
        return values

    def slabs(self) -> Iterator[slice]:
        """Give the planes of the grid of the views, a few at a time."""
        for start in range(0, self.shape[0], _SLAB):
            yield slice(start, min(start + _SLAB, self.shape[0]))


View = Literal["xy", "xz", "yz"]

VIEW_AXES: dict[str, tuple[int, int]] = {"xy": (1, 2), "xz": (0, 2), "yz": (0, 1)}
"""The components (0 z, 1 y, 2 x) that the two channels of a view's flow are."""

_VARIANCE_WINDOW = 5
_VARIANCE_FLOOR = 0.1
"""Planes that are fused at once: no temporary of the size of the volume."""


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
    volume: VolumeLook | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fuse one, two or three views, and what a 3D network says, into a 3D flow and a logit.

    A component that nobody shows (z, if there are only xy planes) is 0. Two views show all three.

    Parameters
    ----------
    views : sequence of ViewPrediction
        Any subset of the three, each at most once, all of the same shape.
    method : "mean" or "consensus"
        Consensus divides the weight of a look at a flow by (v + 0.1), v the variance of the component in the
        5 x 5 x 5 voxels around. The logit is the mean in either case.
    weights : mapping from view to weight, optional
        Relative trust in each view; 1 where not given. Applies to flows and logits.
    volume : VolumeLook, optional
        What a 3D network says, on the grid of the views, with its own weight.

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
    if volume is not None and volume.shape != shape:
        raise InputError(
            f"view fusion: the 3D network's look has shape {volume.shape}, the views have {shape}; "
            "bring it to their grid"
        )
    flow = np.zeros((3, *shape), np.float32)
    for component in range(3):
        looks = [
            _Look(_planes_of(view.flow[VIEW_AXES[view.view].index(component)]), trust[view.view])
            for view in views
            if component in VIEW_AXES[view.view]
        ]
        _fuse([*looks, *_look_of(volume, component)], method, flow[component])
    logit = np.zeros(shape, np.float32)
    looks = [_Look(_planes_of(view.logit), trust[view.view]) for view in views]
    _fuse([*looks, *_look_of(volume, LOGIT)], "mean", logit)
    return flow, logit


class _Look(NamedTuple):
    """What one view, or the 3D network, says of one component: its planes z, and the trust in it."""

    planes: Callable[[slice], NDArray[np.float32]]
    weight: float


def _planes_of(values: NDArray[np.floating[Any]]) -> Callable[[slice], NDArray[np.float32]]:
    return lambda planes: values[planes].astype(np.float32)


def _look_of(volume: VolumeLook | None, component: int) -> list[_Look]:
    if volume is None:
        return []
    return [_Look(lambda planes: volume.planes(component, planes), volume.weight)]


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


def _fuse(looks: Sequence[_Look], method: Literal["mean", "consensus"], out: NDArray[np.float32]) -> None:
    """Write the weighted mean of the looks slab by slab; one that nobody takes stays as it is."""
    if not looks:
        return
    by_variance = method == "consensus" and len(looks) > 1
    depth = out.shape[0]
    margin = _VARIANCE_WINDOW // 2 if by_variance else 0
    for start in range(0, depth, _SLAB):
        stop = min(start + _SLAB, depth)
        low, high = max(start - margin, 0), min(stop + margin, depth)
        fused = np.zeros((high - low, *out.shape[1:]), np.float32)
        total = np.zeros_like(fused)
        for look in looks:
            values = look.planes(slice(low, high))
            weight: NDArray[np.float32] | np.float32 = np.float32(look.weight)
            if by_variance:
                weight = weight / (_local_variance(values) + np.float32(_VARIANCE_FLOOR))
            fused += weight * values
            total += weight
        fused /= total
        out[start:stop] = fused[start - low : stop - low]


def _local_variance(values: NDArray[np.float32]) -> NDArray[np.float32]:
    from scipy.ndimage import uniform_filter

    mean = uniform_filter(values, _VARIANCE_WINDOW, mode="nearest")
    variance = uniform_filter(values * values, _VARIANCE_WINDOW, mode="nearest") - mean * mean
    return np.asarray(np.maximum(variance, 0), np.float32)
