"""What a network says of a volume: flow and logit of every voxel, packed into eight bytes.

The four numbers of a voxel lie side by side as int16, which is what the dynamics read, at random places, most
of the time; and the views of a volume are summed up in them as they come. So no copy of a field is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from nuclei3d.errors import InputError
from nuclei3d.grid import available_threads, resize_nearest
from nuclei3d.images.voxel_size import VoxelSize

FLOW_UNITS = 16384.0
"""Units of a flow of length 1: components are precise to 0.00006, and reach to 2."""

LOGIT_UNITS = 1024.0
"""Units of a logit of 1: precise to 0.001, and reach to 32."""

LOGIT = 3
"""Number of the logit among the components of a field, after the flow's z, y and x."""

MOST_UNITS = 32767
_MOST_FLOW = MOST_UNITS / FLOW_UNITS
_MOST_LOGIT = MOST_UNITS / LOGIT_UNITS
_LONGEST = 1.5
_EXCLUDED = (0, 0, 0, -MOST_UNITS)


@dataclass(frozen=True)
class FlowField:
    """Flow and logit of a volume.

    `packed` is int16 (z, y, x, 4): the flow's components z, y, x in units of 1 / `FLOW_UNITS`, about unit
    vectors in physical space; the logit of being inside a nucleus in units of 1 / `LOGIT_UNITS`.
    """

    packed: NDArray[np.int16]
    voxel_size: VoxelSize

    @classmethod
    def zeros(cls, shape: Sequence[int], voxel_size: VoxelSize) -> FlowField:
        """Make a field of zeros, to which `add` adds."""
        return cls(np.zeros((*shape, 4), np.int16), voxel_size)

    @classmethod
    def of(
        cls,
        flow: NDArray[np.floating[Any]],
        logit: NDArray[np.floating[Any]],
        voxel_size: VoxelSize,
        threads: int | None = None,
    ) -> FlowField:
        """Pack a flow (3, z, y, x), components (z, y, x), and a logit (z, y, x), both float16 or float32.

        Vectors longer than 1.5 are shortened to that, the logit is cut at 32; a voxel without a finite flow
        or a logit gets flow 0 and the lowest logit. Raises InputError if the shapes do not fit.
        """
        if logit.ndim != 3 or flow.shape != (3, *logit.shape):
            raise InputError(
                f"dynamics: flow {flow.shape} and logit {logit.shape} do not fit; "
                "expected (3, Z, Y, X) and (Z, Y, X)"
            )
        packed = np.empty((*logit.shape, 4), np.int16)
        threads = threads or available_threads()

        def pack(start: int, stop: int) -> None:
            # Slab by slab: numba knows no half precision, and the whole in single would take much memory.
            slab = np.ascontiguousarray(flow[:, start:stop], dtype=np.float32)
            _pack(slab, np.ascontiguousarray(logit[start:stop], dtype=np.float32), packed[start:stop])

        slabs = np.linspace(0, len(packed), min(len(packed), 8 * threads) + 1).astype(int)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(pack, slabs[:-1], slabs[1:]))
        return cls(packed, voxel_size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (z, y, x) of the grid."""
        depth, height, width = self.packed.shape[:3]
        return depth, height, width

    @property
    def flow(self) -> NDArray[np.float32]:
        """The flow as float32 (3, z, y, x); a new array."""
        return self.unpack((slice(None), slice(None), slice(None)))[0]

    @property
    def logit(self) -> NDArray[np.float32]:
        """The logit as float32 (z, y, x); a new array."""
        return self.packed[..., 3] / np.float32(LOGIT_UNITS)

    def unpack(self, box: tuple[slice, slice, slice]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Give flow, float32 (3, z, y, x), and logit, float32 (z, y, x), of a box of the grid."""
        part = self.packed[box]
        flow = np.moveaxis(part[..., :3], 3, 0).astype(np.float32, order="C")
        flow /= np.float32(FLOW_UNITS)
        return flow, part[..., 3] / np.float32(LOGIT_UNITS)

    def fetch(self) -> FlowField:
        """Give the field on the host, where it is."""
        return self

    def to(self, device: torch.device) -> DeviceField:
        """Copy the field to a device."""
        return DeviceField(torch.from_numpy(self.packed).to(device, copy=True), self.voxel_size)

    def exclude(self, outside: NDArray[np.bool_]) -> None:
        """Let no nucleus be where `outside` (z, y, x), on any grid of the same box, is true."""
        there = resize_nearest(outside, self.shape)
        self.packed[there] = _EXCLUDED

    def add(
        self,
        box: tuple[slice, slice, slice],
        component: int,
        values: NDArray[np.float32],
        share: float | NDArray[np.float32],
    ) -> None:
        """Add a share of what is said of one component (0, 1, 2: flow along z, y, x; `LOGIT`) in a box.

        `values`, of the box's shape, are cut at what a field can hold (2 for flows, 32 for logits); those
        that are no numbers count as a flow of 0 or the lowest logit. All shares of a voxel sum to 1.
        """
        units, most = (LOGIT_UNITS, _MOST_LOGIT) if component == LOGIT else (FLOW_UNITS, _MOST_FLOW)
        invalid = -most if component == LOGIT else 0.0
        shares = np.broadcast_to(np.asarray(share, np.float32), values.shape)
        _add(self.packed[(*box, component)], values, shares, units, most, invalid)


@dataclass(frozen=True)
class DeviceField:
    """A `FlowField` in the memory of a GPU: `packed` is a tensor, int16 (z, y, x, 4)."""

    packed: Tensor
    voxel_size: VoxelSize

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (z, y, x) of the grid."""
        depth, height, width = self.packed.shape[:3]
        return depth, height, width

    @torch.inference_mode()
    def exclude(self, outside: NDArray[np.bool_]) -> None:
        """Let no nucleus be where `outside` is true, as `FlowField.exclude` does."""
        there = torch.from_numpy(resize_nearest(outside, self.shape)).to(self.packed.device)
        self.packed[there] = torch.tensor(_EXCLUDED, dtype=torch.int16, device=there.device)

    def fetch(self) -> FlowField:
        """Bring the field to the host."""
        return FlowField(self.packed.cpu().numpy(), self.voxel_size)


@njit(cache=True, nogil=True)
def _pack(flow: NDArray[np.float32], logit: NDArray[np.float32], packed: NDArray[np.int16]) -> None:
    depth, height, width = logit.shape
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                here = packed[z, y, x]
                fz = flow[0, z, y, x]
                fy = flow[1, z, y, x]
                fx = flow[2, z, y, x]
                length = np.sqrt(fz * fz + fy * fy + fx * fx)
                value = logit[z, y, x]
                if np.isnan(value) or not np.isfinite(length):
                    here[:3] = 0
                    here[3] = -32767
                    continue
                scale = FLOW_UNITS if length <= _LONGEST else FLOW_UNITS * _LONGEST / length
                here[0] = np.int16(fz * scale)
                here[1] = np.int16(fy * scale)
                here[2] = np.int16(fx * scale)
                here[3] = np.int16(np.rint(min(max(value, -_MOST_LOGIT), _MOST_LOGIT) * LOGIT_UNITS))


@njit(cache=True, nogil=True)
def _add(
    target: NDArray[np.int16],
    values: NDArray[np.float32],
    shares: NDArray[np.float32],
    units: float,
    most: float,
    invalid: float,
) -> None:
    depth, height, width = target.shape
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                value = values[z, y, x]
                value = invalid if np.isnan(value) else min(max(value, -most), most)
                units_here = np.rint(value * shares[z, y, x] * units) + target[z, y, x]
                # Shares that sum to 1 may round to a unit too many.
                target[z, y, x] = np.int16(min(max(units_here, -32767.0), 32767.0))
