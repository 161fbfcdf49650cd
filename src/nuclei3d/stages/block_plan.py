"""How a frame is cut: what a worker may use, how many bytes a voxel takes, how large blocks may be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nuclei3d.core.segmentation.blocks import MARGIN_DIAMETERS, Block, plan_blocks
from nuclei3d.core.segmentation.grids import view_grid
from nuclei3d.core.segmentation.settings import SegmentationSettings
from nuclei3d.volumes.frames import Frame
from nuclei3d.volumes.voxel_size import VoxelSize

_PROCESS_BYTES = 1.0e9
"""Of a worker before it sees a volume: Python, torch, the network and one batch of planes."""
_GRID_BYTES = 40.0
"""Per voxel of the view grid (measured: 37): flow, logit, dynamics, labels."""
_IMAGE_BYTES = 8.0
"""Per voxel of the image, beside the image itself: a float copy, labels."""


@dataclass(frozen=True)
class BlockRun:
    """How blocks are run.

    Attributes
    ----------
    memory_gb
        What all workers on this machine together may use (on a cluster: each worker).
    workers
        Processes on this machine; 1 means this process.
    scheduler
        Address of a Dask scheduler that is already there; None for none.
    """

    memory_gb: float
    workers: int = 1
    scheduler: str | None = None

    @property
    def worker_gb(self) -> float:
        """What one worker may use."""
        return self.memory_gb / (1 if self.scheduler else self.workers)


def required_gb(frame: Frame, voxel_size: VoxelSize, settings: SegmentationSettings) -> float:
    """Estimate the memory that a frame takes when it is segmented as a whole."""
    return (_PROCESS_BYTES + _voxel_bytes(frame, voxel_size, settings) * float(np.prod(frame.shape))) / 1e9


def cut_frame(
    frame: Frame, voxel_size: VoxelSize, settings: SegmentationSettings, run: BlockRun
) -> list[Block]:
    """Cut a frame into as few blocks as each fit into what a worker may use.

    Raises
    ------
    InputError
        If blocks cannot be small enough.
    """
    room = run.worker_gb * 1e9 - _PROCESS_BYTES
    margin_um = MARGIN_DIAMETERS * settings.nucleus_diameter_um
    return plan_blocks(
        frame.shape, voxel_size, margin_um, max(0.0, room) / _voxel_bytes(frame, voxel_size, settings)
    )


def _voxel_bytes(frame: Frame, voxel_size: VoxelSize, settings: SegmentationSettings) -> float:
    grid, _, _ = view_grid(frame.shape, voxel_size, settings)
    share = float(np.prod(grid)) / float(np.prod(frame.shape))
    return _GRID_BYTES * share + _IMAGE_BYTES + frame.dtype.itemsize
