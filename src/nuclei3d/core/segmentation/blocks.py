"""Cutting a large volume into overlapping blocks.

Blocks partition the volume by their *cores*; each is segmented on its *outer* box, the core grown by a margin
that a whole nucleus fits into. A nucleus near a face is therefore seen whole by the blocks on both
sides; `block_nuclei` joins what they saw.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nuclei3d.core.segmentation.lattice import grow_to_lattice
from nuclei3d.errors import InputError
from nuclei3d.volumes.voxel_size import VoxelSize

Box = tuple[slice, slice, slice]
Pixels = float | Sequence[float]

MARGIN_DIAMETERS = 1.5


@dataclass(frozen=True)
class Block:
    """A part of a volume.

    Attributes
    ----------
    index
        Its number.
    core
        The voxels whose labels it decides; the cores of all blocks partition the volume.
    outer
        What is segmented: the core and a margin, cut at the volume's borders.
    shape
        Of the whole volume.
    """

    index: int
    core: Box
    outer: Box
    shape: tuple[int, int, int]

    def shared(self, other: Block) -> Box | None:
        """Give the box (in voxels of the volume) that both blocks segment, if there is one."""
        box = tuple(
            slice(max(a.start, b.start), min(a.stop, b.stop))
            for a, b in zip(self.outer, other.outer, strict=True)
        )
        return (box[0], box[1], box[2]) if all(part.stop > part.start for part in box) else None

    @property
    def voxels(self) -> int:
        """Number of voxels of the outer box."""
        return math.prod(part.stop - part.start for part in self.outer)

    def within(self, box: Box) -> Box:
        """Express a box of the volume in voxels of this block's outer box."""
        z, y, x = (
            slice(part.start - outer.start, part.stop - outer.start)
            for part, outer in zip(box, self.outer, strict=True)
        )
        return z, y, x


def plan_blocks(
    shape: tuple[int, int, int],
    voxel_size: VoxelSize,
    margin_um: float,
    max_voxels: float,
    pixels: Sequence[Pixels] | None = None,
) -> list[Block]:
    """Cut a volume into as few blocks as fit into memory.

    Parameters
    ----------
    shape
        Of the volume (z, y, x).
    voxel_size
        Of the volume.
    margin_um
        How far the outer box reaches beyond the core.
    max_voxels
        Most voxels that an outer box may have.
    pixels
        Pixels of the network (or of each of several) per voxel along (z, y, x): outer boxes then start on
        its lattice (`nuclei3d.core.segmentation.lattice`), and are wider than the margin by up to two squares
        of it.

    Raises
    ------
    InputError
        If even cores as wide as the margin are too large.
    """
    margins = [math.ceil(margin_um / edge) for edge in voxel_size.zyx]
    counts = [1, 1, 1]
    while True:
        axes = _cut_axes(shape, voxel_size, margin_um, counts, pixels)
        outer = [max(grown.stop - grown.start for _, grown in axis) for axis in axes]
        if math.prod(outer) <= max_voxels:
            return lay_blocks(shape, voxel_size, margin_um, (counts[0], counts[1], counts[2]), pixels)
        cores = [math.ceil(size / count) for size, count in zip(shape, counts, strict=True)]
        lengths = [
            core * edge if core > max(1, margin) else 0.0
            for core, edge, margin in zip(cores, voxel_size.zyx, margins, strict=True)
        ]
        longest = int(np.argmax(lengths))
        if lengths[longest] == 0:
            raise InputError(
                f"a volume of {' x '.join(map(str, shape))} voxels cannot be cut small enough: blocks of "
                f"{' x '.join(map(str, outer))} are the least for nuclei of this size; allow more memory "
                "(predict.memory_gb) or use fewer workers"
            )
        counts[longest] += 1


def lay_blocks(
    shape: tuple[int, int, int],
    voxel_size: VoxelSize,
    margin_um: float,
    counts: tuple[int, int, int],
    pixels: Sequence[Pixels] | None = None,
) -> list[Block]:
    """Cut a volume into so many blocks along (z, y, x), as equal as can be; parameters as `plan_blocks`."""
    axes = _cut_axes(shape, voxel_size, margin_um, counts, pixels)
    return [
        Block(index, (z[0], y[0], x[0]), (z[1], y[1], x[1]), shape)
        for index, (z, y, x) in enumerate(itertools.product(*axes))
    ]


def _cut_axes(
    shape: Sequence[int],
    voxel_size: VoxelSize,
    margin_um: float,
    counts: Sequence[int],
    pixels: Sequence[Pixels] | None,
) -> list[list[tuple[slice, slice]]]:
    """Give, for each axis, core and outer part of each of so many blocks."""
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
    return axes


def count_blocks(blocks: Sequence[Block]) -> tuple[int, int, int]:
    """Tell into how many blocks a volume was cut along (z, y, x)."""
    z, y, x = (len({block.core[axis].start for block in blocks}) for axis in range(3))
    return z, y, x
