"""What a network is trained on and judged by: the seam between the loop and the kind of its data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from nuclei3d.config.train import TrainParams
from nuclei3d.core.training.batches import Batch, BatchStream
from nuclei3d.core.training.crop_batches import CropMaker, validation_crops
from nuclei3d.core.training.learner import Arithmetic, LossParts
from nuclei3d.core.training.losses import Loss, cellpose_loss
from nuclei3d.core.training.planes import PlaneSet
from nuclei3d.core.training.sampling import epoch_order, nucleus_weights, plane_weights
from nuclei3d.core.training.state import EpochReport
from nuclei3d.core.training.validation import measure_contrasts, validate


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
