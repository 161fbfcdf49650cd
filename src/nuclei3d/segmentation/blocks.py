"""Cutting a large volume into overlapping blocks, and joining the nuclei that were found in them.

Blocks partition the volume by their *cores*; each is segmented on its *outer* box, the core grown by a margin
that a whole nucleus fits into, so a nucleus near a face is seen whole by the blocks on both sides. Nuclei of
two blocks that are the same (IoU above a half where they overlap) are joined, and the mask is taken from
the block that saw the nucleus farthest from its own cut faces; a nucleus that only one block sees is kept if
its centre lies in that block's core. So no nucleus is ever cut at a face, and each voxel of the result can be
decided core by core.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.matching import match, overlap_table
from nuclei3d.segmentation.masks import Nucleus
from nuclei3d.segmentation.tiling import grow_to_lattice

Box = tuple[slice, slice, slice]
Pixels = float | Sequence[float]

MARGIN_DIAMETERS = 1.0
"""Holds half of a nucleus of twice the diameter; 1.5 found no nucleus more (docs/results.md)."""

_SAME_IOU = 0.5


@dataclass(frozen=True)
class Block:
    """A part of a volume of some shape: it decides its core, and what is segmented is its outer box."""

    index: int
    core: Box
    outer: Box
    shape: tuple[int, int, int]

    @property
    def voxels(self) -> int:
        """Number of voxels of the outer box."""
        return math.prod(part.stop - part.start for part in self.outer)


def meet(first: Box, second: Box) -> Box | None:
    """Give the voxels that two boxes share, if there are any."""
    z, y, x = (slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(first, second, strict=True))
    return (z, y, x) if all(part.stop > part.start for part in (z, y, x)) else None


def within(box: Box, outer: Box) -> Box:
    """Express a box in voxels of a box around it."""
    z, y, x = (slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, outer, strict=True))
    return z, y, x


def plan_blocks(
    shape: tuple[int, int, int],
    voxel_size: VoxelSize,
    margin_um: float,
    max_voxels: float,
    pixels: Sequence[Pixels] | None = None,
) -> list[Block]:
    """Cut a volume into as few blocks as fit into memory.

    Outer boxes reach `margin_um` beyond the core and have `max_voxels` at most. `pixels` are those of the
    network (or of each of several) per voxel along (z, y, x): outer boxes then start on its lattice
    (`tiling`), and are wider than the margin by up to two squares of it.

    Raises
    ------
    InputError
        If even cores as wide as the margin are too large.
    """
    margins = [math.ceil(margin_um / edge) for edge in voxel_size.zyx]
    counts = [1, 1, 1]
    while True:
        blocks = lay_blocks(shape, voxel_size, margin_um, counts, pixels)
        largest = max(blocks, key=lambda block: block.voxels)
        if largest.voxels <= max_voxels:
            return blocks
        cores = [math.ceil(size / count) for size, count in zip(shape, counts, strict=True)]
        lengths = [
            core * edge if core > max(1, margin) else 0.0
            for core, edge, margin in zip(cores, voxel_size.zyx, margins, strict=True)
        ]
        longest = int(np.argmax(lengths))
        if lengths[longest] == 0:
            least = " x ".join(str(part.stop - part.start) for part in largest.outer)
            raise InputError(
                f"a volume of {' x '.join(map(str, shape))} voxels cannot be cut small enough: blocks of "
                f"{least} are the least for nuclei of this size; allow more memory "
                "(predict.memory_gb) or use fewer workers"
            )
        counts[longest] += 1


def lay_blocks(
    shape: tuple[int, int, int],
    voxel_size: VoxelSize,
    margin_um: float,
    counts: Sequence[int],
    pixels: Sequence[Pixels] | None = None,
) -> list[Block]:
    """Cut a volume into so many blocks along (z, y, x), as equal as can be; parameters as `plan_blocks`."""
    axes = []
    for axis, (size, count, edge) in enumerate(zip(shape, counts, voxel_size.zyx, strict=True)):
        margin = math.ceil(margin_um / edge)
        cuts = np.linspace(0, size, count + 1).round().astype(int)
        parts = []
        for start, stop in itertools.pairwise(cuts):
            grown = slice(max(0, int(start) - margin), min(size, int(stop) + margin))
            if pixels is not None:
                grown = grow_to_lattice(grown, size, pixels[axis])
            parts.append((slice(int(start), int(stop)), grown))
        axes.append(parts)
    return [
        Block(index, (z[0], y[0], x[0]), (z[1], y[1], x[1]), shape)
        for index, (z, y, x) in enumerate(itertools.product(*axes))
    ]


def count_blocks(blocks: Sequence[Block]) -> tuple[int, int, int]:
    """Tell into how many blocks a volume was cut along (z, y, x)."""
    z, y, x = (len({block.core[axis].start for block in blocks}) for axis in range(3))
    return z, y, x


@dataclass(frozen=True)
class BlockNuclei:
    """Where the nuclei of one block lie: a row for each label; row 0 is unused.

    `centres` (n + 1, 3) are in voxels of the volume; `depth_um` is their distance from the nearest face at
    which the volume was cut. `near_core` says whether they lie in the core or an eighth of the margin around
    it: two blocks may each see the centre of a nucleus on a face on the other's side; fragments at cut faces
    lie farther out.
    """

    block: Block
    centres: NDArray[np.float64]
    in_core: NDArray[np.bool_]
    near_core: NDArray[np.bool_]
    depth_um: NDArray[np.float64]


def locate_nuclei(block: Block, labels: NDArray[np.integer[Any]], voxel_size: VoxelSize) -> BlockNuclei:
    """Find the centres of a block's nuclei from its labels (z, y, x) on the outer box, 1..n."""
    count = int(labels.max(initial=0)) + 1
    flat = labels.ravel()
    voxels = np.maximum(np.bincount(flat, minlength=count), 1)
    centres = np.empty((count, 3))
    for axis, part in enumerate(block.outer):
        along = [1, 1, 1]
        along[axis] = labels.shape[axis]
        position = np.arange(part.start, part.stop, dtype=np.float64).reshape(along)
        weights = np.broadcast_to(position, labels.shape).ravel()
        centres[:, axis] = np.bincount(flat, weights=weights, minlength=count) / voxels
    in_core, near_core = np.ones(count, np.bool_), np.ones(count, np.bool_)
    depth = np.full(count, np.inf)
    for axis, (core, outer, edge) in enumerate(zip(block.core, block.outer, voxel_size.zyx, strict=True)):
        # The centre of a nucleus between two voxels belongs to the upper one, in every block alike.
        place = np.floor(centres[:, axis] + 0.5)
        in_core &= (place >= core.start) & (place < core.stop)
        below, above = (core.start - outer.start) / 8, (outer.stop - core.stop) / 8
        near_core &= (place >= core.start - below) & (place < core.stop + above)
        if outer.start > 0:
            depth = np.minimum(depth, (centres[:, axis] - outer.start + 0.5) * edge)
        if outer.stop < block.shape[axis]:
            depth = np.minimum(depth, (outer.stop - 0.5 - centres[:, axis]) * edge)
    in_core[0] = near_core[0] = False
    return BlockNuclei(block, centres, in_core, near_core, depth)


