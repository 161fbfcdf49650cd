"""Batches of augmented crops of planes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from nuclei3d.config.train import AugmentParams
from nuclei3d.core.training.appearance import Appearance, draw_appearance, draw_fields
from nuclei3d.core.training.batches import NO_AUGMENTATION, Batch, collect_batch, fixed_batches
from nuclei3d.core.training.crop_appearance import change_crop
from nuclei3d.core.training.crops import CropPlan, cut_crop, draw_crop
from nuclei3d.core.training.draws import Stream, crop_generator
from nuclei3d.core.training.planes import VIEWS, PlaneSet


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
