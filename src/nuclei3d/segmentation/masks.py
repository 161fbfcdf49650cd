"""From raw labels to nuclei: one connected piece each, no holes, plausible sizes, a score; measured.

The kernels work label by label inside the label's box and are shared between threads. Nothing depends on
the order in which labels are handled: pieces are dropped first, holes are filled in a second pass,
and a hole belongs to a label only if nothing else touches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from nuclei3d.errors import InputError
from nuclei3d.flows import cut_label, nucleus_flows_3d, take_piece
from nuclei3d.grid import LabelBoxes, find_boxes, share_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation import device
from nuclei3d.segmentation.flow_field import DeviceField, FlowField

Labels = NDArray[np.uint32] | Tensor
"""uint32 (z, y, x); or int32 in a GPU's memory, for `nuclei3d.segmentation.device`."""

_LEAST_SCORE = 0.01
_HEAT_TOLERANCE = 0.01


@njit(cache=True, nogil=True)
def _keep_largest_pieces(
    labels: NDArray[np.uint32], chosen: NDArray[np.int64], boxes: NDArray[np.int32]
) -> None:
    """Set all but the largest 6-connected piece of each chosen label to 0 (the first of equal ones stays)."""
    for label in chosen:
        z0, _, y0, _, x0, _ = boxes[label]
        free, total = cut_label(labels, label, boxes[label])
        members = np.empty((total, 3), np.int32)
        kept_start = 0
        kept_stop = 0
        at = 0
        for sz in range(1, free.shape[0] - 1):
            for sy in range(1, free.shape[1] - 1):
                for sx in range(1, free.shape[2] - 1):
                    if free[sz, sy, sx]:
                        count = take_piece(free, sz, sy, sx, members[at:])
                        if count > kept_stop - kept_start:
                            kept_start = at
                            kept_stop = at + count
                        at += count
        for i in range(total):
            if not kept_start <= i < kept_stop:
                labels[members[i, 0] + z0 - 1, members[i, 1] + y0 - 1, members[i, 2] + x0 - 1] = 0


@njit(cache=True, nogil=True)
def _fill_holes(labels: NDArray[np.uint32], chosen: NDArray[np.int64], boxes: NDArray[np.int32]) -> None:
    """Fill the 6-connected pieces of background in a label's box that touch that label and nothing else."""
    for label in chosen:
        z0, z1, y0, y1, x0, x1 = boxes[label]
        free, total = cut_label(labels, 0, boxes[label])
        members = np.empty((total, 3), np.int32)
        # A hole cannot touch the faces of the box: the label's own voxels lie between.
        for sz in range(2, free.shape[0] - 2):
            for sy in range(2, free.shape[1] - 2):
                for sx in range(2, free.shape[2] - 2):
                    if free[sz, sy, sx]:
                        count = take_piece(free, sz, sy, sx, members)
                        closed = True
                        for i in range(count):
                            z = members[i, 0] + z0 - 1
                            y = members[i, 1] + y0 - 1
                            x = members[i, 2] + x0 - 1
                            if z in (z0, z1) or y in (y0, y1) or x in (x0, x1):
                                closed = False
                                break
                            for axis in range(3):
                                for side in (-1, 1):
                                    other = labels[
                                        z + side if axis == 0 else z,
                                        y + side if axis == 1 else y,
                                        x + side if axis == 2 else x,
                                    ]
                                    if other != 0 and other != label:
                                        closed = False
                            if not closed:
                                break
                        if closed:
                            for i in range(count):
                                labels[
                                    members[i, 0] + z0 - 1, members[i, 1] + y0 - 1, members[i, 2] + x0 - 1
                                ] = label


@njit(cache=True, nogil=True)
def _score(
    crop: NDArray[np.uint32],
    label: int,
    edges: NDArray[np.float64],
    flow: NDArray[np.float32],
    logit: NDArray[np.float32],
) -> float:
    """Score one label from its box: labels, flow and logit cut to it."""
    depth, height, width = crop.shape
    own = np.zeros((3, depth, height, width), np.float32)
    box = np.array([0, depth - 1, 0, height - 1, 0, width - 1], np.int32)
    nucleus_flows_3d(crop, label, box, edges, _HEAT_TOLERANCE, own)
    seen = np.zeros(3, np.bool_)
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                if crop[z, y, x] == label:
                    for axis in range(3):
                        if flow[axis, z, y, x] != 0.0:
                            seen[axis] = True
    probability = 0.0
    error = 0.0
    count = 0
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                if crop[z, y, x] != label:
                    continue
                count += 1
                probability += 1.0 / (1.0 + np.exp(-logit[z, y, x]))
                length = 0.0
                for axis in range(3):
                    if seen[axis]:
                        length += own[axis, z, y, x] ** 2
                length = np.sqrt(length)
                for axis in range(3):
                    if seen[axis]:
                        expected = own[axis, z, y, x] / length if length > 0.0 else 0.0
                        error += (expected - flow[axis, z, y, x]) ** 2
    if not seen.any():
        error = count
    consistency = max(0.0, 1.0 - error / count)
    return probability / count * consistency


