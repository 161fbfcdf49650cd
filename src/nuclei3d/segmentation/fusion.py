"""Fusion of the flows that networks see in the views of a volume into one 3D flow.

A view of planes shows two of the three components: xy planes y and x, xz planes z and x, yz planes z and y.
Each component is therefore seen twice (or less, if views are left out) and is the *mean* of what was seen,
not the sum as in Cellpose's do_3D, whose steps overshoot. The logit is the mean over the views, so that a
threshold means the same for any number of views. Directions are physical: the dynamics divide by the voxel's
edges. A 3D network (`VolumeView`) shows all three components, and counts as one view more of each of them and
of the logit.

Two ways to weight the mean: fixed weights of the views, and *consensus*, which trusts a view where its flow
is smooth (inverse local variance, as u-Segment3D, Zhou et al., Nature Methods 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nuclei3d.grid import linear_taps, resize_linear
from nuclei3d.segmentation.flow_field import FLOW_UNITS, LOGIT, LOGIT_UNITS, FlowField
from nuclei3d.views import VIEW_AXES, VIEW_AXIS, View

_SLAB = 16
"""Planes that are fused at once: no temporary of the size of the volume."""
_VARIANCE_WINDOW = 5
_VARIANCE_FLOOR = 0.1


@dataclass(frozen=True)
class VolumeView:
    """What a 3D network says of a volume, read on the grid of the views of planes.

    Its field lies on a grid of its own: another scale in x and y, planes as far apart as in its training. It
    is read, a few planes at a time, resampled linearly to the grid of the views, of `shape` (z, y, x); a copy
    of the whole is never held. Flows are in physical directions and the grids' axes are parallel: resampling
    does not turn them. Its `weight` is relative to those of the views.
    """

    field: FlowField
    shape: tuple[int, int, int]
    weight: float = 1.0

    def planes(self, component: int, planes: slice) -> NDArray[np.float32]:
        """Read a component (see `FlowField.add`) of planes of the views' grid, float32 (n, Y, X)."""
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


def _slabs(depth: int) -> Iterator[slice]:
    for start in range(0, depth, _SLAB):
        yield slice(start, min(start + _SLAB, depth))


def component_weights(weights: Mapping[View, float], volume_weight: float = 0.0) -> list[float]:
    """Sum up the weights of all that show each component of a field: the flow's z, y, x, and the logit."""
    seen = [
        volume_weight + sum(weight for view, weight in weights.items() if component in VIEW_AXES[view])
        for component in range(3)
    ]
    return [*seen, volume_weight + sum(weights.values())]


def add_views(
    field: FlowField,
    planes_of: Callable[[View], Iterable[tuple[int, NDArray[np.float32]]]],
    weights: Mapping[View, float],
    volume: VolumeView | None = None,
) -> None:
    """Add the mean of all views of a volume to a field of zeros, plane by plane, without holding any.

    Equal to `fuse_views` with method ``mean`` (a test holds that). `planes_of` gives the planes of a view:
    number, and (3, rows, columns), flow along the plane's axes and logit.
    """
    trust = 0.0 if volume is None else volume.weight
    seen = component_weights(weights, trust)
    if volume is not None:
        for planes in _slabs(field.shape[0]):
            box = (planes, slice(0, field.shape[1]), slice(0, field.shape[2]))
            for component, total in enumerate(seen):
                field.add(box, component, volume.planes(component, planes), trust / total)
    for view, weight in weights.items():
        axis = VIEW_AXIS[view]
        for index, output in planes_of(view):
            part = [slice(None)] * 3
            part[axis] = slice(index, index + 1)
            for component, values in zip((*VIEW_AXES[view], LOGIT), output, strict=True):
                share = weight / seen[component]
                field.add((part[0], part[1], part[2]), component, np.expand_dims(values, axis), share)


def keep_planes(
    view: View, planes: Iterable[tuple[int, NDArray[np.float32]]], shape: tuple[int, int, int]
) -> NDArray[np.float16]:
    """Keep all planes of a view (number, and (3, rows, columns)) for `fuse_views`, in half precision."""
    kept = np.empty((3, *shape), np.float16)
    by_plane = np.moveaxis(kept, 1 + VIEW_AXIS[view], 0)
    for index, output in planes:
        by_plane[index] = output
    return kept


def _read_planes(shown: NDArray[np.floating[Any]], planes: slice) -> NDArray[np.float32]:
    return shown[planes].astype(np.float32)


_Source = tuple[Callable[[slice], NDArray[np.float32]], float]
"""What reads planes z of one component, and the trust in it."""


def fuse_views(
    views: Mapping[View, NDArray[np.floating[Any]]],
    method: Literal["mean", "consensus"] = "mean",
    weights: Mapping[View, float] | None = None,
    volume: VolumeView | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fuse one, two or three views, and what a 3D network says, into a 3D flow and a logit.

    The flow is float32 (3, Z, Y, X), components (z, y, x) of about unit vectors in physical space, the logit
    (Z, Y, X). A component that nobody shows (z, if there are only xy planes) is 0.

    `views` are what the network says of all planes of a view, (3, Z, Y, X): flow along the plane's axes,
    about 1 long, and logit. The `method` consensus divides the weight of a view by (v + 0.1), v the variance
    of the flow's component in the 5 x 5 x 5 voxels around; the logit is the mean in either case. `weights`
    are the relative trust in each view, in flows and logits, 1 where not given; `volume` is what a 3D network
    says, on the grid of the views, with its own weight.
    """
    shape = next(iter(views.values())).shape[1:]
    flow, logit = np.zeros((3, *shape), np.float32), np.zeros(shape, np.float32)
    for component, out in enumerate((*flow, logit)):
        sources: list[_Source] = [
            (partial(_read_planes, own), (weights or {}).get(view, 1.0))
            for view, planes in views.items()
            for shown, own in zip((*VIEW_AXES[view], LOGIT), planes, strict=True)
            if shown == component
        ]
        if volume is not None:
            sources.append((partial(volume.planes, component), volume.weight))
        if sources:
            _fuse(sources, out, by_variance=method == "consensus" and component != LOGIT and len(sources) > 1)
    return flow, logit


def _fuse(sources: Sequence[_Source], out: NDArray[np.float32], *, by_variance: bool) -> None:
    """Write the weighted mean of the sources slab by slab."""
    depth = out.shape[0]
    margin = _VARIANCE_WINDOW // 2 if by_variance else 0
    for slab in _slabs(depth):
        low, high = max(slab.start - margin, 0), min(slab.stop + margin, depth)
        fused = np.zeros((high - low, *out.shape[1:]), np.float32)
        total = np.zeros_like(fused)
        for planes, trust in sources:
            values = planes(slice(low, high))
            weight: NDArray[np.float32] | np.float32 = np.float32(trust)
            if by_variance:
                weight = weight / (_local_variance(values) + np.float32(_VARIANCE_FLOOR))
            fused += weight * values
            total += weight
        fused /= total
        out[slab] = fused[slab.start - low : slab.stop - low]


def _local_variance(values: NDArray[np.float32]) -> NDArray[np.float32]:
    from scipy.ndimage import uniform_filter

    mean = uniform_filter(values, _VARIANCE_WINDOW, mode="nearest")
    variance = uniform_filter(values * values, _VARIANCE_WINDOW, mode="nearest") - mean * mean
    return np.asarray(np.maximum(variance, 0), np.float32)
