"""Segmenting one frame that is larger than the memory: blocks through Dask, OME-Zarr out.

Two passes. In the first, each block is read, segmented and its labels are put into a folder of intermediate
results (`block_tasks`); Dask spreads this over processes or machines (`block_workers`). In the second, nuclei
that several blocks saw are joined, and the masks are written core by core (`block_joining`). A run that was
stopped goes on with the blocks that are missing. Workers on other machines must see the same files and have
this package installed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nuclei3d.console import say
from nuclei3d.core.normalization import IntensityRange, measure_range, sampled_planes
from nuclei3d.core.segmentation.nuclei import Nucleus
from nuclei3d.core.segmentation.settings import SegmentationSettings
from nuclei3d.errors import InputError
from nuclei3d.stages.block_joining import join_blocks
from nuclei3d.stages.block_plan import BlockRun, cut_frame
from nuclei3d.stages.block_tasks import BlockTask
from nuclei3d.stages.block_workers import run_tasks, threads_per_worker
from nuclei3d.stages.prediction_outputs import fingerprint_of
from nuclei3d.volumes.frames import Frame


@dataclass(frozen=True)
class BlockJob:
    """What is done with each block.

    Attributes
    ----------
    settings
        As for the whole volume; any mode but ``cellpose``.
    weights, orthogonal_weights, volume_weights
        Files of the model, of the one for the orthogonal views and of the 3D one of mode ``mixed``, read by
        every worker.
    device
        ``auto``, ``cpu`` or ``cuda``, chosen by each worker for itself.
    identity
        Of models and settings: results of a run before with another are not used.
    """

    settings: SegmentationSettings
    weights: Path
    orthogonal_weights: Path | None
    volume_weights: Path | None
    device: str
    identity: Mapping[str, Any]


def predict_in_blocks(
    frame: Frame, job: BlockJob, run: BlockRun, masks: Path, progress: Callable[[float], None]
) -> list[Nucleus]:
    """Segment a frame block by block.

    Parameters
    ----------
    frame
        The volume.
    job
        Models and settings.
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
        If blocks cannot be small enough or the scheduler does not answer.
    MachineError
        If a worker dies again and again, the scheduler goes away, or the disk is full. Finished blocks are
        kept and the next run goes on with the others.
    """
    if job.settings.mode == "cellpose":
        raise InputError(
            "mode 'cellpose' cannot cut a volume into blocks; use another, or allow more memory "
            "(predict.memory_gb)"
        )
    settings = _with_ranges(frame, job.settings)
    folder = _open_folder(masks, frame, fingerprint_of(frame, job.identity)[:16])
    # Workers need not run in this directory.
    frame = replace(frame, path=frame.path.resolve())
    try:
        blocks = cut_frame(frame, settings, run, folder)
        tasks = [
            BlockTask(
                frame=frame,
                outer=block.outer,
                weights=job.weights.resolve(),
                orthogonal_weights=job.orthogonal_weights.resolve() if job.orthogonal_weights else None,
                volume_weights=job.volume_weights.resolve() if job.volume_weights else None,
                settings=settings,
                device=job.device,
                threads=threads_per_worker(run),
                labels_file=folder.resolve() / f"{block.index:05d}.npy",
            )
            for block in blocks
        ]
        _segment(frame.name, tasks, run, progress)
        nuclei = join_blocks(frame, blocks, tasks, masks)
    except InputError:
        if not any(folder.glob("*.npy")):
            _close_folder(folder)
        raise
    _close_folder(folder)
    return nuclei


def _segment(name: str, tasks: Sequence[BlockTask], run: BlockRun, progress: Callable[[float], None]) -> None:
    """Segment the blocks that are not done yet."""
    missing = [task for task in tasks if not task.is_done]
    before = len(tasks) - len(missing)
    say(f"{name}: {len(tasks)} blocks{f', {before} of them done before' if before else ''}")
    progress(0.95 * before / len(tasks))
    for done, _ in enumerate(run_tasks(missing, run), start=before + 1):
        progress(0.95 * done / len(tasks))


def _with_ranges(frame: Frame, settings: SegmentationSettings) -> SegmentationSettings:
    """Add the range of the whole frame, for each network as it was trained."""
    volume = settings.volume
    if volume is not None:
        volume = replace(volume, intensity_range=_measure_range(frame, volume))
    return replace(settings, intensity_range=_measure_range(frame, settings), volume=volume)


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


def _open_folder(masks: Path, frame: Frame, digest: str) -> Path:
    """Make the folder of intermediate results; what another frame, model or settings left there goes."""
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


def _close_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()
