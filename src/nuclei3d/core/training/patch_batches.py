"""Batches of augmented patches of volumes."""

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
from nuclei3d.core.training.draws import Stream, crop_generator
from nuclei3d.core.training.patch_appearance import change_patch
from nuclei3d.core.training.patches import PatchPlan, PatchSampling, cut_patch, draw_patch
from nuclei3d.core.training.volume_set import VolumeSet


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
        Loss weight per label and volume (`nuclei3d.core.training.sampling.volume_nucleus_weights`), or None.
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
