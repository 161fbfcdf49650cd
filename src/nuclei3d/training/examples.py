"""What a network is trained on and judged by: crops of planes or of volumes, with their loss."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nuclei3d.config.sections import TrainParams
from nuclei3d.training.batches import Batch, BatchStream, CropMaker, validation_batches
from nuclei3d.training.crops import CropGrid
from nuclei3d.training.learner import Arithmetic
from nuclei3d.training.losses import (
    CELLPOSE_TERMS,
    FlowFigures,
    Loss,
    LossTerms,
    losses_of_crops,
    network_loss,
)
from nuclei3d.training.samples import SampleSet
from nuclei3d.training.sampling import epoch_order, nucleus_weights, plane_contrasts, sample_weights

_QUINTILES = ("found_faintest", "found_faint", "found_middle", "found_bright", "found_brightest")
_SMALLEST_PX = 12


class Examples:
    """Training and validation samples (planes, or volumes), cut into crops on the network's grid.

    `seed` is that of all draws.

    Attributes
    ----------
    weights
        float64 (samples,): how often each is drawn.
    crops
        Number of crops an epoch.
    """

    def __init__(
        self, samples: SampleSet, validation: SampleSet, params: TrainParams, grid: CropGrid, *, seed: int
    ) -> None:
        self.grid = grid
        self.weights = sample_weights(samples.infos, params.sampling, params.min_train_masks)
        planes = grid.axes == 2
        of_all = (
            np.count_nonzero(self.weights) if planes else sum(max(info.nuclei, 1) for info in samples.infos)
        )
        self.crops = params.crops_per_epoch or int(of_all)
        self._params = params
        self._maker = CropMaker(samples, params.augment, grid, seed, nucleus_weights(samples, params.loss))
        self._validation = validation
        self._terms = (
            CELLPOSE_TERMS if planes else LossTerms.of_volumes(params.full3d, samples.flow_variances)
        )
        self._seen = FlowFigures()

    def batches(self, epochs: range, workers: int, *, pinned: bool = False) -> BatchStream:
        """Open the stream of the batches of these epochs; parameters as `BatchStream`."""
        return BatchStream(
            self._maker,
            lambda epoch: epoch_order(self.weights, self.crops, self._maker.seed, epoch),
            epochs,
            self._params.batch_size,
            workers,
            pinned=pinned,
        )

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """Compute the loss of the network's output on a batch; on a GPU, without waiting for it."""
        return network_loss(output, batch.flows, batch.foreground, batch.weights, self._terms)

    def observe(self, output: Tensor, batch: Batch) -> None:
        """Take note of the network's output on a batch, for `validate`; of planes the loss tells all."""
        if self.grid.axes == 3:
            self._seen.add(output, batch.flows, batch.foreground)

    @torch.no_grad()
    def validate(self, network: nn.Module, arithmetic: Arithmetic) -> dict[str, float]:
        """Judge a network on fixed crops of the validation samples; it is left in training mode if it was.

        Gives names as in `nuclei3d.training.state.METRICS`: losses (of planes also by view), shares found by
        quintile of contrast, and of a 3D network the figures of each axis, in training as in validation.
        """
        figures = {f"train_{name}": value for name, value in self._seen.figures().items()}
        self._seen = FlowFigures()
        if not self._fixed:
            return figures
        was_training = network.training
        network.eval()
        seen = FlowFigures()
        losses: list[_CropLoss] = []
        found: list[tuple[float, float]] = []
        for fixed, contrasts in self._fixed:
            batch = fixed.to(arithmetic.device)
            output = arithmetic.run(network, batch.images).float()
            losses += self._losses(output, batch)
            inside = (output[:, self.grid.axes] > 0).cpu().numpy()
            for each in zip(inside, batch.labels, contrasts, strict=True):
                found += found_shares(*each)
            if self.grid.axes == 3:
                seen.add(output, batch.flows, batch.foreground)
        network.train(was_training)
        crops = sum(loss.crops for loss in losses)
        flow = sum(loss.flow * loss.crops for loss in losses) / crops
        probability = sum(loss.probability * loss.crops for loss in losses) / crops
        figures |= {
            "validation_loss": flow + probability,
            "validation_flow_loss": flow,
            "validation_probability_loss": probability,
        }
        if self.grid.axes == 2:
            for view in {loss.view for loss in losses}:
                of_view = [loss.flow + loss.probability for loss in losses if loss.view == view]
                figures[f"validation_loss_{view}"] = sum(of_view) / len(of_view)
        figures |= {f"validation_{name}": value for name, value in seen.figures().items()}
        return figures | found_by_quintile(found)

    def _losses(self, output: Tensor, batch: Batch) -> list[_CropLoss]:
        """Compute the losses of the crops, without weights of nuclei; of volumes, of all crops as one."""
        if self.grid.axes == 3:
            loss = network_loss(output, batch.flows, batch.foreground, terms=self._terms)
            return [_CropLoss("volume", float(loss.flow), float(loss.probability), len(batch.samples))]
        parts = losses_of_crops(output, batch.flows, batch.foreground).cpu().tolist()
        views = (self._validation.infos[sample].view for sample in batch.samples)
        return [_CropLoss(view, *part) for view, part in zip(views, parts, strict=True)]

    @cached_property
    def _fixed(self) -> list[tuple[Batch, list[NDArray[np.float64]]]]:
        """The validation crops, and the contrast of each nucleus of each; cut when they are first needed."""
        # crops of planes without nuclei occur here as they occur in the planes
        grid = replace(self.grid, nucleus_centred=0.0) if self.grid.axes == 2 else self.grid
        params = self._params
        batches = validation_batches(self._validation, params.validation_crops, grid, params.batch_size)
        return [(batch, self._contrasts(batch)) for batch in batches]

    def _contrasts(self, batch: Batch) -> list[NDArray[np.float64]]:
        if self.grid.axes == 3:
            tables = (self._validation.nuclei[sample].contrasts for sample in batch.samples)
            return [np.append(np.nan, table).astype(np.float64) for table in tables]
        return [
            plane_contrasts(image[0].numpy(), labels)
            for image, labels in zip(batch.images, batch.labels, strict=True)
        ]


class _CropLoss(NamedTuple):
    view: str
    flow: float
    probability: float
    crops: int = 1


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
    """Average the shares over five equally full bins of contrast; none with fewer than five nuclei."""
    if len(found) < len(_QUINTILES):
        return {}
    shares = np.array([share for _, share in sorted(found)])
    return {
        name: float(np.mean(part))
        for name, part in zip(_QUINTILES, np.array_split(shares, len(_QUINTILES)), strict=True)
    }
