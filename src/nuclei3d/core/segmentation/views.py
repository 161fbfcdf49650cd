"""The network pass: the planes of up to three views of a volume through the 2D network.

The volume lies on the *view grid*: x and y at the network's scale, z at the native planes (or at the
network's scale where the native planes are closer). xy planes are therefore the frame's own planes, never
interpolated ones; planes of the orthogonal views are stretched along z to cubic voxels, a few at a time,
and the results averaged back onto the view grid. Nothing of the size of the stretched volume is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.resampling import resize_linear
from nuclei3d.core.segmentation.flow_field import FlowField
from nuclei3d.core.segmentation.foreground import OccupiedSpace
from nuclei3d.core.segmentation.fusion import VIEW_AXES, View
from nuclei3d.core.segmentation.lattice import grow_to_lattice
from nuclei3d.core.segmentation.plane_network import PlaneNetwork, padded
from nuclei3d.core.segmentation.volume_look import LOGIT, VolumeLook

VIEWS: tuple[View, ...] = ("xy", "xz", "yz")
VIEW_AXIS: dict[str, int] = {"xy": 0, "xz": 1, "yz": 2}
"""The axis of (z, y, x) along which the planes of a view are counted."""

EMPTY_LOGIT = -10.0
"""Logit where the network was not run because nothing can be there."""


@dataclass(frozen=True)
class PlanePrediction:
    """Flow and logit of one plane.

    Attributes
    ----------
    index
        Number of the plane along the axis of its view.
    output
        float32 (3, height, width) on the view grid: flow along the plane's two axes, logit.
    """

    index: int
    output: NDArray[np.float32]


def predict_view(
    image: NDArray[np.float32],
    view: View,
    network: PlaneNetwork,
    occupied: OccupiedSpace,
    *,
    stretched_depth: int,
    step: int = 1,
    progress: Callable[[float], None] | None = None,
) -> Iterator[PlanePrediction]:
    """Run the network over the planes of one view.

    Parameters
    ----------
    image
        Normalised volume (z, y, x) on the view grid.
    view
        ``xy``, ``xz`` or ``yz``.
    network
        The network.
    occupied
        Where nuclei can be; planes and margins outside are not computed.
    stretched_depth
        Number of cubic voxels along z at the network's scale.
    step
        Every how many planes one is computed; those between are interpolated linearly.
    progress
        Called with the number of planes that were dealt with.

    Yields
    ------
    PlanePrediction
        Every plane of the view once, in order.
    """
    axis = VIEW_AXIS[view]
    count = image.shape[axis]
    # In an xy plane nothing is stretched: its rows are y.
    depth = image.shape[1] if axis == 0 else stretched_depth
    before: PlanePrediction | None = None
    for computed in _computed_planes(image, axis, network, occupied, depth, computed_indices(count, step)):
        for between in range((before.index if before else -1) + 1, computed.index):
            yield _interpolate(before, computed, between)
        yield computed
        if progress is not None:
            progress(computed.index - (before.index if before else -1))
        before = computed
    if before is None:
        return
    for index in range(before.index + 1, count):
        yield PlanePrediction(index, before.output)
    if progress is not None:
        progress(count - 1 - before.index)


def computed_indices(count: int, step: int) -> list[int]:
    """Choose the planes to compute: every `step`-th, and the last so that none is extrapolated far."""
    start = min((step - 1) // 2, count - 1)
    chosen = list(range(start, count, step))
    if count - 1 - chosen[-1] > step // 2:
        chosen.append(count - 1)
    return chosen


def count_pixels(
    shape: Sequence[int], occupied: OccupiedSpace, stretched_depth: int, views: Sequence[View], step: int
) -> int:
    """Count the pixels, padding included, that `predict_view` would pass for these views (without tiles)."""
    total = 0
    for view in views:
        axis = VIEW_AXIS[view]
        height, width = (size for other, size in enumerate(shape) if other != axis)
        depth = height if axis == 0 else stretched_depth
        for index in computed_indices(shape[axis], 1 if axis == 0 else step):
            box = occupied.box(axis, index, index)
            if box is not None:
                rows, columns = _on_lattice(box, height, width, depth)
                total += padded(_stretched_rows(rows, height, depth)) * padded(columns.stop - columns.start)
    return total


@dataclass(frozen=True)
class PlaneGroup:
    """Planes that go through the network together.

    Attributes
    ----------
    indices
        Numbers of the planes.
    rows, columns
        The box of them that is computed.
    stretched
        Rows of that box at the network's scale.
    """

    indices: Sequence[int]
    rows: slice
    columns: slice
    stretched: int


def plane_groups(
    shape: Sequence[int],
    axis: int,
    network: PlaneNetwork,
    occupied: OccupiedSpace,
    depth: int,
    indices: Sequence[int],
) -> Iterator[PlaneGroup | int]:
    """Put planes into groups of equal box; a plane in which nothing can be is given by its number."""
    height, width = (size for other, size in enumerate(shape) if other != axis)
    done = 0
    while done < len(indices):
        box = occupied.box(axis, indices[done], indices[done])
        if box is None:
            yield indices[done]
            done += 1
            continue
        rows, columns = _on_lattice(box, height, width, depth)
        many = network.planes_per_batch(_stretched_rows(rows, height, depth), columns.stop - columns.start)
        chosen = indices[done : done + many]
        common = occupied.box(axis, chosen[0], chosen[-1])
        assert common is not None
        rows, columns = _on_lattice(common, height, width, depth)
        yield PlaneGroup(chosen, rows, columns, _stretched_rows(rows, height, depth))
        done += len(chosen)


def _computed_planes(
    image: NDArray[np.float32],
    axis: int,
    network: PlaneNetwork,
    occupied: OccupiedSpace,
    depth: int,
    indices: Sequence[int],
) -> Iterator[PlanePrediction]:
    """Run the chosen planes."""
    planes = np.moveaxis(image, axis, 0)
    height, width = planes.shape[1:]
    for group in plane_groups(image.shape, axis, network, occupied, depth, indices):
        if isinstance(group, int):
            yield PlanePrediction(group, _empty(height, width))
            continue
        stack = np.ascontiguousarray(planes[group.indices, group.rows, group.columns])
        if group.stretched != stack.shape[1]:
            stack = resize_linear(stack, (len(stack), group.stretched, stack.shape[2]))
        output = network(stack)
        if group.stretched != group.rows.stop - group.rows.start:
            native = group.rows.stop - group.rows.start
            output = resize_linear(output, (*output.shape[:2], native, output.shape[3]))
        for index, predicted in zip(group.indices, output, strict=True):
            whole = _empty(height, width)
            whole[:, group.rows, group.columns] = predicted
            yield PlanePrediction(index, whole)


def _on_lattice(box: tuple[slice, slice], height: int, width: int, depth: int) -> tuple[slice, slice]:
    """Grow a box of a plane so that the network sees in it what it sees in the whole plane."""
    rows, columns = box
    return grow_to_lattice(rows, height, depth / height), grow_to_lattice(columns, width)


def _stretched_rows(rows: slice, height: int, depth: int) -> int:
    length = int(rows.stop - rows.start)
    return max(1, round(length * depth / height))


def _empty(height: int, width: int) -> NDArray[np.float32]:
    output = np.zeros((3, height, width), np.float32)
    output[2] = EMPTY_LOGIT
    return output


def _interpolate(before: PlanePrediction | None, after: PlanePrediction, index: int) -> PlanePrediction:
    if before is None:
        return PlanePrediction(index, after.output)
    share = np.float32((index - before.index) / (after.index - before.index))
    return PlanePrediction(index, before.output + share * (after.output - before.output))


class FlowAccumulator:
    """Sums up the mean of all looks at a volume in one field: views plane by plane, without holding any.

    Equal to `nuclei3d.core.segmentation.fusion.fuse_views` with method ``mean`` (a test holds that).

    Parameters
    ----------
    field
        Of the view grid, all zeros; gets the sum.
    views
        The views that will be added.
    trust
        Weight of each; None for equal ones.
    volume
        What a 3D network says, which is added at once.
    """

    def __init__(
        self,
        field: FlowField,
        views: Sequence[View],
        trust: Sequence[float] | None = None,
        volume: VolumeLook | None = None,
    ) -> None:
        self._field = field
        self._trust = dict(zip(views, trust or [1.0] * len(views), strict=True))
        beside = 0.0 if volume is None else volume.weight
        self._seen = [
            beside + sum(self._trust[view] for view in views if component in VIEW_AXES[view])
            for component in range(3)
        ]
        self._seen.append(beside + sum(self._trust.values()))
        if volume is not None:
            whole = slice(0, field.shape[1]), slice(0, field.shape[2])
            for planes in volume.slabs():
                for component, seen in enumerate(self._seen):
                    values = volume.planes(component, planes)
                    field.add((planes, *whole), component, values, beside / seen)

    def add(self, view: View, plane: PlanePrediction) -> None:
        """Add one plane of a view."""
        axis = VIEW_AXIS[view]
        box = [slice(None)] * 3
        box[axis] = slice(plane.index, plane.index + 1)
        where = (box[0], box[1], box[2])
        trust = self._trust[view]
        for channel, component in enumerate(VIEW_AXES[view]):
            values = np.expand_dims(plane.output[channel], axis)
            self._field.add(where, component, values, trust / self._seen[component])
        values = np.expand_dims(plane.output[2], axis)
        self._field.add(where, LOGIT, values, trust / self._seen[LOGIT])
