"""How a frame is cut: what a worker may use, how many bytes a voxel takes, how large blocks may be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nuclei3d.config.predict import PredictParams
from nuclei3d.core.segmentation.blocks import MARGIN_DIAMETERS, Block, count_blocks, lay_blocks, plan_blocks
from nuclei3d.core.segmentation.grids import view_grid
from nuclei3d.core.segmentation.settings import SegmentationSettings
from nuclei3d.volumes.frames import Frame
from nuclei3d.volumes.whole import whole_file

_PROCESS_BYTES = 1.0e9
"""Of a worker before it sees a volume: Python, torch, the network and one batch of planes."""
_GRID_BYTES = 26.0
"""Per voxel of the view grid (measured: 20): normalised volume, flow, logit, dynamics, labels."""
_CONSENSUS_BYTES = 34.0
"""Per voxel of the view grid, beside those: three views in half precision, the fused flow in single."""
_FIELD_BYTES = 8.0
"""Per voxel of a flow field (`nuclei3d.core.segmentation.flow_field`)."""
_IMAGE_BYTES = 8.0
"""Per voxel of the image, beside the image itself: a float copy, labels."""


_SHARE = 0.8
"""Of the memory that is free, where the user names no limit: the rest is left to the machine."""
_PLAN_FILE = "blocks.json"


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
    slack
        By how much blocks of a run before may exceed that limit: above 1 where nobody asked for it.
    """

    memory_gb: float
    workers: int = 1
    scheduler: str | None = None
    slack: float = 1.0

    @classmethod
    def wished(cls, predict: PredictParams) -> BlockRun:
        """Take what the user asks for; without a limit of the memory, a share of what is free now."""
        if predict.memory_gb is not None:
            return cls(predict.memory_gb, predict.workers, predict.scheduler)
        import psutil

        free_gb = psutil.virtual_memory().available / 1e9
        return cls(_SHARE * free_gb, predict.workers, predict.scheduler, 1 / _SHARE)

    @property
    def worker_gb(self) -> float:
        """What one worker may use."""
        return self.memory_gb / (1 if self.scheduler else self.workers)


def required_gb(frame: Frame, settings: SegmentationSettings) -> float:
    """Estimate the memory that a frame takes when it is segmented as a whole."""
    return (_PROCESS_BYTES + _voxel_bytes(frame, settings) * float(np.prod(frame.shape))) / 1e9


def cut_frame(frame: Frame, settings: SegmentationSettings, run: BlockRun, folder: Path) -> list[Block]:
    """Cut a frame into as few blocks as each fit into what a worker may use.

    Blocks of a run that was stopped are kept where a worker can hold them: free memory varies.

    Parameters
    ----------
    folder
        Of intermediate results. It remembers the blocks; the results of others are removed.

    Raises
    ------
    InputError
        If blocks cannot be small enough.
    """
    margin_um = MARGIN_DIAMETERS * settings.nucleus_diameter_um
    voxel_size = frame.require_voxel_size()
    voxel_bytes = _voxel_bytes(frame, settings)
    pixels = list(zip(*(_pixels(frame, each) for each in settings.passes), strict=True))
    counts = _read_counts(folder / _PLAN_FILE)
    if counts is not None:
        blocks = lay_blocks(frame.shape, voxel_size, margin_um, counts, pixels)
        room = run.slack * run.worker_gb * 1e9 - _PROCESS_BYTES
        if max(block.voxels for block in blocks) * voxel_bytes <= room:
            return blocks
    room = max(0.0, run.worker_gb * 1e9 - _PROCESS_BYTES)
    blocks = plan_blocks(frame.shape, voxel_size, margin_um, room / voxel_bytes, pixels)
    if count_blocks(blocks) != counts:
        for result in folder.glob("*.npy"):
            result.unlink()
        with whole_file(folder / _PLAN_FILE) as partial:
            partial.write_text(json.dumps(count_blocks(blocks)), encoding="utf-8")
    return blocks


def _read_counts(file: Path) -> tuple[int, int, int] | None:
    try:
        z, y, x = (int(count) for count in json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return (z, y, x) if min(z, y, x) > 0 else None


def _pixels(frame: Frame, settings: SegmentationSettings) -> tuple[float, ...]:
    """Give the network's pixels per voxel of the frame along (z, y, x)."""
    (_, height, width), _, depth = view_grid(frame.shape, frame.require_voxel_size(), settings)
    # a 3D network pools the image's own planes
    depth = frame.shape[0] if settings.mode == "full3d" else depth
    return tuple(new / old for new, old in zip((depth, height, width), frame.shape, strict=True))


def _voxel_bytes(frame: Frame, settings: SegmentationSettings) -> float:
    bytes_of_pass = []
    for each in settings.passes:
        grid, _, _ = view_grid(frame.shape, frame.require_voxel_size(), each)
        share = float(np.prod(grid)) / float(np.prod(frame.shape))
        consensus = each.fusion == "consensus" and each.mode != "full3d"
        bytes_of_pass.append((_GRID_BYTES + (_CONSENSUS_BYTES if consensus else 0)) * share)
    if settings.volume is not None:
        # share is that of the 3D network, whose field is kept while the views are computed
        bytes_of_pass[0] += _FIELD_BYTES * share
    return max(bytes_of_pass) + _IMAGE_BYTES + frame.dtype.itemsize
