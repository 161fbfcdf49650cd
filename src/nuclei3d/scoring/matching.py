"""The table of overlaps between true and predicted nuclei, and the matching that follows from it.

Every metric of the evaluation is read off one sparse contingency table, so all of them speak about the
same overlaps. Labels may be any non-negative integers, with gaps; 0 is background.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from nuclei3d.errors import InputError

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Labels = NDArray[np.integer[Any]]

# Voxels looked at in one go: bounds the working memory to some 100 MB whatever the size of the volume.
_CHUNK_VOXELS = 1 << 22


@dataclass(frozen=True)
class OverlapTable:
    """Sparse contingency table of two labelled volumes, without the background.

    Labels are in ascending order, int64 (n_true,) and (n_pred,), sizes their voxel counts. Of each
    overlapping pair, ordered by row, then column, there is its position in `true_labels` and in
    `pred_labels`, and the number of shared voxels.
    """

    true_labels: Integers
    true_sizes: Integers
    pred_labels: Integers
    pred_sizes: Integers
    rows: Integers
    columns: Integers
    overlaps: Integers

    @property
    def n_true(self) -> int:
        """Number of true nuclei."""
        return len(self.true_labels)

    @property
    def n_pred(self) -> int:
        """Number of predicted nuclei."""
        return len(self.pred_labels)

    @cached_property
    def ious(self) -> Floats:
        """Intersection over union of every overlapping pair."""
        unions = self.true_sizes[self.rows] + self.pred_sizes[self.columns] - self.overlaps
        return np.asarray(self.overlaps / unions, dtype=np.float64)

    @cached_property
    def true_cover(self) -> Floats:
        """Share of the true nucleus that each overlapping pair covers."""
        return np.asarray(self.overlaps / self.true_sizes[self.rows], dtype=np.float64)

    @cached_property
    def pred_cover(self) -> Floats:
        """Share of the predicted nucleus that each overlapping pair covers."""
        return np.asarray(self.overlaps / self.pred_sizes[self.columns], dtype=np.float64)

    @cached_property
    def best_true_iou(self) -> Floats:
        """Best IoU of each true nucleus with any prediction, 0 where nothing overlaps; shape (n_true,)."""
        best = np.zeros(self.n_true)
        np.maximum.at(best, self.rows, self.ious)
        return best

    @cached_property
    def best_pred_iou(self) -> Floats:
        """Best IoU of each predicted nucleus with any truth, 0 where nothing overlaps; shape (n_pred,)."""
        best = np.zeros(self.n_pred)
        np.maximum.at(best, self.columns, self.ious)
        return best


@dataclass(frozen=True)
class Matching:
    """One-to-one assignment of true to predicted nuclei at one IoU threshold.

    `true_index` and `pred_index` are positions in the table's `true_labels` and `pred_labels`, in ascending
    order of the former; `ious` are the IoUs of the matched pairs.
    """

    true_index: Integers
    pred_index: Integers
    ious: Floats

    @property
    def tp(self) -> int:
        """Number of matched pairs."""
        return len(self.true_index)


def overlap_table(truth: Labels, prediction: Labels) -> OverlapTable:
    """Count the shared voxels of all pairs of labels (integers 0 .. 2**31 - 1, equal shapes) in one pass.

    Runs of equal label pairs along the last axis are counted as wholes, so the cost of sorting depends on the
    number of borders crossed, not on the number of voxels.
    """
    _check_labels(truth, "truth")
    _check_labels(prediction, "prediction")
    if truth.shape != prediction.shape:
        raise InputError(f"truth and prediction differ in shape: {truth.shape} and {prediction.shape}")
    flat_truth, flat_prediction = truth.reshape(-1), prediction.reshape(-1)
    keys: list[Integers] = [np.zeros(0, dtype=np.int64)]
    counts: list[Floats] = [np.zeros(0)]
    for start in range(0, len(flat_truth), _CHUNK_VOXELS):
        chunk = slice(start, start + _CHUNK_VOXELS)
        key = flat_truth[chunk].astype(np.int64)
        key <<= 32
        key |= flat_prediction[chunk].astype(np.int64, copy=False)
        borders = np.flatnonzero(key[1:] != key[:-1]) + 1
        starts = np.concatenate([np.zeros(1, dtype=np.int64), borders])
        run_key = key[starts]
        run_length = np.diff(np.append(starts, len(key)))
        unique, inverse = np.unique(run_key, return_inverse=True)
        keys.append(unique)
        counts.append(np.bincount(inverse, weights=run_length).astype(np.float64))
    return _table_of(np.concatenate(keys), np.concatenate(counts))


def match(table: OverlapTable, threshold: float) -> Matching:
    """Match as many pairs with IoU >= threshold as possible; among those choices, the largest sum of IoUs.

    The graph of admissible pairs falls into small connected parts (at thresholds above .5 each is one pair),
    and each part is solved by itself with the Hungarian method, so memory never grows with n_true x n_pred.
    The counts equal those of ``stardist.matching.matching`` and ``cellpose.metrics.average_precision``.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"an IoU threshold must lie in (0, 1], got {threshold}")
    admissible = table.ious >= threshold
    rows, columns, ious = table.rows[admissible], table.columns[admissible], table.ious[admissible]
    lone = (np.bincount(rows, minlength=table.n_true)[rows] == 1) & (
        np.bincount(columns, minlength=table.n_pred)[columns] == 1
    )
    matched = [(rows[lone], columns[lone], ious[lone])]
    if not lone.all():
        shape = (table.n_true, table.n_pred)
        matched += assign_in_parts(rows[~lone], columns[~lone], ious[~lone], shape, _matches_first)
    true_index, pred_index, scores = (np.concatenate(part) for part in zip(*matched, strict=True))
    order = np.argsort(true_index)
    return Matching(true_index[order], pred_index[order], scores[order])


