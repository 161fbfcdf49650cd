"""What a 3D network is trained on and judged by: patches of labelled volumes.

Validation on fixed crops: the loss by view, and how much of each nucleus is found by contrast.

What a network is trained on and judged by: the seam between the loop and the kind of its data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nuclei3d.config.sections import TrainParams
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.unet3d import VolumeSpec
from nuclei3d.training.batches import (
    Batch,
    BatchStream,
    CropMaker,
    PatchMaker,
    validation_crops,
    validation_patches,
)
from nuclei3d.training.crops import PatchSampling
from nuclei3d.training.learner import Arithmetic, LossParts
from nuclei3d.training.losses import (
    FlowFigures,
    Loss,
    VolumeLoss,
    cellpose_loss,
    losses_of_crops,
    volume_loss,
)
from nuclei3d.training.samples import PlaneSet, VolumeSet
from nuclei3d.training.sampling import (
    epoch_order,
    nucleus_weights,
    plane_contrasts,
    plane_weights,
    volume_nucleus_weights,
    volume_weights,
)
from nuclei3d.training.state import EpochReport

_QUINTILES = ("found_faintest", "found_faint", "found_middle", "found_bright", "found_brightest")
_SMALLEST_PX = 12


def measure_contrasts(batches: Sequence[Batch]) -> list[list[NDArray[np.float64]]]:
    """Measure the contrast of all nuclei: per batch, per crop, float64 (largest label + 1,)."""
    return [
        [
            plane_contrasts(image[0].numpy(), labels.astype(np.uint16))
            for image, labels in zip(batch.images, batch.labels, strict=True)
        ]
        for batch in batches
    ]


@torch.no_grad()
def validate(
    network: nn.Module,
    batches: Sequence[Batch],
    report: EpochReport,
    *,
    views: Sequence[str],
    contrasts: Sequence[Sequence[NDArray[np.float64]]],
    device: torch.device,
    precision: torch.dtype,
    layout: torch.memory_format,
) -> EpochReport:
    """Fill in the validation figures of a report; the network is left in training mode if it was.

    Parameters
    ----------
    network
        What to judge.
    batches
        Fixed crops on the CPU; without any the report stays as it is.
    report
        Of the epoch.
    views
        View of every plane of the validation set.
    contrasts
        From `measure_contrasts`.
    device, precision, layout
        How the network computes.
    """
    if not batches:
        return report
    was_training = network.training
    network.eval()
    losses: list[tuple[str, float, float]] = []
    found: list[tuple[float, float]] = []
    for batch, batch_contrasts in zip(batches, contrasts, strict=True):
        moved = batch.to(device)
        images = moved.images.contiguous(memory_format=layout)
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            output = network(images)[0].float()
        parts = losses_of_crops(output, moved.flows, moved.foreground).cpu().tolist()
        losses.extend((views[plane], *part) for plane, part in zip(batch.planes, parts, strict=True))
        inside = (output[:, 2] > 0).cpu().numpy()
        for crop, values in enumerate(batch_contrasts):
            found.extend(found_shares(inside[crop], batch.labels[crop], values))
    network.train(was_training)
    flow = float(np.mean([loss[1] for loss in losses]))
    probability = float(np.mean([loss[2] for loss in losses]))
    by_view = {
        f"validation_loss_{view}": float(np.mean([a + b for name, a, b in losses if name == view]))
        for view in {loss[0] for loss in losses}
    }
    measured: dict[str, Any] = {
        "validation_loss": flow + probability,
        "validation_flow_loss": flow,
        "validation_probability_loss": probability,
        **by_view,
        **found_by_quintile(found),
    }
    return replace(report, **measured)


def found_shares(
    inside: NDArray[np.bool_], labels: NDArray[np.int32], contrasts: NDArray[np.float64]
) -> list[tuple[float, float]]:
    """Give contrast and share of the pixels called foreground of each nucleus of a crop that is no sliver."""
    areas = np.bincount(labels.ravel(), minlength=len(contrasts))
    hits = np.bincount(labels.ravel(), weights=inside.ravel(), minlength=len(contrasts))
    # slivers at the edge of a crop say nothing
    counted = (areas >= _SMALLEST_PX) & np.isfinite(contrasts)
    counted[0] = False
    return [(float(contrasts[label]), hits[label] / areas[label]) for label in np.flatnonzero(counted)]


def found_by_quintile(found: list[tuple[float, float]]) -> dict[str, float]:
    """Average the shares over five equally full bins of contrast (all nan with fewer than five nuclei)."""
    if len(found) < len(_QUINTILES):
        return dict.fromkeys(_QUINTILES, math.nan)
    shares = np.array([share for _, share in sorted(found)])
    return {
        name: float(np.mean(part))
        for name, part in zip(_QUINTILES, np.array_split(shares, len(_QUINTILES)), strict=True)
    }


class Examples(Protocol):
    """Training and validation data of one kind, such as planes, with the loss that belongs to it."""

    @property
    def crops(self) -> int:
        """Number of crops an epoch."""

    @property
    def axes(self) -> int:
        """Number of spatial axes of a crop."""

    def batches(
        self, epochs: range, workers: int, *, pinned: bool = False
    ) -> AbstractContextManager[Iterator[Batch]]:
        """Open the stream of the batches of these epochs, cut by threads whose number changes nothing.

        `pinned` ones lie in page-locked memory, from which a GPU fetches them.
        """

    def loss(self, output: Tensor, batch: Batch) -> LossParts:
        """Compute the loss of the network's output on a batch; on a GPU, without waiting for it."""

    def observe(self, output: Tensor, batch: Batch) -> None:
        """Take note of the network's output on a batch, for the report of the epoch."""

    def validate(self, network: nn.Module, report: EpochReport, arithmetic: Arithmetic) -> EpochReport:
        """Judge a network on the validation data; give the report of the epoch with the figures filled in."""


