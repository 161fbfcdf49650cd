"""Following the flow from every foreground voxel to where it ends, in physical space.

A voxel becomes a particle that moves along the direction of the interpolated flow, in
steps of fixed physical length. Interpolation is trilinear with voxel centres at whole coordinates and holds
up to the border of the volume. Flows of background voxels are used too: a nucleus may have holes in its
foreground, and a particle must not be caught in them. Whenever the direction turns back by more
than a right angle the particle has passed its sink, and its step is halved: it cannot overshoot for good, and
it stops as soon as its steps have become small (early stopping particle by particle).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.core.segmentation.flow_field import FLOW_UNITS
from nuclei3d.volumes.voxel_size import VoxelSize

_SLOW = 0.25
"""Flows shorter than this move a particle by proportionally shorter steps; others by whole steps."""


@dataclass(frozen=True)
class BinGrid:
    """Bins of equal physical size over a volume, in which end points are counted.

    Attributes
    ----------
    edges_um : (float, float, float)
        Edges of a bin on (z, y, x).
    shape : (int, int, int)
        Number of bins on (z, y, x).
    """

    edges_um: tuple[float, float, float]
    shape: tuple[int, int, int]

    @classmethod
    def over(cls, shape: tuple[int, ...], voxel_size: VoxelSize, edge_um: float) -> BinGrid:
        """Make bins of about `edge_um` over a volume; on an axis of one voxel there is one bin."""
        counts = [
            max(1, int(np.ceil((length - 1) * size / edge_um))) if length > 1 else 1
            for length, size in zip(shape, voxel_size.zyx, strict=True)
        ]
        return cls((edge_um, edge_um, edge_um), (counts[0], counts[1], counts[2]))


@njit(cache=True, nogil=True, fastmath=True)
def follow(
    packed: NDArray[np.int16],
    threshold_units: float,
    edges: NDArray[np.float32],
    step_um: float,
    smallest_step_um: float,
    rounds: int,
    bin_edges: NDArray[np.float32],
    bin_shape: tuple[int, int, int],
    ends: NDArray[np.uint32],
    start: int,
    stop: int,
) -> int:
    """Follow all foreground voxels of the planes start..stop; write 1 + the bin of their end into `ends`.

    `packed` is a `FlowField`'s; voxels whose logit, in its units, is above the threshold are foreground.
    `edges` are the voxel's edges in um, (z, y, x). Returns the number of foreground voxels.
    """
    depth, height, width, _ = packed.shape
    last_z = np.float32(depth - 1)
    last_y = np.float32(height - 1)
    last_x = np.float32(width - 1)
    per_z = np.float32(1.0) / edges[0]
    per_y = np.float32(1.0) / edges[1]
    per_x = np.float32(1.0) / edges[2]
    slow = np.float32(_SLOW * FLOW_UNITS)
    one = np.float32(1.0)
    zero = np.float32(0.0)
    smallest = np.float32(smallest_step_um)
    threshold = np.float32(threshold_units)
    foreground = 0
    for z in range(start, stop):
        for y in range(height):
            for x in range(width):
                if not np.float32(packed[z, y, x, 3]) > threshold:
                    ends[z, y, x] = 0
                    continue
                foreground += 1
                pz = np.float32(z)
                py = np.float32(y)
                px = np.float32(x)
                step = np.float32(step_um)
                oz = zero
                oy = zero
                ox = zero
                for _ in range(rounds):
                    iz = min(int(pz), depth - 2) if depth > 1 else 0
                    iy = min(int(py), height - 2) if height > 1 else 0
                    ix = min(int(px), width - 2) if width > 1 else 0
                    jz = iz + 1 if depth > 1 else 0
                    jy = iy + 1 if height > 1 else 0
                    jx = ix + 1 if width > 1 else 0
                    tz = pz - np.float32(iz)
                    ty = py - np.float32(iy)
                    tx = px - np.float32(ix)
                    fz = zero
                    fy = zero
                    fx = zero
                    for corner in range(4):
                        cz = iz if corner < 2 else jz
                        cy = iy if corner % 2 == 0 else jy
                        weight = ((one - tz) if corner < 2 else tz) * ((one - ty) if corner % 2 == 0 else ty)
                        left = packed[cz, cy, ix]
                        right = packed[cz, cy, jx]
                        wl = weight * (one - tx)
                        wr = weight * tx
                        fz += wl * np.float32(left[0]) + wr * np.float32(right[0])
                        fy += wl * np.float32(left[1]) + wr * np.float32(right[1])
                        fx += wl * np.float32(left[2]) + wr * np.float32(right[2])
                    if fz * oz + fy * oy + fx * ox < zero:
                        step *= np.float32(0.5)
                        if step < smallest:
                            break
                    oz = fz
                    oy = fy
                    ox = fx
                    length = np.sqrt(fz * fz + fy * fy + fx * fx)
                    if length * step < smallest * slow:
                        break
                    stride = step / max(length, slow)
                    pz = min(max(pz + fz * stride * per_z, zero), last_z)
                    py = min(max(py + fy * stride * per_y, zero), last_y)
                    px = min(max(px + fx * stride * per_x, zero), last_x)
                bz = min(int(pz * edges[0] / bin_edges[0]), bin_shape[0] - 1)
                by = min(int(py * edges[1] / bin_edges[1]), bin_shape[1] - 1)
                bx = min(int(px * edges[2] / bin_edges[2]), bin_shape[2] - 1)
                ends[z, y, x] = np.uint32(1 + (bz * bin_shape[1] + by) * bin_shape[2] + bx)
    return foreground
