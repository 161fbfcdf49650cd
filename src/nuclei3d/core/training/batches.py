"""Batches of augmented crops, cut ahead of the network in threads that hold no interpreter lock.

Crops of planes are made by `crop_batches`, patches of volumes by `patch_batches`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nuclei3d.config.train import AugmentParams

NO_AUGMENTATION = AugmentParams(flips=False, rotation="none", side_rotation="none", rescale_range=0.0)

_VALIDATION_EPOCH = 2**62
"""Stands for the epoch in the generators of the validation crops, which are the same for every seed."""


@dataclass(frozen=True)
class Batch:
    """Crops and targets.

    Attributes
    ----------
    images
        float32 (B, 2, P, P), normalised; the second channel is empty, as Cellpose's networks want it. Stored
        channels last. Patches of volumes: (B, 1, Z, Y, X).
    foreground
        bool (B, P, P) or (B, Z, Y, X).
    flows
        float32 (B, 2, P, P), unit vectors (dy, dx), or (B, 3, Z, Y, X), (dz, dy, dx).
    weights
        float32 as `foreground`, loss weights, or None for all 1.
    labels
        int32 as `foreground`; 0 is background.
    planes
        int64 (B,): the plane (or volume) that each crop was cut from.
    """

    images: Tensor
    foreground: Tensor
    flows: Tensor
    weights: Tensor | None
    labels: NDArray[np.int32]
    planes: NDArray[np.int64]

    def to(self, device: torch.device) -> Batch:
        """Copy to a device; from pinned memory, to a GPU, without waiting."""
        return self if device.type == "cpu" else self._moved(lambda each: each.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Copy to page-locked memory."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            move(self.images),
            move(self.foreground),
            move(self.flows),
            None if self.weights is None else move(self.weights),
            self.labels,
            self.planes,
        )


def collect_batch(
    images: Tensor,
    labels: NDArray[np.unsignedinteger[Any]],
    flows: NDArray[np.float32],
    planes: NDArray[np.int64],
    nucleus_weights: Sequence[NDArray[np.float32]] | None,
) -> Batch:
    """Put a batch together; parameters as in `Batch`, `nucleus_weights` per plane (volume) and label."""
    weights = None
    if nucleus_weights is not None:
        weights = np.empty(labels.shape, np.float32)
        for i, plane in enumerate(planes):
            np.take(nucleus_weights[plane], labels[i], out=weights[i])
    return Batch(
        images=images,
        foreground=torch.from_numpy(labels > 0),
        flows=torch.from_numpy(flows),
        weights=None if weights is None else torch.from_numpy(weights),
        labels=labels.astype(np.int32),
        planes=planes,
    )


class BatchMaker(Protocol):
    """Cuts crops of planes or patches of volumes."""

    def make_batch(self, planes: NDArray[np.int64], epoch: int, first: int, /) -> Batch:
        """Make a batch from these planes (volumes); its crops have the numbers `first`, `first` + 1, ..."""


class BatchStream:
    """The batches of epoch after epoch, cut ahead by threads, also while the network is validated.

    Parameters
    ----------
    maker
        Cuts the crops.
    order_of
        Gives the plane of each crop of an epoch (`nuclei3d.core.training.sampling.epoch_order`).
    epochs
        The epochs to make, in order.
    batch_size
        Crops a batch; the last of an epoch may be smaller.
    workers
        Threads; their number does not change the crops.
    pinned
        Whether batches are put in page-locked memory, by the threads.
    """

    def __init__(
        self,
        maker: BatchMaker,
        order_of: Callable[[int], NDArray[np.int64]],
        epochs: range,
        batch_size: int,
        workers: int,
        *,
        pinned: bool = False,
    ) -> None:
        self._maker = maker
        self._pinned = pinned
        self._jobs = self._list_jobs(order_of, epochs, batch_size)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="crops")
        self._waiting: deque[Future[Batch]] = deque()
        self._ahead = 2 * workers

    @staticmethod
    def _list_jobs(
        order_of: Callable[[int], NDArray[np.int64]], epochs: range, batch_size: int
    ) -> Iterator[tuple[NDArray[np.int64], int, int]]:
        for epoch in epochs:
            order = order_of(epoch)
            for first in range(0, len(order), batch_size):
                yield order[first : first + batch_size], epoch, first

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Batch:
        while len(self._waiting) <= self._ahead and (job := next(self._jobs, None)) is not None:
            self._waiting.append(self._pool.submit(self._make, *job))
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft().result()

    def _make(self, planes: NDArray[np.int64], epoch: int, first: int) -> Batch:
        batch = self._maker.make_batch(planes, epoch, first)
        return batch.pinned() if self._pinned else batch

    def close(self) -> None:
        """Stop the threads; batches not taken are lost."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def fixed_batches(maker: BatchMaker, planes: NDArray[np.int64], count: int, batch_size: int) -> list[Batch]:
    """Cut crops from these planes (volumes), spread evenly; positions are drawn once and for all."""
    if not len(planes) or not count:
        return []
    chosen = planes[((np.arange(count) + 0.5) * len(planes) / count).astype(np.int64)].astype(np.int64)
    return [
        maker.make_batch(chosen[first : first + batch_size], _VALIDATION_EPOCH, first)
        for first in range(0, count, batch_size)
    ]