@njit(cache=True, nogil=True)
def _renumber(labels: NDArray[np.uint32], table: NDArray[np.uint32]) -> None:
    flat = labels.reshape(-1)
    for i in range(len(flat)):
        if flat[i] > 0:
            flat[i] = table[flat[i]]


def renumber_labels(labels: Labels, table: NDArray[np.uint32]) -> None:
    """Replace every label but 0, in place, by its entry in a table."""
    if isinstance(labels, Tensor):
        device.renumber_labels(labels, table)
    else:
        _renumber(labels, table)


def box_labels(labels: Labels) -> LabelBoxes:
    """Find the box and the size of every label in one pass."""
    return device.find_boxes(labels) if isinstance(labels, Tensor) else find_boxes(labels)


def fetch_labels(labels: Labels) -> NDArray[np.uint32]:
    """Bring labels to the host, if they are not there."""
    return labels.cpu().numpy().view(np.uint32) if isinstance(labels, Tensor) else labels


def keep_labels(labels: Labels, keep: NDArray[np.bool_]) -> None:
    """Drop, in place, the labels that are not to be kept and number the others 1..n in their order.

    `keep` is (highest label + 1,); entry 0 (background) is ignored.
    """
    table = np.zeros(len(keep), np.uint32)
    table[1:] = np.where(keep[1:], np.cumsum(keep[1:]), 0)
    renumber_labels(labels, table)


def clean_labels(
    labels: Labels,
    min_voxels: float = 1.0,
    max_voxels: float = np.inf,
    threads: int | None = None,
) -> LabelBoxes:
    """Make labels (Z, Y, X) whole, in place: one 6-connected piece each, holes filled, numbers 1..n.

    Those smaller or larger than the bounds, after filling, are dropped. Gives boxes and sizes of the others.
    """
    if isinstance(labels, Tensor):
        device.make_whole(labels)
    else:
        for work in (_keep_largest_pieces, _fill_holes):
            where = find_boxes(labels)
            share_labels(partial(work, labels, boxes=where.boxes), where, threads)
    where = box_labels(labels)
    keep = (where.voxels >= max(min_voxels, 1)) & (where.voxels <= max_voxels)
    keep_labels(labels, keep)
    keep[0] = True
    kept = np.flatnonzero(keep)
    return LabelBoxes(where.boxes[kept], where.voxels[kept])


