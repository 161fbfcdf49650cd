"""Along which steps the dynamics follow a field, and in which bins they group where the voxels end."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation.flow_field import FLOW_UNITS, LOGIT_UNITS
from nuclei3d.segmentation.settings import MaskSettings

SLOW = 0.25
"""Flows shorter than this move a particle by proportionally shorter steps; others by whole steps."""


class Paths(NamedTuple):
    """How the voxels of a field are followed, and their ends grouped.

    Lengths are in um; the threshold of the logit, those of outlines along z and in the plane, and `slow` in
    units of the field. `bins` is the shape of the grid of bins; `offsets`, int64 (k, 3), are those in reach.
    """

    threshold: float
    outline: tuple[float, float]
    step_um: float
    smallest_step_um: float
    slow: float
    rounds: int
    bin_um: float
    bins: tuple[int, int, int]
    offsets: NDArray[np.int64]

    @property
    def margin(self) -> int:
        """Bins around the grid so that all of `offsets`, and the next neighbours, have a place in it."""
        return max(1, int(self.offsets.max()))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Shape of the grid of bins with its margin."""
        z, y, x = (count + 2 * self.margin for count in self.bins)
        return z, y, x


def plan_paths(
    shape: tuple[int, int, int], voxel_size: VoxelSize, diameter_um: float, settings: MaskSettings
) -> Paths:
    """Plan the paths in a volume of `shape` (z, y, x) with nuclei of a typical diameter."""
    in_use = [edge for edge, length in zip(voxel_size.zyx, shape, strict=True) if length > 1] or [1.0]
    # Bins finer than voxels would only cost memory.
    bin_um = max(settings.bin_edge * diameter_um, 0.75 * float(np.prod(in_use)) ** (1 / len(in_use)))
    z, y, x = (
        max(1, int(np.ceil((length - 1) * edge / bin_um))) if length > 1 else 1
        for length, edge in zip(shape, voxel_size.zyx, strict=True)
    )
    step_um = max(settings.step * diameter_um, min(voxel_size.zyx))
    radius_um = settings.sink_radius * diameter_um
    reach = int(np.floor(radius_um / bin_um))
    around = np.argwhere(np.ones(3 * (2 * reach + 1,), bool)) - reach
    outline_z, outline_xy = settings.outline_thresholds
    return Paths(
        threshold=settings.cellprob_threshold * LOGIT_UNITS,
        outline=(outline_z * LOGIT_UNITS, outline_xy * LOGIT_UNITS),
        step_um=step_um,
        smallest_step_um=0.15 * step_um,
        slow=SLOW * FLOW_UNITS,
        rounds=40 + int(4 * diameter_um / step_um),
        bin_um=bin_um,
        bins=(z, y, x),
        offsets=around[((around * bin_um) ** 2).sum(1) <= radius_um**2].astype(np.int64),
    )
