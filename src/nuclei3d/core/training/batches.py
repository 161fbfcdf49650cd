"""Batches of augmented crops, cut ahead of the network in threads that hold no interpreter lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nuclei3d.config.train import AugmentParams
from nuclei3d.core.training.augmentation import (
    Appearance,
    change_appearance,
    depth_of_crop,
    draw_appearance,
)
from nuclei3d.core.training.crops import CropPlan, Stream, crop_generator, cut_crop, draw_crop
from nuclei3d.core.training.dimming import draw_dimming
from nuclei3d.core.training.planes import VIEWS, PlaneSet

NO_AUGMENTATION = AugmentParams(flips=False, rotation="none", side_rotation="none", rescale_range=0.0)

VALIDATION_EPOCH = 2**62
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
        """Copy to a device; to a GPU through pinned memory, without waiting."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return Batch(
            move(self.images),
            move(self.foreground),
            move(self.flows),
            None if self.weights is None else move(self.weights),
            self.labels,
            self.planes,
        )


@dataclass(frozen=True)
class CropMaker:
    """Cuts and augments crops; every crop depends on (seed, epoch, index, plane) and on nothing else.

    Attributes
    ----------
    planes
        What to cut from.
    augment
        What to change.
    crop_px
        Edge of the crops.
    scale
        Crop pixels per plane pixel: the network's diameter over the diameter on the planes.
    diameter_px
        The network's diameter.
    seed
        Seed of all draws.
    nucleus_centred
        Share of crops placed around a nucleus.
    nucleus_weights
        Loss weight per label and plane (`nuclei3d.core.training.sampling.nucleus_weights`), or None.
    """

    planes: PlaneSet
    augment: AugmentParams
    crop_px: int
    scale: float
    diameter_px: float
    seed: int
    nucleus_centred: float = 0.0
    nucleus_weights: Sequence[NDArray[np.float32]] | None = None

    def plan(self, plane: int, epoch: int, index: int) -> CropPlan:
        """Draw where crop number `index` of an epoch is cut from a plane."""
        rng = crop_generator(self.seed, epoch, index, Stream.GEOMETRY)
        return draw_crop(
            self.planes, plane, rng, self.augment, self.crop_px, self.scale, self.nucleus_centred
        )

    def make_batch(self, planes: NDArray[np.int64], epoch: int, first: int) -> Batch:
        """Make a batch from these planes; its crops have the numbers `first`, `first` + 1, ..."""
        count, size = len(planes), self.crop_px
        images = np.zeros((count, size, size, 2), np.float32)
        labels = np.empty((count, size, size), np.uint16)
        flows = np.empty((count, 2, size, size), np.float32)
        weights = None if self.nucleus_weights is None else np.empty((count, size, size), np.float32)
        for i, plane in enumerate(planes):
            image = np.empty((size, size), np.float32)
            self._make_crop(int(plane), epoch, first + i, image, labels[i], flows[i])
            images[i, :, :, 0] = image
            if weights is not None and self.nucleus_weights is not None:
                np.take(self.nucleus_weights[plane], labels[i], out=weights[i])
        return Batch(
            images=torch.from_numpy(images).permute(0, 3, 1, 2),
            foreground=torch.from_numpy(labels > 0),
            flows=torch.from_numpy(flows),
            weights=None if weights is None else torch.from_numpy(weights),
            labels=labels.astype(np.int32),
            planes=planes,
        )

    def _make_crop(
        self,
        plane: int,
        epoch: int,
        index: int,
        image: NDArray[np.float32],
        labels: NDArray[np.uint16],
        flows: NDArray[np.float32],
    ) -> None:
        plan = self.plan(plane, epoch, index)
        info = self.planes.infos[plane]
        gain, bias = self.planes.gains[plane]
        cut_crop(*self.planes.read(plane), float(gain), float(bias), plan, image, labels, flows)
        rng = crop_generator(self.seed, epoch, index, Stream.APPEARANCE)
        appearance = draw_appearance(self.augment, info.view, plan.turned, rng)
        if appearance == Appearance():
            return
        keeps = dimming_noise = None
        if appearance.dims:
            # numbered labels of a plane have no gaps, so their count is also the largest
            largest = int(labels.max())
            rng = crop_generator(self.seed, epoch, index, Stream.DIMMING)
            keeps = draw_dimming(self.augment, largest, rng)
            rng = crop_generator(self.seed, epoch, index, Stream.DIMMING_NOISE)
            dimming_noise = rng.standard_normal(image.shape, dtype=np.float32)
        noise = None
        if appearance.noise:
            rng = crop_generator(self.seed, epoch, index, Stream.NOISE)
            noise = rng.standard_normal(image.shape, dtype=np.float32)
        change_appearance(
            image,
            labels,
            appearance,
            self.augment,
            depth=depth_of_crop(plan, info.view, info.height),
            radius_px=max(2, round(self.diameter_px)),
            keeps=keeps,
            dimming_noise=dimming_noise,
            noise=noise,
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
    """

    def __init__(
        self,
        maker: BatchMaker,
        order_of: Callable[[int], NDArray[np.int64]],
        epochs: range,
        batch_size: int,
        workers: int,
    ) -> None:
        self._maker = maker
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
            self._waiting.append(self._pool.submit(self._maker.make_batch, *job))
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft().result()

    def close(self) -> None:
        """Stop the threads; batches not taken are lost."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def validation_batches(
    planes: PlaneSet, count: int, crop_px: int, scale: float, diameter_px: float, batch_size: int
) -> list[Batch]:
    """Cut fixed, unaugmented crops from planes spread evenly over a set; all fit in memory.

    Every view has its share of the crops. Crops without nuclei occur as they occur in the planes. Positions
    are drawn once and for all.
    """
    if not len(planes) or not count:
        return []
    maker = CropMaker(planes, NO_AUGMENTATION, crop_px, scale, diameter_px, seed=0)
    # ordered by view: an even spacing through planes in turns could miss one
    by_view = np.argsort([VIEWS.index(info.view) for info in planes.infos], kind="stable")
    chosen = by_view[((np.arange(count) + 0.5) * len(planes) / count).astype(np.int64)].astype(np.int64)
    return [
        maker.make_batch(chosen[first : first + batch_size], VALIDATION_EPOCH, first)
        for first in range(0, count, batch_size)
    ]
