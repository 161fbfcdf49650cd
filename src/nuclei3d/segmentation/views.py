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

from nuclei3d.grid import resize_linear
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.foreground import OccupiedSpace
from nuclei3d.segmentation.fusion import LOGIT, VIEW_AXES, View, VolumeLook
from nuclei3d.segmentation.plane_network import PlaneNetwork, grow_to_lattice, padded

VIEWS: tuple[View, ...] = ("xy", "xz", "yz")
VIEW_AXIS: dict[str, int] = {"xy": 0, "xz": 1, "yz": 2}
"""The axis of (z, y, x) along which the planes of a view are counted."""

EMPTY_LOGIT = -10.0
"""Logit where the network was not run because nothing can be there."""

_MOST_WASTE = 1.1
"""Pixels of planes in the box of their group, relative to those of each in its own."""


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


@dataclass(frozen=True)
class PlaneBox:
    """The part of a plane that goes through the network.

    Attributes
    ----------
    rows, columns
        Of the plane.
    height
        Rows at the network's scale, once stretched.
    """

    rows: slice
    columns: slice
    height: int

    @classmethod
    def around(cls, box: tuple[slice, slice], height: int, width: int, depth: int) -> PlaneBox:
        """Grow a box of a plane (height, width) so that the network sees in it what it sees in the plane."""
        rows = grow_to_lattice(box[0], height, depth / height)
        columns = grow_to_lattice(box[1], width)
        return cls(rows, columns, max(1, round((rows.stop - rows.start) * depth / height)))

    @property
    def width(self) -> int:
        """Number of columns."""
        return int(self.columns.stop - self.columns.start)

    @property
    def pixels(self) -> int:
        """Pixels of the network, padding included."""
        return padded(self.height) * padded(self.width)


@dataclass(frozen=True)
class PlaneGroup:
    """Planes that go through the network together.

    Attributes
    ----------
    indices
        Numbers of the planes.
    box
        The part of each that is computed.
    """

    indices: Sequence[int]
    box: PlaneBox


def plane_groups(
    shape: Sequence[int],
    axis: int,
    network: PlaneNetwork,
    occupied: OccupiedSpace,
    depth: int,
    indices: Sequence[int],
) -> Iterator[PlaneGroup | int]:
    """Put planes into groups that share a box; a plane in which nothing can be is given by its number."""
    height, width = (size for other, size in enumerate(shape) if other != axis)

    def box_of(first: int, last: int) -> PlaneBox | None:
        box = occupied.box(axis, first, last)
        return None if box is None else PlaneBox.around(box, height, width, depth)

    done = 0
    while done < len(indices):
        box = box_of(indices[done], indices[done])
        if box is None:
            yield indices[done]
            done += 1
            continue
        count, box = _group_planes(indices[done:], box, box_of, network)
        yield PlaneGroup(indices[done : done + count], box)
        done += count


def _group_planes(
    indices: Sequence[int],
    first: PlaneBox,
    box_of: Callable[[int, int], PlaneBox | None],
    network: PlaneNetwork,
) -> tuple[int, PlaneBox]:
    """Count the planes from the first on that go through the network together, and give their common box.

    All of a group are computed in the box that holds what any of them holds. A group ends where that would
    cost much more than each plane in its own box, as at the pole of an embryo, where planes begin small.
    """
    count, common, own_pixels = 1, first, first.pixels
    for index in indices[1:]:
        own, grown = box_of(index, index), box_of(indices[0], index)
        if own is None or grown is None:
            break
        own_pixels += own.pixels
        if count + 1 > network.planes_per_batch(grown.height, grown.width):
            break
        if (count + 1) * grown.pixels > _MOST_WASTE * own_pixels:
            break
        count, common = count + 1, grown
    return count, common


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
        box = group.box
        stack = np.ascontiguousarray(planes[group.indices, box.rows, box.columns])
        if box.height != stack.shape[1]:
            stack = resize_linear(stack, (len(stack), box.height, stack.shape[2]))
        output = network(stack)
        native = box.rows.stop - box.rows.start
        if box.height != native:
            output = resize_linear(output, (*output.shape[:2], native, output.shape[3]))
        for index, predicted in zip(group.indices, output, strict=True):
            whole = _empty(height, width)
            whole[:, box.rows, box.columns] = predicted
            yield PlanePrediction(index, whole)


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

    Equal to `nuclei3d.segmentation.fusion.fuse_views` with method ``mean`` (a test holds that).

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
