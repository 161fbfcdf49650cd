"""Batches of augmented patches, as `batches` makes them of crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nuclei3d.config.train import AugmentParams, LossParams
from nuclei3d.core.training.batches import NO_AUGMENTATION, VALIDATION_EPOCH, Batch
from nuclei3d.core.training.crops import Stream, crop_generator
from nuclei3d.core.training.dimming import draw_dimming
from nuclei3d.core.training.patch_appearance import PatchAppearance, change_patch, draw_patch_appearance
from nuclei3d.core.training.patches import PatchPlan, PatchSampling, cut_patch, draw_patch
from nuclei3d.core.training.sampling import contrast_weights
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
        Loss weight per label and volume (`volume_nucleus_weights`), or None.
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
        weights = None if self.nucleus_weights is None else np.empty((count, *shape), np.float32)
        for i, volume in enumerate(volumes):
            self._make_patch(int(volume), epoch, first + i, images[i, 0], labels[i], flows[i])
            if weights is not None and self.nucleus_weights is not None:
                np.take(self.nucleus_weights[volume], labels[i], out=weights[i])
        return Batch(
            images=torch.from_numpy(images),
            foreground=torch.from_numpy(labels > 0),
            flows=torch.from_numpy(flows),
            weights=None if weights is None else torch.from_numpy(weights),
            labels=labels.astype(np.int32),
            planes=volumes,
        )

    def _make_patch(
        self,
        volume: int,
        epoch: int,
        index: int,
        image: NDArray[np.float32],
        labels: NDArray[np.uint32],
        flows: NDArray[np.float32],
    ) -> None:
        def generator(stream: int) -> np.random.Generator:
            return crop_generator(self.seed, epoch, index, stream)

        plan = draw_patch(self.volumes, volume, generator(Stream.GEOMETRY), self.augment, self.sampling)
        gain, bias = self.volumes.gains[volume]
        arrays = self.volumes.read(volume)
        cut_patch(*arrays, float(gain), float(bias), plan, self.unit_flows, image, labels, flows)
        anisotropy = self.sampling.voxel_size.anisotropy
        appearance = draw_patch_appearance(self.augment, anisotropy, generator(Stream.APPEARANCE))
        if appearance == PatchAppearance():
            return
        keeps = dimming_noise = noise = None
        if appearance.dims:
            largest = len(self.volumes.nuclei[volume].centres)
            keeps = draw_dimming(self.augment, largest, generator(Stream.DIMMING))
            dimming_noise = generator(Stream.DIMMING_NOISE).standard_normal(image.shape, dtype=np.float32)
        if appearance.noise:
            noise = generator(Stream.NOISE).standard_normal(image.shape, dtype=np.float32)
        change_patch(
            image,
            labels,
            appearance,
            self.augment,
            anisotropy=anisotropy,
            depth=_depth_of_patch(plan, self.volumes.infos[volume].shape[0]),
            radius_px=max(2, round(self.diameter_px)),
            keeps=keeps,
            dimming_noise=dimming_noise,
            noise=noise,
        )


def _depth_of_patch(plan: PatchPlan, depth: int) -> tuple[float, float]:
    """Give the relative depth at a patch's middle, and its change from plane to plane of the patch."""
    return plan.centre_z / depth, plan.flip_z / plan.scale_z / depth


def volume_nucleus_weights(volumes: VolumeSet, params: LossParams) -> list[NDArray[np.float32]] | None:
    """Compute the weight of every nucleus of every volume in the loss, by contrast or size in 3D.

    Returns
    -------
    list of float32 (nuclei + 1,), one per volume, or None
        Entry 0 (background) is 1; None if all weights are 1.
    """
    tables = [
        table.volumes_um3 if params.weight_by == "size" else table.contrasts for table in volumes.nuclei
    ]
    return contrast_weights([np.append(np.nan, table).astype(np.float64) for table in tables], params)


def validation_patches(
    volumes: VolumeSet,
    count: int,
    sampling: PatchSampling,
    diameter_px: float,
    batch_size: int,
    unit_flows: bool = True,
) -> list[Batch]:
    """Cut fixed, unaugmented patches from volumes spread evenly over a set; all fit in memory."""
    if not len(volumes) or not count:
        return []
    maker = PatchMaker(volumes, NO_AUGMENTATION, sampling, diameter_px, seed=0, unit_flows=unit_flows)
    chosen = ((np.arange(count) + 0.5) * len(volumes) / count).astype(np.int64)
    return [
        maker.make_batch(chosen[first : first + batch_size], VALIDATION_EPOCH, first)
        for first in range(0, count, batch_size)
    ]