def average_precision(table: OverlapTable, thresholds: Sequence[float]) -> Floats:
    """AP = TP / (TP + FP + FN) of one volume at each threshold; nan where both volumes are empty."""
    tp = np.array([match(table, threshold).tp for threshold in thresholds], dtype=np.float64)
    total = table.n_true + table.n_pred - tp
    return np.divide(tp, total, out=np.full(len(tp), np.nan), where=total > 0)


def relabel_sequential(labels: Labels) -> tuple[NDArray[np.uint32], Integers]:
    """Renumber labels in order to 1..n (uint32), 0 kept; also give the original of each, (n + 1,)."""
    present = np.unique(labels)
    originals = np.concatenate([[0], present[present > 0]]).astype(np.int64)
    largest = int(originals[-1])
    if largest == len(originals) - 1:
        return labels.astype(np.uint32), originals
    if largest < 1 << 24:
        lookup = np.zeros(largest + 1, dtype=np.uint32)
        lookup[originals] = np.arange(len(originals), dtype=np.uint32)
        return lookup[labels], originals
    return np.searchsorted(originals, labels).astype(np.uint32), originals


def leave_out_unknown(prediction: Labels, truth: Labels, unknown: NDArray[np.bool_] | None) -> Labels:
    """Make predicted labels background where nobody looked, so that truth and prediction end there alike.

    A nucleus that lies for the most part there goes altogether, unless the rest of it is on true nuclei.
    """
    if unknown is None:
        return prediction
    sequential, names = relabel_sequential(prediction)
    count = len(names)
    whole = np.bincount(sequential.ravel(), minlength=count)
    left = np.bincount(sequential[~unknown], minlength=count)
    on_true = np.bincount(sequential[~unknown & (truth > 0)], minlength=count)
    gone = (2 * left < whole) & (2 * on_true <= left)
    return np.where(unknown | gone[sequential], prediction.dtype.type(0), prediction)


def _check_labels(labels: Labels, name: str) -> None:
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{name} labels must be integers, got {labels.dtype}")
    if labels.size and (int(labels.min()) < 0 or int(labels.max()) >= 1 << 31):
        raise InputError(
            f"{name} labels must lie in 0 .. {2**31 - 1}, found {labels.min()} .. {labels.max()}"
        )


def _table_of(keys: Integers, counts: Floats) -> OverlapTable:
    unique, inverse = np.unique(keys, return_inverse=True)
    voxels = np.bincount(inverse, weights=counts, minlength=len(unique)).astype(np.int64)
    true_of, pred_of = unique >> 32, unique & 0xFFFFFFFF
    true_labels, true_sizes = _sizes(true_of, voxels)
    pred_labels, pred_sizes = _sizes(pred_of, voxels)
    both = (true_of > 0) & (pred_of > 0)
    return OverlapTable(
        true_labels,
        true_sizes,
        pred_labels,
        pred_sizes,
        np.searchsorted(true_labels, true_of[both]).astype(np.int64),
        np.searchsorted(pred_labels, pred_of[both]).astype(np.int64),
        voxels[both],
    )


def _sizes(labels: Integers, voxels: Integers) -> tuple[Integers, Integers]:
    unique, inverse = np.unique(labels, return_inverse=True)
    sizes = np.bincount(inverse, weights=voxels, minlength=len(unique)).astype(np.int64)
    nuclei = unique > 0
    return unique[nuclei], sizes[nuclei]


def _matches_first(iou: Floats) -> Floats:
    # One more match always outweighs any gain in IoU: all IoUs of a matching sum to at most the shorter side.
    return (iou > 0) + iou / (2 * min(iou.shape))


def assign_in_parts(
    rows: Integers, columns: Integers, ious: Floats, shape: tuple[int, int], gain: Callable[[Floats], Floats]
) -> list[tuple[Integers, Integers, Floats]]:
    """Assign rows to columns, each at most once, with the highest sum of gains (Hungarian method).

    The parts of the graph of pairs that hang together are solved one by one. `shape` is the number of rows
    and columns; `gain` gives that of each pair of a part from the table of its IoUs (0: no pair). Gives rows,
    columns and IoUs of each part.
    """
    graph = coo_array((np.ones(len(rows)), (rows, columns + shape[0])), shape=(sum(shape),) * 2)
    _, part_of = connected_components(graph, directed=False)
    part = part_of[rows]
    order = np.argsort(part, kind="stable")
    bounds = np.flatnonzero(np.diff(part[order])) + 1
    matched = []
    for pairs in np.split(order, bounds):
        part_rows, row_at = np.unique(rows[pairs], return_inverse=True)
        part_columns, column_at = np.unique(columns[pairs], return_inverse=True)
        iou = np.zeros((len(part_rows), len(part_columns)))
        iou[row_at, column_at] = ious[pairs]
        i, j = linear_sum_assignment(gain(iou), maximize=True)
        chosen = iou[i, j] > 0
        i, j = i[chosen], j[chosen]
        matched.append((part_rows[i], part_columns[j], iou[i, j]))
    return matched
