"""What a 3D network says of a volume, as one more look beside the views of a 2D network.

Its flow field lies on a grid of its own: another scale in x and y, planes as far apart as in its training.
The dynamics follow the flow on the grid of the views, so the field is resampled to that, linearly. Flows are
in physical directions and the grids' axes are parallel: resampling does not turn them. It is read a few
planes at a time and stays packed; a resampled copy of the whole is never held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.resampling import linear_taps, resize_linear
from nuclei3d.core.segmentation.flow_field import FLOW_UNITS, LOGIT_UNITS, FlowField
from nuclei3d.errors import InputError
from nuclei3d.volumes.voxel_size import VoxelSize

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
