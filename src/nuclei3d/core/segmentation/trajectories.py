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
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.volumes.voxel_size import VoxelSize

FLOW_SCALE = 16384.0
"""Packed flows are int16 in units of 1 / FLOW_SCALE: lengths up to 2, precise to 0.00006."""

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


@njit(cache=True, nogil=True)
def pack_flow(
    flow: NDArray[np.floating[Any]],
    logit: NDArray[np.floating[Any]],
    threshold: float,
    packed: NDArray[np.int16],
    start: int,
    stop: int,
) -> int:
    """Write planes start..stop of the flow as int16 (Z, Y, X, 4).

    The last entry is 1 on the foreground. Flows that are not finite become 0 and background. Returns the
    number of foreground voxels.
    """
    _, height, width = logit.shape
    count = 0
    for z in range(start, stop):
        for y in range(height):
            for x in range(width):
                here = packed[z, y, x]
                fz = flow[0, z, y, x]
                fy = flow[1, z, y, x]
                fx = flow[2, z, y, x]
                length = np.sqrt(fz * fz + fy * fy + fx * fx)
                if not np.isfinite(length):
                    here[:] = 0
                    continue
                scale = FLOW_SCALE if length <= 1.5 else FLOW_SCALE * 1.5 / length
                here[0] = np.int16(fz * scale)
                here[1] = np.int16(fy * scale)
                here[2] = np.int16(fx * scale)
                here[3] = 0
                if logit[z, y, x] > threshold:
                    here[3] = 1
                    count += 1
    return count


@njit(cache=True, nogil=True, fastmath=True)
def follow(
    packed: NDArray[np.int16],
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

    `edges` are the voxel's edges in um, (z, y, x). Returns the number of steps taken by all particles.
    """
    depth, height, width, _ = packed.shape
    last_z = np.float32(depth - 1)
    last_y = np.float32(height - 1)
    last_x = np.float32(width - 1)
    per_z = np.float32(1.0) / edges[0]
    per_y = np.float32(1.0) / edges[1]
    per_x = np.float32(1.0) / edges[2]
    slow = np.float32(_SLOW * FLOW_SCALE)
    one = np.float32(1.0)
    zero = np.float32(0.0)
    smallest = np.float32(smallest_step_um)
    taken = 0
    for z in range(start, stop):
        for y in range(height):
            for x in range(width):
                if packed[z, y, x, 3] == 0:
                    ends[z, y, x] = 0
                    continue
                pz = np.float32(z)
                py = np.float32(y)
                px = np.float32(x)
                step = np.float32(step_um)
                oz = zero
                oy = zero
                ox = zero
                for _ in range(rounds):
                    taken += 1
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
    return taken