def match_shared(
    first: BlockNuclei,
    second: BlockNuclei,
    first_labels: NDArray[np.integer[Any]],
    second_labels: NDArray[np.integer[Any]],
    shared: Box,
) -> list[tuple[int, int]]:
    """Find the nuclei that two blocks both see, from their labels in the box that they share.

    Only nuclei whose centre lies in that box count: of others it shows a fragment. Gives pairs of labels.
    """
    table = overlap_table(first_labels, second_labels)
    matching = match(table, _SAME_IOU)
    pairs = []
    for i, j in zip(matching.true_index, matching.pred_index, strict=True):
        a, b = int(table.true_labels[i]), int(table.pred_labels[j])
        if _inside(first.centres[a], shared) and _inside(second.centres[b], shared):
            pairs.append((a, b))
    return pairs


def choose_owners(
    nuclei: Sequence[BlockNuclei], matches: Mapping[tuple[int, int], Sequence[tuple[int, int]]]
) -> list[NDArray[np.uint32]]:
    """Decide which block's mask each nucleus gets, and number the nuclei 1..n over all blocks.

    `matches` are, per pair of blocks, the labels that are the same nucleus; blocks in the order of their
    indices. Gives, per block, the final label of each of its labels, uint32 (n + 1,): 0 for those that are
    dropped or that another block owns.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    offsets = np.concatenate([[0], np.cumsum([len(each.centres) for each in nuclei])])
    links = [
        (offsets[a] + first, offsets[b] + second)
        for (a, b), pairs in matches.items()
        for first, second in pairs
    ]
    size = int(offsets[-1])
    rows, columns = np.array(links, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(size, size))
    _, groups = connected_components(graph, directed=False)
    in_core = np.concatenate([each.in_core for each in nuclei])
    near_core = np.concatenate([each.near_core for each in nuclei])
    depth = np.concatenate([each.depth_um for each in nuclei])
    claimed = np.bincount(groups, weights=in_core, minlength=size)[groups] > 0
    seen_twice = np.bincount(groups, minlength=size)[groups] > 1
    candidates = np.flatnonzero(in_core | (claimed & near_core) | (seen_twice & near_core))
    # The deepest member of each group comes first; equal depths go to the earlier block.
    order = candidates[np.lexsort((candidates, -depth[candidates], groups[candidates]))]
    first_of_group = np.ones(len(order), np.bool_)
    first_of_group[1:] = groups[order][1:] != groups[order][:-1]
    owners = np.sort(order[first_of_group])
    final = np.zeros(size, np.uint32)
    final[owners] = np.arange(1, len(owners) + 1, dtype=np.uint32)
    return [final[start:stop] for start, stop in itertools.pairwise(offsets)]


def assemble_core(
    block: Block, sources: Sequence[tuple[Block, NDArray[np.integer[Any]], NDArray[np.uint32]]]
) -> NDArray[np.uint32]:
    """Put the final labels of one core together, uint32 of its shape.

    `sources` are this block first, then all that overlap its core: block, labels on its outer box, final
    labels. Where masks of two blocks overlap, the earlier source wins.
    """
    result = np.zeros([part.stop - part.start for part in block.core], np.uint32)
    for source, labels, final in sources:
        shared = meet(block.core, source.outer)
        if shared is not None:
            target = result[within(shared, block.core)]
            np.copyto(target, final[labels[within(shared, source.outer)]], where=target == 0)
    return result


def merge_nuclei(parts: Sequence[Sequence[Nucleus]], scores: Mapping[int, float]) -> list[Nucleus]:
    """Join the nuclei that were measured core by core, with positions from the volume's origin.

    Positions and intensities are means weighted by volume; `scores` are by final label.
    """
    sums: dict[int, NDArray[np.float64]] = {}
    for part in parts:
        for nucleus in part:
            means = (nucleus.z_um, nucleus.y_um, nucleus.x_um, nucleus.mean_intensity)
            row = nucleus.volume_um3 * np.array([1.0, *means])
            sums[nucleus.label] = sums[nucleus.label] + row if nucleus.label in sums else row
    merged = []
    for label in sorted(sums):
        volume, *moments = sums[label]
        z, y, x, intensity = (float(moment / volume) for moment in moments)
        merged.append(Nucleus(label, z, y, x, float(volume), intensity, scores[label]))
    return merged


def _inside(centre: NDArray[np.float64], box: Box) -> bool:
    return all(part.start <= c + 0.5 and c < part.stop for c, part in zip(centre, box, strict=True))
