"""What a model is unsure of in a volume, counted in nuclei, and the blocks that hold most of it.

It costs a network pass and one labelling, and has two parts:

- *nuclei*: each candidate, those that the thresholds drop too, is wrong with a chance that falls with the
  distance of its score from the threshold. The score is low where the views contradict each other, for their
  mean flow is then short or not the flow of the mask (`masks.score_labels`), and where the logit is low.
- *foreground*: what is foreground but in no candidate belongs to nuclei that were not found; it counts in
  volumes of a typical nucleus.

Doubt of single voxels (the logit near its threshold) lies around every nucleus and in empty space, and tells
nothing of wrong ones: with it, blocks were ranked worse than by the number of their nuclei
(benchmarks/suggest.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation.dynamics import label_flows
from nuclei3d.segmentation.flow_field import LOGIT, LOGIT_UNITS, FlowField
from nuclei3d.segmentation.settings import SegmentationSettings

Box = tuple[slice, slice, slice]

#: Edge of a block, in diameters of a nucleus.
BLOCK_DIAMETERS = 3.0
#: Distance of a score from the threshold at which the chance of being wrong has fallen from .5 to .27.
_SCORE_SCALE = 0.1
#: How far below the logit's threshold candidates are looked for: a faint nucleus lies below it.
_FAINTER = 1.0
#: Chance of being wrong from which on a candidate is called doubtful: within two scales of the threshold.
_DOUBTFUL = 0.12
#: Steps in an edge by which blocks are moved to where most is uncertain.
_STEPS = 4


@dataclass(frozen=True)
class Uncertainty:
    """What is uncertain in a volume, on the grid (z, y, x) of its flows, and the candidates for nuclei.

    `nuclei` and `foreground`, float32 (z, y, x), are the share of a wrong nucleus in each voxel, by its two
    parts; `labels`, uint32 (z, y, x), 1..n, are all candidates. By label, (n + 1,), are float32
    `chance_wrong` and bool `kept`: those that are nuclei by the score threshold.
    """

    nuclei: NDArray[np.float32]
    foreground: NDArray[np.float32]
    labels: NDArray[np.uint32]
    chance_wrong: NDArray[np.float32]
    kept: NDArray[np.bool_]


@dataclass(frozen=True)
class Block:
    """A box of an image's voxels (z, y, x), and what is uncertain there.

    `nuclei` and `foreground` are the two parts of its uncertainty, in nuclei; `focus` is the plane along each
    axis in which most is uncertain; `doubtful` and `dropped` are numbers of candidates with a score near the
    threshold, above and below it.
    """

    box: Box
    nuclei: float
    foreground: float
    focus: tuple[int, int, int]
    doubtful: int
    dropped: int

    @property
    def uncertainty(self) -> float:
        """Both parts together, in nuclei."""
        return self.nuclei + self.foreground


def measure_uncertainty(flows: FlowField, settings: SegmentationSettings) -> Uncertainty:
    """Measure what is uncertain in what a network says of a volume; modes that have flows only."""
    thresholds = settings.masks
    wide = replace(
        thresholds, score_threshold=0.0, cellprob_threshold=thresholds.cellprob_threshold - _FAINTER
    )
    labels, scores = label_flows(flows, flows.shape, replace(settings, masks=wide))
    voxels = np.maximum(np.bincount(labels.ravel(), minlength=len(scores)), 1)
    wrong = 1 / (1 + np.exp(np.abs(scores - thresholds.score_threshold) / _SCORE_SCALE))
    wrong[0] = 0.0
    kept = scores >= thresholds.score_threshold
    kept[0] = False
    typical = np.pi / 6 * settings.nucleus_diameter_um**3 / flows.voxel_size.volume_um3
    lost = (flows.packed[..., LOGIT] > thresholds.cellprob_threshold * LOGIT_UNITS) & (labels == 0)
    return Uncertainty(
        (wrong / voxels).astype(np.float32)[labels],
        lost / np.float32(typical),
        labels,
        wrong.astype(np.float32),
        kept,
    )


def find_blocks(
    uncertainty: Uncertainty,
    shape: Sequence[int],
    voxel_size: VoxelSize,
    edge_um: float,
    count: int,
    unknown: NDArray[np.bool_] | None = None,
) -> list[Block]:
    """Find the blocks of an image in which most is uncertain, most first; no two overlap.

    Boxes are in voxels of the image, whose are `shape` (z, y, x) and `voxel_size`; a block has the edge
    `edge_um`, cut down where the image is thinner; at most `count` are given. Only where `unknown` (bool, on
    the grid of the uncertainty; None: everywhere) something is to be found out.
    """
    parts = [uncertainty.nuclei, uncertainty.foreground]
    if unknown is not None:
        parts = [np.where(unknown, part, np.float32(0)) for part in parts]
    grid = parts[0].shape
    cells = [
        min(max(1, round(n * edge * _STEPS / edge_um)), n, m)
        for n, m, edge in zip(shape, grid, voxel_size.zyx, strict=True)
    ]
    sums = [sum_cells(part, cells) for part in parts]
    window = [min(_STEPS, number) for number in cells]
    views = [np.lib.stride_tricks.sliding_window_view(each, window).sum((3, 4, 5)) for each in sums]
    total = views[0] + views[1]
    found: list[Block] = []
    while len(found) < count and total.max() > 0:
        place = [int(at) for at in np.unravel_index(int(np.argmax(total)), total.shape)]
        here = list(zip(cells, place, window, strict=True))
        box, there = (
            tuple(
                slice(*cell_bounds(n, number)[[start, start + width]].tolist())
                for n, (number, start, width) in zip(each, here, strict=True)
            )
            for each in (shape, grid)
        )
        found.append(_describe(uncertainty, parts, box, there, [view[tuple(place)] for view in views]))
        total[tuple(slice(max(start - width + 1, 0), start + width) for _, start, width in here)] = 0.0
    return found


def _describe(
    uncertainty: Uncertainty,
    parts: Sequence[NDArray[np.float32]],
    box: tuple[slice, ...],
    there: tuple[slice, ...],
    sums: Sequence[float],
) -> Block:
    """Describe a block of an image, whose place on the grid of the uncertainty is `there`."""
    inside = parts[0][there] + parts[1][there]
    focus = []
    for axis, (image, grid) in enumerate(zip(box, there, strict=True)):
        plane = int(np.argmax(inside.sum(axis=tuple({0, 1, 2} - {axis}), dtype=np.float64)))
        focus.append(image.start + int((plane + 0.5) / (grid.stop - grid.start) * (image.stop - image.start)))
    candidates = np.unique(uncertainty.labels[there])
    candidates = candidates[candidates > 0]
    near = candidates[uncertainty.chance_wrong[candidates] > _DOUBTFUL]
    kept = int(uncertainty.kept[near].sum())
    return Block(
        (box[0], box[1], box[2]),
        float(sums[0]),
        float(sums[1]),
        (focus[0], focus[1], focus[2]),
        kept,
        len(near) - kept,
    )


def cell_bounds(length: int, cells: int) -> NDArray[np.int64]:
    """Cut an axis into cells as equal as can be: the first voxel of each, and the end."""
    bounds: NDArray[np.int64] = np.round(np.linspace(0, length, cells + 1)).astype(np.int64)
    return bounds


def sum_cells(volume: NDArray[np.float32], cells: Sequence[int]) -> NDArray[np.float64]:
    """Sum a volume (z, y, x) up over so many cells along each axis."""
    sums: NDArray[Any] = volume
    for axis, number in enumerate(cells):
        starts = cell_bounds(volume.shape[axis], number)[:-1]
        sums = np.add.reduceat(sums, starts, axis=axis, dtype=np.float64)
    return np.asarray(sums, np.float64)


@dataclass(frozen=True)
class Place:
    """Where a block is: in which embryo, at which frame of how many, and its centre (z, y, x) in um."""

    embryo: str
    frame: int
    frames: int
    centre_um: tuple[float, float, float]


def similarity(a: Place, b: Place, edge_um: float) -> float:
    """Say how much of a block another one shows already, 0 to 1.

    A third is for the same embryo, a third for the same time (falling off within a tenth of the embryo's
    frames), a third for the same place at that time (falling off within the edge of a block).
    """
    if a.embryo != b.embryo:
        return 0.0
    time = np.exp(-abs(a.frame - b.frame) / max(1.0, a.frames / 10))
    squared = sum((p - q) ** 2 for p, q in zip(a.centre_um, b.centre_um, strict=True))
    return float((1 + time * (1 + np.exp(-squared / edge_um**2))) / 3)


def choose_blocks(
    uncertainties: Sequence[float], places: Sequence[Place], count: int, edge_um: float
) -> list[int]:
    """Choose blocks one by one, each time the one of most uncertainty not shown yet; give their indices.

    What a chosen block shows of another one (`similarity`) is taken off that one's worth, share by share.
    Among equals the first is chosen.
    """
    worth = np.array(uncertainties, dtype=np.float64)
    chosen: list[int] = []
    while len(chosen) < min(count, len(places)):
        best = int(np.argmax(worth))
        chosen.append(best)
        worth *= [1 - similarity(place, places[best], edge_um) for place in places]
        worth[chosen] = -1.0
    return chosen
