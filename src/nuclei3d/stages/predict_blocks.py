"""Segmenting one frame that is larger than the memory: blocks through Dask, OME-Zarr out.

Two passes. In the first, each block is read, segmented and its labels are put into a folder of intermediate
results (`block_tasks`); Dask spreads this over processes or machines (`block_workers`). In the second, nuclei
that several blocks saw are joined, and the masks are written core by core (`block_joining`). A run that was
stopped goes on with the blocks that are missing. Workers on other machines must see the same files and have
this package installed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from nuclei3d.console import say
from nuclei3d.core.normalization import IntensityRange, measure_range, sampled_planes
from nuclei3d.core.segmentation.blocks import Block
from nuclei3d.core.segmentation.nuclei import Nucleus
from nuclei3d.core.segmentation.settings import SegmentationSettings
from nuclei3d.errors import InputError
from nuclei3d.models.folder import Model
from nuclei3d.stages.block_joining import join_blocks
from nuclei3d.stages.block_plan import BlockRun, cut_frame
from nuclei3d.stages.block_tasks import BlockTask
from nuclei3d.stages.block_workers import run_tasks, threads_per_worker
from nuclei3d.volumes.frames import Frame


def predict_in_blocks(
    frame: Frame,
    model: Model,
    settings: SegmentationSettings,
    device: str,
    run: BlockRun,
    masks: Path,
    progress: Callable[[float], None],
) -> list[Nucleus]:
    """Segment a frame block by block.

    Parameters
    ----------
    frame
        The volume.
    model
        Its weights file is read by every worker.
    settings
        As for the whole volume; mode ``ortho`` or ``stitch``.
    device
        ``auto``, ``cpu`` or ``cuda``, chosen by each worker for itself.
    run
        Memory and workers.
    masks
        OME-Zarr folder to write, whole or not at all.
    progress
        Called with the share done.

    Returns
    -------
    list of Nucleus

    Raises
    ------
    InputError
        If blocks cannot be small enough, the scheduler does not answer, or a worker dies again and again.
        Finished blocks are kept and the next run goes on with the others.
    """
    if settings.mode not in ("ortho", "stitch"):
        raise InputError(
            f"mode '{settings.mode}' cannot cut a volume into blocks; use ortho or stitch, or allow more "
            "memory (predict.memory_gb)"
        )
    voxel_size = frame.require_voxel_size()
    blocks = cut_frame(frame, voxel_size, settings, run)
    settings = replace(settings, intensity_range=_measure_range(frame, settings))
    scratch = _scratch_folder(frame, blocks, settings, model, masks)
    tasks = [
        BlockTask(
            frame,
            block.outer,
            voxel_size,
            model.path.resolve(),
            settings,
            device,
            threads_per_worker(run),
            scratch / f"{block.index:05d}.npy",
        )
        for block in blocks
    ]
    missing = [task for task in tasks if not task.is_done]
    kept = f", {len(tasks) - len(missing)} of them done before" if len(missing) < len(tasks) else ""
    say(f"{frame.name}: {len(blocks)} blocks{kept}")
    for done, _ in enumerate(run_tasks(missing, run), start=len(tasks) - len(missing) + 1):
        progress(0.95 * done / len(tasks))
    nuclei = join_blocks(frame, voxel_size, blocks, tasks, masks)
    shutil.rmtree(scratch, ignore_errors=True)
    return nuclei


def _measure_range(frame: Frame, settings: SegmentationSettings) -> IntensityRange:
    """Measure the range of the whole frame from the planes that `measure_range` would take, and no others."""
    _, height, width = frame.shape
    whole_plane = (slice(0, height), slice(0, width))
    planes = [frame.read_block((slice(z, z + 1), *whole_plane)) for z in sampled_planes(frame.shape)]
    return measure_range(
        np.concatenate(planes),
        settings.lower_percentile,
        settings.upper_percentile,
        settings.noise_floor,
        sampled=True,
    )


def _scratch_folder(
    frame: Frame, blocks: Sequence[Block], settings: SegmentationSettings, model: Model, masks: Path
) -> Path:
    """Make the folder of intermediate results; what another frame, model or settings left there goes."""
    status = frame.path.stat()
    content = {
        "frame": [
            str(frame.path.resolve()),
            status.st_size,
            status.st_mtime_ns,
            frame.time,
            repr(frame.axes),
        ],
        "voxel_size_um": frame.require_voxel_size().zyx,
        "weights": hashlib.sha256(model.path.read_bytes()).hexdigest(),
        "settings": asdict(settings),
        "blocks": [repr(block.outer) for block in blocks],
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
    parent = masks.parent / f".{frame.name}_blocks"
    folder = parent / digest
    for other in parent.glob("*") if parent.is_dir() else ():
        if other.name != digest:
            shutil.rmtree(other, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another place") from None
    return folder
