"""Segmenting one frame that is larger than the memory: blocks through Dask, OME-Zarr out.

Two passes. In the first, each block is read, segmented and its labels are put into a folder of intermediate
results; this is what Dask spreads over processes or machines. In the second, nuclei that several blocks saw
are joined, and the masks are written core by core. A run that was stopped goes on with the blocks that are
missing. Workers on other machines must see the same files and have this package installed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.console import say
from nuclei3d.core.normalization import IntensityRange, measure_range, sampled_planes
from nuclei3d.core.segmentation.blocks import (
    MARGIN_DIAMETERS,
    Block,
    BlockNuclei,
    Box,
    assemble_core,
    choose_owners,
    locate_nuclei,
    match_shared,
    merge_nuclei,
    plan_blocks,
)
from nuclei3d.core.segmentation.grids import view_grid
from nuclei3d.core.segmentation.nuclei import Nucleus, measure_nuclei
from nuclei3d.core.segmentation.prediction import label_volume
from nuclei3d.core.segmentation.settings import SegmentationSettings
from nuclei3d.errors import InputError
from nuclei3d.volumes.frames import Frame
from nuclei3d.volumes.voxel_size import VoxelSize
from nuclei3d.volumes.whole import whole_file, whole_folder

if TYPE_CHECKING:
    from distributed import Client

    from nuclei3d.models.folder import Model

CHUNK = (64, 256, 256)

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


@dataclass(frozen=True)
class BlockTask:
    """All that a worker needs for one block."""

    frame: Frame
    outer: Box
    voxel_size: VoxelSize
    weights: Path
    settings: SegmentationSettings
    device: str
    threads: int | None
    target: Path


def required_gb(frame: Frame, voxel_size: VoxelSize, settings: SegmentationSettings) -> float:
    """Estimate the memory that a frame takes when it is segmented as a whole."""
    return (_PROCESS_BYTES + _voxel_bytes(frame, voxel_size, settings) * float(np.prod(frame.shape))) / 1e9


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
    blocks = _plan(frame, voxel_size, settings, run)
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
            _threads_per_worker(run),
            scratch / f"{block.index:05d}.npy",
        )
        for block in blocks
    ]
    missing = [task for task in tasks if not _is_done(task)]
    kept = f", {len(tasks) - len(missing)} of them done before" if len(missing) < len(tasks) else ""
    say(f"{frame.name}: {len(blocks)} blocks{kept}")
    for done, _ in enumerate(_run_tasks(missing, run), start=len(tasks) - len(missing) + 1):
        progress(0.95 * done / len(tasks))
    nuclei = _join(frame, voxel_size, blocks, tasks, masks)
    shutil.rmtree(scratch, ignore_errors=True)
    return nuclei


def segment_block(task: BlockTask) -> int:
    """Segment one block and write its labels and scores; runs in a worker.

    Returns
    -------
    int
        Number of nuclei.
    """
    import torch

    from nuclei3d.core.networks import choose_device
    from nuclei3d.volumes.checks import check_image

    if task.threads is not None:
        torch.set_num_threads(task.threads)
    image = task.frame.read_block(task.outer)
    check_image(image, str(task.frame.path))
    labels, scores, _ = label_volume(
        image, task.voxel_size, _network(task.weights), task.settings, choose_device(task.device)
    )
    scores_file = _scores_file(task)
    with whole_file(scores_file) as partial, partial.open("wb") as file:
        np.save(file, scores, allow_pickle=False)
    with whole_file(task.target) as partial, partial.open("wb") as file:
        np.save(file, labels, allow_pickle=False)
    return len(scores) - 1


@lru_cache(maxsize=1)
def _network(weights: Path) -> Any:
    from nuclei3d.models.folder import load_model

    return load_model(weights).network


def _voxel_bytes(frame: Frame, voxel_size: VoxelSize, settings: SegmentationSettings) -> float:
    grid, _, _ = view_grid(frame.shape, voxel_size, settings)
    share = float(np.prod(grid)) / float(np.prod(frame.shape))
    return _GRID_BYTES * share + _IMAGE_BYTES + frame.dtype.itemsize


def _plan(frame: Frame, voxel_size: VoxelSize, settings: SegmentationSettings, run: BlockRun) -> list[Block]:
    room = run.worker_gb * 1e9 - _PROCESS_BYTES
    margin_um = MARGIN_DIAMETERS * settings.nucleus_diameter_um
    return plan_blocks(
        frame.shape, voxel_size, margin_um, max(0.0, room) / _voxel_bytes(frame, voxel_size, settings)
    )


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


def _threads_per_worker(run: BlockRun) -> int | None:
    from nuclei3d.core.label_boxes import available_threads

    if run.scheduler is not None or run.workers == 1:
        return None
    return max(1, available_threads() // run.workers)


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


def _scores_file(task: BlockTask) -> Path:
    return task.target.with_name(f"{task.target.stem}_scores.npy")


def _is_done(task: BlockTask) -> bool:
    return task.target.is_file() and _scores_file(task).is_file()


def _run_tasks(tasks: Sequence[BlockTask], run: BlockRun) -> Iterator[int]:
    """Run the tasks, giving the number of nuclei of each as it is done."""
    if not tasks:
        return
    if run.workers == 1 and run.scheduler is None:
        for task in tasks:
            yield segment_block(task)
        return
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    with _client(run) as client:
        futures = client.map(segment_block, tasks, pure=False)
        try:
            for future in as_completed(futures):  # type: ignore[no-untyped-call]
                yield future.result()
        except KilledWorker:
            raise InputError(
                "a worker died several times over the same block, most likely for want of memory; lower "
                "predict.memory_gb so that blocks are smaller, or use fewer workers. Finished blocks are "
                "kept: run the same command again"
            ) from None
        finally:
            client.cancel(futures)  # type: ignore[no-untyped-call]


@contextmanager
def _client(run: BlockRun) -> Iterator[Client]:
    import logging

    import dask
    from distributed import Client, LocalCluster

    # A worker that is told to end is no news.
    logging.getLogger("distributed").setLevel(logging.ERROR)
    if run.scheduler is not None:
        try:
            client = Client(  # type: ignore[no-untyped-call]
                run.scheduler, timeout="10s"
            )
        except (OSError, ValueError, TimeoutError) as error:
            reason = " ".join(str(error).split()) or "no answer within 10 s"
            raise InputError(
                f"no Dask scheduler at {run.scheduler} ({reason}); start one with: dask scheduler"
            ) from None
        with client:
            if not client.scheduler_info()["workers"]:
                say(f"{run.scheduler} has no workers yet; waiting for the first")
            yield client
        return
    with (
        dask.config.set({"distributed.worker.daemon": True, "distributed.scheduler.allowed-failures": 2}),
        LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=run.workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address=None,
        ) as cluster,
        Client(cluster) as client,  # type: ignore[no-untyped-call]
    ):
        yield client


def _join(
    frame: Frame, voxel_size: VoxelSize, blocks: Sequence[Block], tasks: Sequence[BlockTask], masks: Path
) -> list[Nucleus]:
    """Join the nuclei of all blocks and write the masks core by core."""
    from nuclei3d.volumes.zarr_store import create_zarr

    located = [
        locate_nuclei(block, np.asarray(_labels(task)), voxel_size)
        for block, task in zip(blocks, tasks, strict=True)
    ]
    matches: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for a, b in itertools.combinations(range(len(blocks)), 2):
        shared = blocks[a].shared(blocks[b])
        if shared is not None:
            matches[a, b] = _match(blocks, located, tasks, a, b, shared)
    final = choose_owners(located, matches)
    scores: dict[int, float] = {}
    for table, task in zip(final, tasks, strict=True):
        own = np.load(_scores_file(task), allow_pickle=False)
        scores.update({int(label): float(own[i]) for i, label in enumerate(table) if label})
    count = max(scores, default=0)
    parts: list[list[Nucleus]] = []
    with whole_folder(masks) as partial:
        dtype = np.uint16 if count < 2**16 else np.uint32
        array = create_zarr(partial, frame.shape, dtype, voxel_size, CHUNK, labels=True)
        for block in blocks:
            labels = _core_labels(block, blocks, tasks, final)
            array[block.core] = labels.astype(dtype)
            parts.append(_measure_core(frame, block, labels, voxel_size, count))
    return merge_nuclei(parts, scores)


def _labels(task: BlockTask) -> NDArray[np.uint32]:
    labels: NDArray[np.uint32] = np.load(task.target, mmap_mode="r", allow_pickle=False)
    return labels


def _match(
    blocks: Sequence[Block],
    located: Sequence[BlockNuclei],
    tasks: Sequence[BlockTask],
    a: int,
    b: int,
    shared: Box,
) -> list[tuple[int, int]]:
    first = np.asarray(_labels(tasks[a])[blocks[a].within(shared)])
    second = np.asarray(_labels(tasks[b])[blocks[b].within(shared)])
    return match_shared(located[a], located[b], first, second, shared)


def _core_labels(
    block: Block, blocks: Sequence[Block], tasks: Sequence[BlockTask], final: Sequence[NDArray[np.uint32]]
) -> NDArray[np.uint32]:
    others = [b for b in blocks if b.index != block.index and b.shared(block) is not None]
    return assemble_core(block, [(b, _labels(tasks[b.index]), final[b.index]) for b in [block, *others]])


def _measure_core(
    frame: Frame, block: Block, labels: NDArray[np.uint32], voxel_size: VoxelSize, count: int
) -> list[Nucleus]:
    """Measure what lies in one core, with positions from the volume's origin."""
    image = frame.read_block(block.core)
    z, y, x = (part.start * edge for part, edge in zip(block.core, voxel_size.zyx, strict=True))
    return [
        replace(nucleus, z_um=nucleus.z_um + z, y_um=nucleus.y_um + y, x_um=nucleus.x_um + x)
        for nucleus in measure_nuclei(labels, image, voxel_size, np.zeros(count + 1, np.float32))
    ]