class PlaneExamples:
    """Planes of three views, cut into crops at the network's scale.

    Parameters
    ----------
    planes, validation
        The latter may be empty.
    params
        How to draw, cut and change crops.
    planes_diameter_px
        Diameter of a typical nucleus on the planes; crops are resampled so that it becomes
        params.diameter_px.
    seed
        Of all draws.

    Raises
    ------
    InputError
        If no plane is left to draw.
    """

    axes = 2

    def __init__(
        self,
        planes: PlaneSet,
        validation: PlaneSet,
        params: TrainParams,
        *,
        planes_diameter_px: float,
        seed: int,
    ) -> None:
        self._params = params
        self._seed = seed
        self._weights = plane_weights(planes.infos, params.sampling, params.min_train_masks)
        self.crops = params.crops_per_epoch or int(np.count_nonzero(self._weights))
        self._maker = CropMaker(
            planes,
            params.augment,
            params.crop_px,
            params.diameter_px / planes_diameter_px,
            params.diameter_px,
            seed,
            params.sampling.nucleus_centred,
            nucleus_weights(planes, params.loss),
        )
        self._validation = validation

    def batches(self, epochs: range, workers: int, *, pinned: bool = False) -> BatchStream:
        """Open the stream of the batches of these epochs."""
        return BatchStream(
            self._maker,
            lambda epoch: epoch_order(self._weights, self.crops, self._seed, epoch),
            epochs,
            self._params.batch_size,
            workers,
            pinned=pinned,
        )

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """Compute Cellpose's loss."""
        return cellpose_loss(output, batch.flows, batch.foreground, batch.weights)

    def observe(self, output: Tensor, batch: Batch) -> None:
        """Note nothing: the loss tells all."""

    def validate(self, network: nn.Module, report: EpochReport, arithmetic: Arithmetic) -> EpochReport:
        """Judge a network on fixed crops of the validation planes."""
        return validate(
            network,
            self._validation_batches,
            report,
            views=[info.view for info in self._validation.infos],
            contrasts=self._validation_contrasts,
            device=arithmetic.device,
            precision=arithmetic.precision,
            layout=arithmetic.layout,
        )

    @cached_property
    def _validation_batches(self) -> list[Batch]:
        # cut when they are first needed, so that training starts sooner
        return validation_crops(
            self._validation,
            self._params.validation_crops,
            self._params.crop_px,
            self._maker.scale,
            self._params.diameter_px,
            self._params.batch_size,
        )

    @cached_property
    def _validation_contrasts(self) -> list[list[NDArray[np.float64]]]:
        return measure_contrasts(self._validation_batches)


