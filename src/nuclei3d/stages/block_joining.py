"""From the labels of all blocks to one volume of masks, written core by core as OME-Zarr."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.segmentation.block_nuclei import (
    BlockNuclei,
    assemble_core,
    choose_owners,
    locate_nuclei,
    match_shared,
    merge_nuclei,
)
from nuclei3d.core.segmentation.blocks import Block, Box
from nuclei3d.core.segmentation.nuclei import Nucleus, measure_nuclei
from nuclei3d.stages.block_tasks import BlockTask
from nuclei3d.volumes.frames import Frame
from nuclei3d.volumes.voxel_size import VoxelSize
from nuclei3d.volumes.whole import whole_folder
from nuclei3d.volumes.zarr_store import create_zarr

CHUNK = (64, 256, 256)


def join_blocks(
    frame: Frame, blocks: Sequence[Block], tasks: Sequence[BlockTask], masks: Path
) -> list[Nucleus]:
    """Join the nuclei of all blocks and write the masks core by core.

    Parameters
    ----------
    frame
        The volume; read again, core by core, to measure the nuclei.
    blocks, tasks
        How it was cut, and the results; one task per block.
    masks
        OME-Zarr folder to write, whole or not at all.

    Returns
    -------
    list of Nucleus
        By label, 1..n.
    """
    voxel_size = frame.require_voxel_size()
    located = [
        locate_nuclei(block, np.asarray(task.open_labels()), voxel_size)
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
        own = task.read_scores()
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


def _match(
    blocks: Sequence[Block],
    located: Sequence[BlockNuclei],
    tasks: Sequence[BlockTask],
    a: int,
    b: int,
    shared: Box,
) -> list[tuple[int, int]]:
    first = np.asarray(tasks[a].open_labels()[blocks[a].within(shared)])
    second = np.asarray(tasks[b].open_labels()[blocks[b].within(shared)])
    return match_shared(located[a], located[b], first, second, shared)


def _core_labels(
    block: Block, blocks: Sequence[Block], tasks: Sequence[BlockTask], final: Sequence[NDArray[np.uint32]]
) -> NDArray[np.uint32]:
    others = [b for b in blocks if b.index != block.index and b.shared(block) is not None]
    return assemble_core(block, [(b, tasks[b.index].open_labels(), final[b.index]) for b in [block, *others]])


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
