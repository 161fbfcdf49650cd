"""Segmenting one frame that is larger than the memory: blocks through Dask, OME-Zarr out.

Two passes. In the first, each block is read, segmented and its labels are put into a folder of intermediate
results; Dask spreads this over processes or machines. In the second, nuclei that several blocks saw are
joined, and the masks are written core by core. A run that was stopped goes on with the blocks that are
missing. Workers on other machines must see the same files and have this package installed.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from nuclei3d.config.sections import PredictParams
from nuclei3d.console import say
from nuclei3d.errors import InputError, MachineError, reason_of
from nuclei3d.grid import available_threads
from nuclei3d.images.frames import Frame, check_image
from nuclei3d.images.ome_zarr import create_zarr
from nuclei3d.networks.folder import Model, load_model
from nuclei3d.outputs import whole_file, whole_folder, write_text
from nuclei3d.segmentation.blocks import (
    MARGIN_DIAMETERS,
    Block,
    assemble_core,
    choose_owners,
    count_blocks,
    lay_blocks,
    locate_nuclei,
    match_shared,
    meet,
    merge_nuclei,
    plan_blocks,
    within,
)
from nuclei3d.segmentation.masks import Nucleus, measure_nuclei
from nuclei3d.segmentation.network_pass import Networks
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.segmentation.settings import SegmentationSettings, view_grid, with_ranges
from nuclei3d.stages.diameters import read_sampled_planes

if TYPE_CHECKING:
    from distributed import Client

_PROCESS_BYTES = 1.0e9
"""Of a worker before it sees a volume: Python, torch, the network and one batch of planes."""
_GRID_BYTES = 26.0
"""Per voxel of the view grid (measured: 20): normalised volume, flow, logit, dynamics, labels."""
_CONSENSUS_BYTES = 34.0
"""Per voxel of the view grid, beside those: three views in half precision, the fused flow in single."""
_FIELD_BYTES = 8.0
"""Per voxel of a flow field (`nuclei3d.segmentation.flow_field`)."""
_IMAGE_BYTES = 8.0
"""Per voxel of the image, beside the image itself: a float copy, labels."""
_SHARE = 0.8
"""Of the memory that is free, where the user names no limit: the rest is left to the machine."""
_PLAN_FILE = "blocks.json"
_CHUNK = (64, 256, 256)
_ANSWER_S = 10
"""How long a scheduler may take to answer at first."""


@dataclass(frozen=True)
class BlockRun:
    """How blocks are run: the parameters of the prediction, with a limit of the memory.

    `memory_gb` is for all workers on this machine together (on a cluster: for each). Blocks of a run before
    may exceed it by `slack`: above 1 where nobody asked for a limit.
    """

    memory_gb: float
    workers: int = 1
    scheduler: str | None = None
    slack: float = 1.0
    device: str = "auto"

    @classmethod
    def of(cls, predict: PredictParams) -> BlockRun:
        """Take what the user asks for; without a limit of the memory, a share of what is free now."""
        memory_gb, slack = predict.memory_gb, 1.0
        if memory_gb is None:
            import psutil

            memory_gb, slack = _SHARE * psutil.virtual_memory().available / 1e9, 1 / _SHARE
        return cls(memory_gb, predict.workers, predict.scheduler, slack, predict.device)

    @property
    def worker_gb(self) -> float:
        """What one worker may use."""
        return self.memory_gb / (1 if self.scheduler else self.workers)

    @property
    def threads_per_worker(self) -> int | None:
        """How many threads a worker may use; None for all."""
        return None if self.scheduler or self.workers == 1 else max(1, available_threads() // self.workers)


def required_gb(frame: Frame, settings: SegmentationSettings) -> float:
    """Estimate the memory that a frame takes when it is segmented as a whole."""
    return (_PROCESS_BYTES + _voxel_bytes(frame, settings) * float(np.prod(frame.shape))) / 1e9


def cut_frame(frame: Frame, settings: SegmentationSettings, run: BlockRun, folder: Path) -> list[Block]:
    """Cut a frame into as few blocks as each fit into what a worker may use.

    Blocks of a run that was stopped are kept where a worker can hold them: free memory varies. The folder of
    intermediate results remembers them; the results of other blocks are removed.
    """
    margin_um = MARGIN_DIAMETERS * settings.nucleus_diameter_um
    voxel_size = frame.require_voxel_size()
    voxel_bytes = _voxel_bytes(frame, settings)
    pixels = list(zip(*(_pixels(frame, each) for each in settings.passes), strict=True))
    plan, counts = folder / _PLAN_FILE, None
    if plan.is_file():
        counts = tuple(json.loads(plan.read_text(encoding="utf-8")))
        blocks = lay_blocks(frame.shape, voxel_size, margin_um, counts, pixels)
        room = run.slack * run.worker_gb * 1e9 - _PROCESS_BYTES
        if max(block.voxels for block in blocks) * voxel_bytes <= room:
            return blocks
    room = max(0.0, run.worker_gb * 1e9 - _PROCESS_BYTES)
    blocks = plan_blocks(frame.shape, voxel_size, margin_um, room / voxel_bytes, pixels)
    if count_blocks(blocks) != counts:
        for result in folder.glob("*.npy"):
            result.unlink()
        write_text(plan, json.dumps(count_blocks(blocks)))
    return blocks


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


@dataclass(frozen=True)
class BlockTask:
    """All that a worker needs for one block.

    `weights` are files by the names that `Networks` gives; the settings hold the range of intensities of the
    whole frame; `threads` are torch's, None for all.
    """

    frame: Frame
    block: Block
    weights: Mapping[str, Path]
    settings: SegmentationSettings
    device: str
    threads: int | None
    labels_file: Path

    @property
    def scores_file(self) -> Path:
        """Where the scores go."""
        return self.labels_file.with_name(f"{self.labels_file.stem}_scores.npy")

    @property
    def is_done(self) -> bool:
        """Whether the block was segmented, now or by a run before."""
        return self.labels_file.is_file() and self.scores_file.is_file()

    def open_labels(self) -> NDArray[np.uint32]:
        """Open the labels (z, y, x) of the outer box; they stay on disk."""
        labels: NDArray[np.uint32] = np.load(self.labels_file, mmap_mode="r", allow_pickle=False)
        return labels


def segment_block(task: BlockTask) -> int:
    """Segment one block, write its labels and scores, and give the number of nuclei; runs in a worker."""
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    image = task.frame.read_block(task.block.outer)
    check_image(image, str(task.frame.path), part=True)
    networks = Networks(**{part: _network(weights) for part, weights in task.weights.items()})
    intensity = task.settings.intensity_range
    assert intensity is not None
    settings = replace(task.settings, intensity_range=intensity.of_part(*task.block.outer[1:]))
    found = Segmenter(networks, settings, task.device).segment(image, task.frame.require_voxel_size())
    for path, array in ((task.scores_file, found.scores), (task.labels_file, found.labels)):
        with whole_file(path) as partial, partial.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    return len(found.scores) - 1


@lru_cache(maxsize=3)
def _network(weights: Path) -> Any:
    return load_model(weights).network


def join_blocks(tasks: Sequence[BlockTask], masks: Path) -> list[Nucleus]:
    """Join the nuclei of all blocks of a frame and write the masks, OME-Zarr, core by core."""
    frame, blocks = tasks[0].frame, [task.block for task in tasks]
    voxel_size = frame.require_voxel_size()
    located = [locate_nuclei(task.block, np.asarray(task.open_labels()), voxel_size) for task in tasks]
    matches: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for a, b in itertools.combinations(range(len(blocks)), 2):
        shared = meet(blocks[a].outer, blocks[b].outer)
        if shared is not None:
            first, second = (
                np.asarray(tasks[i].open_labels()[within(shared, blocks[i].outer)]) for i in (a, b)
            )
            matches[a, b] = match_shared(located[a], located[b], first, second, shared)
    final = choose_owners(located, matches)
    scores: dict[int, float] = {}
    for table, task in zip(final, tasks, strict=True):
        own = np.load(task.scores_file, allow_pickle=False)
        scores.update({int(label): float(own[i]) for i, label in enumerate(table) if label})
    count = max(scores, default=0)
    parts: list[list[Nucleus]] = []
    with whole_folder(masks) as partial:
        dtype = np.uint16 if count < 2**16 else np.uint32
        array = create_zarr(partial, frame.shape, dtype, voxel_size, _CHUNK, labels=True)
        for block in blocks:
            order = [block, *(b for b in blocks if b is not block and meet(b.outer, block.core) is not None)]
            sources = [(b, tasks[b.index].open_labels(), final[b.index]) for b in order]
            labels = assemble_core(block, sources)
            array[block.core] = labels.astype(dtype)
            z, y, x = (part.start * edge for part, edge in zip(block.core, voxel_size.zyx, strict=True))
            measured = measure_nuclei(
                labels, frame.read_block(block.core), voxel_size, np.zeros(count + 1, np.float32)
            )
            parts.append(
                [
                    replace(each, z_um=each.z_um + z, y_um=each.y_um + y, x_um=each.x_um + x)
                    for each in measured
                ]
            )
    return merge_nuclei(parts, scores)


def run_tasks(tasks: Sequence[BlockTask], run: BlockRun) -> Iterator[int]:
    """Run the tasks, giving the number of nuclei of each as it is done."""
    if not tasks:
        return
    if run.workers == 1 and run.scheduler is None:
        for task in tasks:
            yield segment_block(task)
        return
    from distributed import CancelledError, as_completed
    from distributed.comm.core import CommClosedError
    from distributed.scheduler import KilledWorker

    with _client(run) as client:
        futures = client.map(segment_block, tasks, pure=False)
        try:
            for future in as_completed(futures):  # type: ignore[no-untyped-call]
                yield future.result()
        except KilledWorker:
            raise MachineError(
                "a worker died several times over the same block, most likely for want of memory; run again "
                "with fewer workers (finished blocks are kept), or with less memory (predict.memory_gb) so "
                "that blocks are smaller"
            ) from None
        except (CancelledError, CommClosedError):
            raise MachineError(
                "the Dask scheduler is gone; start it and run the same command again: finished blocks are "
                "kept"
            ) from None
        finally:
            client.cancel(futures)  # type: ignore[no-untyped-call]


@contextmanager
def _client(run: BlockRun) -> Iterator[Client]:
    import dask
    from distributed import Client, LocalCluster

    # A worker that is told to end is no news.
    logging.getLogger("distributed").setLevel(logging.ERROR)
    if run.scheduler is not None:
        try:
            client = Client(run.scheduler, timeout=f"{_ANSWER_S}s")  # type: ignore[no-untyped-call]
        except (OSError, ValueError, TimeoutError) as error:
            raise InputError(
                f"no Dask scheduler at {run.scheduler} ({reason_of(error)}); start one with: dask scheduler"
            ) from None
        with client:
            workers = client.scheduler_info(n_workers=-1)["workers"].values()
            if not workers:
                say(f"{run.scheduler} has no workers yet; waiting for the first")
            threads = max((worker["nthreads"] for worker in workers), default=1)
            if threads > 1:
                say(
                    f"workers of {run.scheduler} run up to {threads} blocks at once, each of which may take "
                    "predict.memory_gb; start them with --nthreads 1"
                )
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


def predict_in_blocks(
    frame: Frame,
    models: Mapping[str, Model],
    settings: SegmentationSettings,
    run: BlockRun,
    fingerprint: str,
    masks: Path,
    progress: Callable[[float], None],
) -> list[Nucleus]:
    """Segment a frame block by block, in any mode but ``cellpose``, write its masks and give its nuclei.

    `settings` hold the ranges of the whole frame (`with_frame_ranges`); `fingerprint` is of frame, models and
    settings: results of a run before with another are not used. InputError is raised if blocks cannot be
    small enough or the scheduler does not answer, MachineError if a worker dies again and again, the
    scheduler goes away, or the disk is full: finished blocks are kept and the next run goes on with the
    others.
    """
    folder = _open_folder(masks, frame, fingerprint[:16])
    # Workers need not run in this directory.
    frame = replace(frame, path=frame.path.resolve())
    try:
        tasks = [
            BlockTask(
                frame=frame,
                block=block,
                weights={part: model.path.resolve() for part, model in models.items()},
                settings=settings,
                device=run.device,
                threads=run.threads_per_worker,
                labels_file=folder.resolve() / f"{block.index:05d}.npy",
            )
            for block in cut_frame(frame, settings, run, folder)
        ]
        missing = [task for task in tasks if not task.is_done]
        before = len(tasks) - len(missing)
        say(f"{frame.name}: {len(tasks)} blocks{f', {before} of them done before' if before else ''}")
        progress(0.95 * before / len(tasks))
        for done, _ in enumerate(run_tasks(missing, run), start=before + 1):
            progress(0.95 * done / len(tasks))
        nuclei = join_blocks(tasks, masks)
    except InputError:
        if not any(folder.glob("*.npy")):
            _close_folder(folder)
        raise
    _close_folder(folder)
    return nuclei


def with_frame_ranges(frame: Frame, settings: SegmentationSettings) -> SegmentationSettings:
    """Add the range of the whole frame, from the planes that `measure_range` would take, and no others."""
    return with_ranges(settings, read_sampled_planes(frame), sampled=True)


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