class VolumeExamples:
    """Labelled volumes, cut into patches on the grid that the network sees.

    Parameters as `nuclei3d.training.examples.PlaneExamples`; `params.full3d` is used, `crop_px` is not.

    Parameters
    ----------
    spec
        Of the network: shape of the patches, anisotropy, kind of targets.
    nucleus_diameter_um
        Of a typical nucleus; patches are resampled so that it becomes params.diameter_px wide.
    """

    axes = 3

    def __init__(
        self,
        volumes: VolumeSet,
        validation: VolumeSet,
        params: TrainParams,
        *,
        spec: VolumeSpec,
        nucleus_diameter_um: float,
        seed: int,
    ) -> None:
        self._params = params
        self._seed = seed
        self._weights = volume_weights(volumes.infos, params.sampling)
        self.crops = params.crops_per_epoch or sum(max(info.nuclei, 1) for info in volumes.infos)
        edge = nucleus_diameter_um / params.diameter_px
        self._maker = PatchMaker(
            volumes,
            params.augment,
            PatchSampling(
                spec.patch,
                VoxelSize(spec.anisotropy * edge, edge, edge),
                params.full3d.nucleus_centred,
                params.full3d.faint_centred,
            ),
            params.diameter_px,
            seed,
            unit_flows=spec.targets == "heat",
            nucleus_weights=volume_nucleus_weights(volumes, params.loss),
        )
        self._validation = validation
        self._variances = volumes.flow_variances
        self._seen = FlowFigures()

    def batches(self, epochs: range, workers: int, *, pinned: bool = False) -> BatchStream:
        """Open the stream of the batches of these epochs."""
        return BatchStream(
            self._maker,
            lambda epoch: epoch_order(self._weights, self.crops, self._seed, epoch),
            epochs,
            self._params.batch_size,
            workers,
            pinned=pinned,
        )

    def observe(self, output: Tensor, batch: Batch) -> None:
        """Sum up each axis' figures; they are kept until `validate`."""
        self._seen.add(output, batch.flows, batch.foreground)

    def loss(self, output: Tensor, batch: Batch) -> VolumeLoss:
        """Compute the loss."""
        return volume_loss(
            output, batch.flows, batch.foreground, self._params.full3d, self._variances, batch.weights
        )

    @torch.no_grad()
    def validate(self, network: nn.Module, report: EpochReport, arithmetic: Arithmetic) -> EpochReport:
        """Judge a network on fixed patches of the validation volumes; fill in each axis' figures."""
        figures: dict[str, Any] = {f"train_{name}": value for name, value in self._seen.figures().items()}
        self._seen = FlowFigures()
        if not self._validation_batches:
            return replace(report, **figures)
        was_training = network.training
        network.eval()
        seen, parts, found = FlowFigures(), [], []
        for batch in self._validation_batches:
            moved = batch.to(arithmetic.device)
            output = arithmetic.run(network, moved.images).float()
            seen.add(output, moved.flows, moved.foreground)
            loss = volume_loss(output, moved.flows, moved.foreground, self._params.full3d, self._variances)
            parts.append((float(loss.flow), float(loss.probability), len(batch.planes)))
            inside = (output[:, 3] > 0).cpu().numpy()
            for number, volume in enumerate(batch.planes):
                contrasts = np.append(np.nan, self._validation.nuclei[volume].contrasts).astype(np.float64)
                found.extend(found_shares(inside[number], batch.labels[number], contrasts))
        network.train(was_training)
        total = sum(count for *_, count in parts)
        flow = sum(flow * count for flow, _, count in parts) / total
        probability = sum(probability * count for _, probability, count in parts) / total
        figures |= {f"validation_{name}": value for name, value in seen.figures().items()}
        figures |= found_by_quintile(found)
        return replace(
            report,
            validation_loss=flow + probability,
            validation_flow_loss=flow,
            validation_probability_loss=probability,
            **figures,
        )

    @cached_property
    def _validation_batches(self) -> list[Batch]:
        # cut when they are first needed, so that training starts sooner
        return validation_patches(
            self._validation,
            self._params.validation_crops,
            self._maker.sampling,
            self._params.diameter_px,
            self._params.batch_size,
            self._maker.unit_flows,
        )
