"""Batches of augmented patches of volumes.

Batches of augmented crops, cut ahead of the network in threads that hold no interpreter lock.

Crops of planes are made by `crop_batches`, patches of volumes by `patch_batches`.

Batches of augmented crops of planes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nuclei3d.config.sections import AugmentParams
from nuclei3d.training.augmentation import Appearance, change_crop, change_patch, draw_appearance, draw_fields
from nuclei3d.training.crops import (
    CropPlan,
    PatchPlan,
    PatchSampling,
    Stream,
    crop_generator,
    cut_crop,
    cut_patch,
    draw_crop,
    draw_patch,
)
from nuclei3d.training.samples import VIEWS, PlaneSet, VolumeSet

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
        Gives the plane of each crop of an epoch (`nuclei3d.training.sampling.epoch_order`).
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
        Loss weight per label and plane (`nuclei3d.training.sampling.nucleus_weights`), or None.
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
        for i, plane in enumerate(planes):
            image = np.empty((size, size), np.float32)
            self._make_crop(int(plane), epoch, first + i, image, labels[i], flows[i])
            images[i, :, :, 0] = image
        return collect_batch(
            torch.from_numpy(images).permute(0, 3, 1, 2), labels, flows, planes, self.nucleus_weights
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
        generator_of = partial(crop_generator, self.seed, epoch, index)
        plan = self.plan(plane, epoch, index)
        gain, bias = self.planes.gains[plane]
        cut_crop(*self.planes.read(plane), float(gain), float(bias), plan, image, labels, flows)
        appearance = draw_appearance(self.augment, generator_of(Stream.APPEARANCE))
        if appearance == Appearance():
            return
        # numbered labels of a plane have no gaps, so their count is also the largest
        largest = int(labels.max())
        change_crop(
            image,
            labels,
            appearance,
            self.augment,
            draw_fields(appearance, self.augment, largest, image.shape, generator_of),
            plan=plan,
            info=self.planes.infos[plane],
            radius_px=max(2, round(self.diameter_px)),
        )


def validation_crops(
    planes: PlaneSet, count: int, crop_px: int, scale: float, diameter_px: float, batch_size: int
) -> list[Batch]:
    """Cut fixed, unaugmented crops from planes spread evenly over a set; all fit in memory.

    Every view has its share of the crops. Crops without nuclei occur as they occur in the planes.
    """
    maker = CropMaker(planes, NO_AUGMENTATION, crop_px, scale, diameter_px, seed=0)
    # ordered by view: an even spacing through planes in turns could miss one
    by_view = np.argsort([VIEWS.index(info.view) for info in planes.infos], kind="stable")
    return fixed_batches(maker, by_view, count, batch_size)


@dataclass(frozen=True)
class PatchMaker:
    """Cuts and augments patches; each depends on (seed, epoch, index, volume) and on nothing else.

    Attributes
    ----------
    volumes
        What to cut from.
    augment
        What to change.
    sampling
        Shape and scale of the patches, and what they are drawn around.
    diameter_px
        Diameter of a nucleus in pixels of the patch's planes.
    seed
        Seed of all draws.
    unit_flows
        Whether flows are unit vectors (heat) or have a length of their own (tanh).
    nucleus_weights
        Loss weight per label and volume (`nuclei3d.training.sampling.volume_nucleus_weights`), or None.
    """

    volumes: VolumeSet
    augment: AugmentParams
    sampling: PatchSampling
    diameter_px: float
    seed: int
    unit_flows: bool = True
    nucleus_weights: Sequence[NDArray[np.float32]] | None = None

    def make_batch(self, volumes: NDArray[np.int64], epoch: int, first: int) -> Batch:
        """Make a batch from these volumes; its patches have the numbers `first`, `first` + 1, ..."""
        count, shape = len(volumes), self.sampling.shape
        images = np.empty((count, 1, *shape), np.float32)
        labels = np.empty((count, *shape), np.uint32)
        flows = np.empty((count, 3, *shape), np.float32)
        for i, volume in enumerate(volumes):
            self._make_patch(int(volume), epoch, first + i, images[i, 0], labels[i], flows[i])
        return collect_batch(torch.from_numpy(images), labels, flows, volumes, self.nucleus_weights)

    def _make_patch(
        self,
        volume: int,
        epoch: int,
        index: int,
        image: NDArray[np.float32],
        labels: NDArray[np.uint32],
        flows: NDArray[np.float32],
    ) -> None:
        generator_of = partial(crop_generator, self.seed, epoch, index)
        plan = draw_patch(self.volumes, volume, generator_of(Stream.GEOMETRY), self.augment, self.sampling)
        gain, bias = self.volumes.gains[volume]
        arrays = self.volumes.read(volume)
        cut_patch(*arrays, float(gain), float(bias), plan, self.unit_flows, image, labels, flows)
        appearance = draw_appearance(self.augment, generator_of(Stream.APPEARANCE))
        if appearance == Appearance():
            return
        largest = len(self.volumes.nuclei[volume].centres)
        change_patch(
            image,
            labels,
            appearance,
            self.augment,
            draw_fields(appearance, self.augment, largest, image.shape, generator_of),
            anisotropy=self.sampling.voxel_size.anisotropy,
            depth=_depth_of_patch(plan, self.volumes.infos[volume].shape[0]),
            radius_px=max(2, round(self.diameter_px)),
        )


def _depth_of_patch(plan: PatchPlan, depth: int) -> tuple[float, float]:
    """Give the relative depth at a patch's middle, and its change from plane to plane of the patch."""
    return plan.centre_z / depth, plan.flip_z / plan.scale_z / depth


def validation_patches(
    volumes: VolumeSet,
    count: int,
    sampling: PatchSampling,
    diameter_px: float,
    batch_size: int,
    unit_flows: bool = True,
) -> list[Batch]:
    """Cut fixed, unaugmented patches from volumes spread evenly over a set; all fit in memory."""
    maker = PatchMaker(volumes, NO_AUGMENTATION, sampling, diameter_px, seed=0, unit_flows=unit_flows)
    return fixed_batches(maker, np.arange(len(volumes)), count, batch_size)