def score_labels(
    labels: Labels,
    where: LabelBoxes,
    field: FlowField | DeviceField,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """Score every label: mean probability times consistency of the flow.

    The consistency is 1 - e, not below 0, with e Cellpose's flow error in 3D: the mean over the nucleus of
    the squared difference between the given flow and the one computed from the mask alone. It is 1 for a
    perfect nucleus and 0 where the flow is absent or has nothing to do with the mask. A component that is 0
    all over a nucleus (z, where only xy planes were seen) is left out on both sides.
    Scores are float32 (n + 1,), in 0..1 by label; that of the background is 0.
    """
    edges = np.array(field.voxel_size.zyx) / min(field.voxel_size.zyx)
    if isinstance(field, DeviceField):
        assert isinstance(labels, Tensor)
        return device.score_labels(labels, where, field, edges, _HEAT_TOLERANCE)
    scores, volume = np.zeros(len(where.voxels), np.float32), fetch_labels(labels)

    def work(chosen: NDArray[np.int64]) -> None:
        for label in chosen:
            z0, z1, y0, y1, x0, x1 = (int(index) for index in where.boxes[label])
            box = (slice(z0, z1 + 1), slice(y0, y1 + 1), slice(x0, x1 + 1))
            scores[label] = _score(volume[box].copy(), label, edges, *field.unpack(box))

    share_labels(work, where, threads)
    return scores


def finish_labels(
    labels: Labels,
    field: FlowField | DeviceField,
    bounds_um3: tuple[float, float],
    score_threshold: float,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """Make labels (Z, Y, X) whole, score them and drop those that are no nuclei, in place.

    Afterwards they are 1..n, each one 6-connected piece without holes. Least and largest volume are
    `bounds_um3`; labels with a score below the threshold, or below 0.01, are dropped. Gives the scores of the
    others (`score_labels`).
    """
    least, most = (bound / field.voxel_size.volume_um3 for bound in bounds_um3)
    where = clean_labels(labels, least, most, threads)
    scores = score_labels(labels, where, field, threads)
    keep = scores >= max(score_threshold, _LEAST_SCORE)
    keep[0] = True
    if keep.all():
        return scores
    keep_labels(labels, keep)
    return scores[keep]


def grow_labels(
    labels: Labels,
    core: Labels,
    scores: NDArray[np.float32],
    bounds: Sequence[float] | NDArray[np.float64],
    threads: int | None = None,
) -> NDArray[np.float32]:
    """Replace numbers of sinks, `labels`, in place, by the finished labels 1..n that lie in them, `core`.

    Both are (Z, Y, X). What flows to a sink in which nothing was found becomes background; nuclei with fewer
    or more voxels than the bounds are dropped. Gives the scores of the others.
    """
    inside: Any = core > 0
    numbers: Any = core[inside]
    if isinstance(labels, Tensor):
        table = device.numbers_within(labels, inside, numbers)
    else:
        table = np.zeros(int(labels.max(initial=0)) + 1, np.uint32)
        table[labels[inside]] = numbers
    table[0] = 0
    renumber_labels(labels, table)
    labels[inside] = numbers
    grown = clean_labels(labels, threads=threads)
    keep = (grown.voxels >= bounds[0]) & (grown.voxels <= bounds[1])
    keep[0] = True
    keep_labels(labels, keep)
    return scores[keep]


@dataclass(frozen=True)
class Nucleus:
    """One segmented nucleus: its number, centroid (the centre of the first voxel is at 0), volume and so on.

    `mean_intensity` is in units of the input image; `score` in 0..1, see `masks.score_labels`.
    """

    label: int
    z_um: float
    y_um: float
    x_um: float
    volume_um3: float
    mean_intensity: float
    score: float


#: What tables and answers say of a nucleus, in this order.
NUCLEUS_COLUMNS = tuple(field.name for field in fields(Nucleus))


@njit(cache=True, nogil=True)
def _sum_up(labels: NDArray[np.uint32], image: NDArray[Any], sums: NDArray[np.float64]) -> None:
    """Add voxels, z, y, x and intensity of every label to the rows of `sums` (highest label + 1, 5)."""
    depth, height, width = labels.shape
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                label = labels[z, y, x]
                if label != 0:
                    row = sums[label]
                    row[0] += 1.0
                    row[1] += z
                    row[2] += y
                    row[3] += x
                    row[4] += image[z, y, x]


def measure_nuclei(
    labels: NDArray[np.uint32],
    image: NDArray[Any],
    voxel_size: VoxelSize,
    scores: NDArray[np.floating[Any]],
) -> list[Nucleus]:
    """Measure every nucleus of a label volume (Z, Y, X) in one pass, in the order of the labels.

    Numbers may have gaps; `scores` are by label. Raises InputError if shapes do not fit or a label has no
    score.
    """
    if labels.ndim != 3 or labels.shape != image.shape:
        raise InputError(
            f"nuclei: labels {labels.shape} and image {image.shape} must be volumes of one shape"
        )
    count = int(labels.max(initial=0)) + 1
    if len(scores) < count:
        raise InputError(f"nuclei: {len(scores)} scores for labels up to {count - 1}")
    values = image if image.dtype.kind in "iuf" and image.dtype.itemsize > 1 else image.astype(np.float32)
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    sums = np.zeros((count, 5))
    native = values.dtype.newbyteorder("=")
    _sum_up(np.ascontiguousarray(labels, dtype=np.uint32), np.ascontiguousarray(values, dtype=native), sums)
    present = np.flatnonzero(sums[:, 0])
    voxels = sums[present, :1]
    z, y, x, intensity = (sums[present, 1:] / voxels * (*voxel_size.zyx, 1.0)).T
    rows = np.stack([z, y, x, voxels[:, 0] * voxel_size.volume_um3, intensity, scores[present]], axis=1)
    return [Nucleus(label, *row) for label, row in zip(present.tolist(), rows.tolist(), strict=True)]
