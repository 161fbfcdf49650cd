"""Bounding boxes and sizes of labels, and the work on many labels shared between threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


@dataclass(frozen=True)
class LabelBoxes:
    """Where each label of a volume lies.

    Attributes
    ----------
    boxes : int32 array, shape (n + 1, 6)
        First and last index on z, y and x of the label of that row; undefined for labels without voxels.
    voxels : int64 array, shape (n + 1,)
        Number of voxels of each label; that of the background (row 0) is 0.
    """

    boxes: NDArray[np.int32]
    voxels: NDArray[np.int64]

    @property
    def present(self) -> NDArray[np.int64]:
        """The label numbers that have voxels, ascending."""
        return np.flatnonzero(self.voxels).astype(np.int64)


@njit(cache=True, nogil=True)
def _scan(labels: NDArray[np.uint32], boxes: NDArray[np.int32], voxels: NDArray[np.int64]) -> None:
    depth, height, width = labels.shape
    boxes[:, 0::2] = 2**31 - 1
    boxes[:, 1::2] = -1
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                label = labels[z, y, x]
                if label != 0:
                    box = boxes[label]
                    voxels[label] += 1
                    box[0] = min(box[0], z)
                    box[1] = max(box[1], z)
                    box[2] = min(box[2], y)
                    box[3] = max(box[3], y)
                    box[4] = min(box[4], x)
                    box[5] = max(box[5], x)


def find_boxes(labels: NDArray[np.uint32]) -> LabelBoxes:
    """Find the box and the size of every label in one pass over a volume (Z, Y, X)."""
    count = int(labels.max(initial=0)) + 1
    boxes = np.empty((count, 6), np.int32)
    voxels = np.zeros(count, np.int64)
    _scan(labels, boxes, voxels)
    return LabelBoxes(boxes, voxels)


def compact_labels(labels: NDArray[np.integer[Any]]) -> NDArray[np.uint32]:
    """Give labels as contiguous uint32; numbers far above the number of voxels are renumbered.

    Negative numbers become background. Tables by label number stay small after this.
    """
    highest = int(labels.max(initial=0))
    if highest > max(labels.size, 2**16):
        values, inverse = np.unique(np.maximum(labels, 0), return_inverse=True)
        first = 0 if values[0] == 0 else 1
        return np.ascontiguousarray(inverse.reshape(labels.shape) + first, dtype=np.uint32)
    if np.issubdtype(labels.dtype, np.signedinteger) and int(labels.min(initial=0)) < 0:
        labels = np.maximum(labels, 0)
    return np.ascontiguousarray(labels, dtype=np.uint32)


def available_threads() -> int:
    """Count the processors that this process may use, or fewer if NUMBA_NUM_THREADS says so."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wished = os.environ.get("NUMBA_NUM_THREADS", "")
    return min(usable, int(wished)) if wished.isdigit() and int(wished) > 0 else usable


def share_labels(
    work: Callable[[NDArray[np.int64]], Any],
    chosen: NDArray[np.int64],
    voxels: NDArray[np.int64],
    threads: int | None = None,
) -> None:
    """Run `work` on groups of labels in threads; the kernels that it calls must release the GIL.

    Plain threads instead of numba's own: they may be started from any number of threads (Dask) and
    survive a fork. Labels are dealt out by size, so that no thread is left with the largest at the end.
    """
    threads = available_threads() if threads is None else threads
    if threads <= 1 or len(chosen) <= 1:
        work(chosen)
        return
    ordered = chosen[np.argsort(-voxels[chosen], kind="stable")]
    groups = [ordered[start :: 4 * threads] for start in range(min(4 * threads, len(ordered)))]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, groups))
