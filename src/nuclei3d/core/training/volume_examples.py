"""What a 3D network is trained on and judged by: patches of labelled volumes."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nuclei3d.config.train import TrainParams
from nuclei3d.core.training.batches import Batch, BatchStream
from nuclei3d.core.training.learner import Arithmetic
from nuclei3d.core.training.patch_batches import PatchMaker, validation_patches
from nuclei3d.core.training.patches import PatchSampling
from nuclei3d.core.training.sampling import epoch_order, volume_nucleus_weights, volume_weights
from nuclei3d.core.training.state import EpochReport
from nuclei3d.core.training.validation import found_by_quintile, found_shares
from nuclei3d.core.training.volume_losses import FlowFigures, VolumeLoss, volume_loss
from nuclei3d.core.training.volume_set import VolumeSet
from nuclei3d.core.volume_network import VolumeSpec
from nuclei3d.volumes.voxel_size import VoxelSize


class VolumeExamples:
    """Labelled volumes, cut into patches on the grid that the network sees.

    Parameters as `nuclei3d.core.training.examples.PlaneExamples`; `params.full3d` is used, `crop_px` is not.

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
