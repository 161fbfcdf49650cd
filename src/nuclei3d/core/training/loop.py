"""The training loop: from planes and a network to trained weights, one epoch at a time.

Every number that enters an epoch is either in `TrainingState` or derived from (seed, epoch, crop), so a
training that was killed and goes on from its last state ends, on a CPU, with the same weights bit by bit.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nuclei3d.config.train import TrainParams
from nuclei3d.core.networks import choose_precision
from nuclei3d.core.training.batches import Batch, BatchStream, CropMaker, validation_batches
from nuclei3d.core.training.losses import cellpose_loss
from nuclei3d.core.training.planes import PlaneSet
from nuclei3d.core.training.sampling import epoch_order, nucleus_weights, plane_weights
from nuclei3d.core.training.schedules import learning_rate
from nuclei3d.core.training.state import EpochReport, TrainingState, WeightAverage, copy_state
from nuclei3d.core.training.validation import measure_contrasts, validate
from nuclei3d.errors import InputError

_DIVERGED_FACTOR = 5.0


class StopTraining(Exception):  # noqa: N818 - a request, not an error
    """Raised by a callback to end the training after this epoch; what was trained so far is kept."""


class DivergedError(InputError):
    """The loss became NaN, infinite or far larger than at the start: the parameters are at fault."""


@dataclass(frozen=True)
class TrainingOutcome:
    """What a training ended with.

    Attributes
    ----------
    weights
        State dict of the chosen epoch.
    epoch
        Its number.
    state
        The last state.
    stopped
        Why it ended before its last epoch, or an empty text.
    """

    weights: dict[str, Tensor]
    epoch: int
    state: TrainingState
    stopped: str


@dataclass
class Callbacks:
    """What happens around the loop; each may be left out.

    Attributes
    ----------
    save
        Called after each epoch with the state and whether this epoch is the best so far.
    validate_volumes
        Segments the validation volumes with a network and gives the average precision.
    on_epoch
        Called after `save`; may raise `StopTraining`, or any exception, which ends the training.
    on_step
        Called after each step with the loss, the number of crops and the learning rate.
    """

    save: Callable[[TrainingState, bool], None] | None = None
    validate_volumes: Callable[[nn.Module], float] | None = None
    on_epoch: Callable[[EpochReport], None] | None = None
    on_step: Callable[[float, int, float], None] | None = None


def train_network(
    network: nn.Module,
    planes: PlaneSet,
    validation: PlaneSet,
    params: TrainParams,
    *,
    planes_diameter_px: float,
    seed: int,
    device: torch.device,
    start: TrainingState | None = None,
    callbacks: Callbacks | None = None,
) -> TrainingOutcome:
    """Train a network.

    Parameters
    ----------
    network
        A CPnet; it is moved to the device and changed.
    planes, validation
        The latter may be empty; the training loss then chooses the best epoch.
    params
        How to train.
    planes_diameter_px
        Diameter of a typical nucleus on the planes; crops are resampled so that it becomes
        params.diameter_px.
    seed
        Of all draws.
    device
        Where the network computes.
    start
        State to go on from.
    callbacks
        Saving, validation in 3D, reports.

    Raises
    ------
    DivergedError
        If the loss is not finite, or an epoch's is several times that of the first.
    InputError
        If no plane is left to draw.
    """
    trainer = _Trainer(network, planes, validation, params, planes_diameter_px, seed, device)
    return trainer.run(start, callbacks or Callbacks())


class _Trainer:
    def __init__(
        self,
        network: nn.Module,
        planes: PlaneSet,
        validation: PlaneSet,
        params: TrainParams,
        planes_diameter_px: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self.params = params
        self.seed = seed
        self.device = device
        self.weights = plane_weights(planes.infos, params.sampling, params.min_train_masks)
        self.crops = params.crops_per_epoch or int(np.count_nonzero(self.weights))
        self.steps_per_epoch = math.ceil(self.crops / params.batch_size)
        scale = params.diameter_px / planes_diameter_px
        self.maker = CropMaker(
            planes,
            params.augment,
            params.crop_px,
            scale,
            params.diameter_px,
            seed,
            params.sampling.nucleus_centred,
            nucleus_weights(planes, params.loss),
        )
        self.validation = validation
        self.validation_views = [info.view for info in validation.infos]
        layout = torch.channels_last if params.channels_last else torch.contiguous_format
        self.network = network.to(device=device)
        self.network.to(memory_format=layout)  # type: ignore[call-overload]
        self.layout = layout
        self.precision = choose_precision(params.precision, device)
        self.workers = params.workers or (1 if device.type == "cpu" else 8)
        self.optimizer = _new_optimizer(self.network, params, device)
        self.average = WeightAverage(self.network, params.ema) if params.ema else None
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True

    @cached_property
    def _validation_batches(self) -> list[Batch]:
        # cut when they are first needed, so that training starts sooner
        return validation_batches(
            self.validation,
            self.params.validation_crops,
            self.params.crop_px,
            self.maker.scale,
            self.params.diameter_px,
            self.params.batch_size,
        )

    @cached_property
    def _validation_contrasts(self) -> list[list[NDArray[np.float64]]]:
        return measure_contrasts(self._validation_batches)

    def run(self, start: TrainingState | None, callbacks: Callbacks) -> TrainingOutcome:
        state = start or self._first_state()
        if start is not None:
            self._restore(start)
        stopped = ""
        with BatchStream(
            self.maker,
            lambda epoch: epoch_order(self.weights, self.crops, self.seed, epoch),
            range(state.epoch, self.params.epochs),
            self.params.batch_size,
            self.workers,
        ) as batches:
            while state.epoch < self.params.epochs:
                stopped = self._why_stop(state)
                if stopped:
                    break
                state, is_best = self._epoch(state, batches, callbacks)
                if callbacks.save is not None:
                    callbacks.save(state, is_best)
                if callbacks.on_epoch is not None:
                    try:
                        callbacks.on_epoch(state.history[-1])
                    except StopTraining as request:
                        stopped = str(request) or "stopped on request"
                        break
        last = self.params.select == "last" or not state.best
        return TrainingOutcome(
            weights=self._kept_weights() if last else state.best,
            epoch=state.epoch if last else state.best_epoch,
            state=state,
            stopped=stopped,
        )

    def _why_stop(self, state: TrainingState) -> str:
        patience = self.params.patience
        losses = [_loss_of(report) for report in state.history]
        if patience and losses and len(losses) - 1 - int(np.argmin(losses)) >= patience:
            return f"no better validation loss for {patience} epochs"
        return ""

    def _first_state(self) -> TrainingState:
        return TrainingState({}, {}, None, torch.get_rng_state(), (), 0, -math.inf, {})

    def _restore(self, state: TrainingState) -> None:
        if not state.epoch:
            return
        self.network.load_state_dict(state.network)
        self.optimizer.load_state_dict(state.optimizer)
        if self.average is not None and state.average is not None:
            self.average.load(state.average)
        torch.set_rng_state(state.generator)

    def _epoch(
        self, state: TrainingState, batches: BatchStream, callbacks: Callbacks
    ) -> tuple[TrainingState, bool]:
        began = time.perf_counter()
        epoch = state.epoch
        report = self._train_epoch(epoch, batches, callbacks.on_step)
        first = state.history[0] if state.history else report
        if report.train_loss > _DIVERGED_FACTOR * first.train_loss:
            raise DivergedError(
                f"training diverged in epoch {epoch + 1}: the loss is {report.train_loss:.3g}, in the first "
                f"epoch it was {first.train_loss:.3g}; {_MEND}"
            )
        judged = self._judged_network()
        report = validate(
            judged,
            self._validation_batches,
            report,
            views=self.validation_views,
            contrasts=self._validation_contrasts,
            device=self.device,
            precision=self.precision,
            layout=self.layout,
        )
        every = self.params.validate_volumes_every
        if callbacks.validate_volumes is not None and every and (epoch + 1) % every == 0:
            report = replace(report, volume_ap=callbacks.validate_volumes(judged))
        report = replace(report, seconds=time.perf_counter() - began)
        score = self._score(report, callbacks.validate_volumes is not None and every > 0)
        is_best = score > state.best_score
        kept = self._kept_weights()
        return (
            TrainingState(
                network=copy_state(self.network),
                optimizer=_on_cpu(self.optimizer.state_dict()),
                average=None if self.average is None else _on_cpu(self.average.state()),
                generator=torch.get_rng_state(),
                history=(*state.history, report),
                best_epoch=epoch + 1 if is_best else state.best_epoch,
                best_score=score if is_best else state.best_score,
                best=kept if is_best else state.best,
            ),
            is_best,
        )

    def _score(self, report: EpochReport, in_volumes: bool) -> float:
        """Larger is better: the average precision where epochs are judged in 3D, else minus the loss."""
        if in_volumes:
            return -math.inf if math.isnan(report.volume_ap) else report.volume_ap
        return -_loss_of(report)

    def _judged_network(self) -> nn.Module:
        """Give the network that is validated: with the mean weights if there are."""
        if self.average is None:
            return self.network
        judged = copy.deepcopy(self.network)
        judged.load_state_dict(self.average.state())
        return judged

    def _kept_weights(self) -> dict[str, Tensor]:
        if self.average is None:
            return copy_state(self.network)
        return {name: value.detach().cpu().clone() for name, value in self.average.state().items()}

    def _train_epoch(
        self, epoch: int, batches: BatchStream, on_step: Callable[[float, int, float], None] | None
    ) -> EpochReport:
        self.network.train()
        began = time.perf_counter()
        waited = 0.0
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        # reading a loss makes the host wait for a GPU, so there it is done now and then
        look_every = 1 if self.device.type == "cpu" else 20
        step = epoch * self.steps_per_epoch
        rate = math.nan
        unseen = 0
        for _ in range(self.steps_per_epoch):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            rate = learning_rate(self.params, step, self.steps_per_epoch)
            losses = self._step(batch.to(self.device), rate, step)
            sums += losses.double() * len(batch.planes)
            unseen += len(batch.planes)
            step += 1
            if step % look_every == 0:
                loss = float(losses.sum())
                if not math.isfinite(loss):
                    break
                if on_step is not None:
                    on_step(loss, unseen, rate)
                unseen = 0
        flow, probability = (float(value) / self.crops for value in sums)
        if not math.isfinite(flow + probability):
            raise DivergedError(f"training diverged: the loss is no number in epoch {epoch + 1}; {_MEND}")
        return EpochReport(
            epoch=epoch + 1,
            train_loss=flow + probability,
            train_flow_loss=flow,
            train_probability_loss=probability,
            learning_rate=rate,
            crops_per_second=self.crops / (time.perf_counter() - began),
            waited_seconds=waited,
        )

    def _step(self, batch: Batch, rate: float, step: int) -> Tensor:
        """Do one step; give the two parts of the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images = batch.images.contiguous(memory_format=self.layout)
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            output = self.network(images)[0]
        loss = cellpose_loss(output, batch.flows, batch.foreground, batch.weights)
        values = torch.stack([loss.flow.detach(), loss.probability.detach()])
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()  # type: ignore[no-untyped-call]
        if self.params.gradient_clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.params.gradient_clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.network, step)
        return values


_MEND = "lower train.learning_rate, or set train.gradient_clip (try 5)"


def _loss_of(report: EpochReport) -> float:
    return report.train_loss if math.isnan(report.validation_loss) else report.validation_loss


def _new_optimizer(network: nn.Module, params: TrainParams, device: torch.device) -> torch.optim.Optimizer:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if params.optimizer == "sgd":
        return torch.optim.SGD(
            trained,
            lr=params.learning_rate,
            momentum=params.momentum,
            weight_decay=params.weight_decay,
            fused=True,
        )
    return torch.optim.AdamW(trained, lr=params.learning_rate, weight_decay=params.weight_decay, fused=True)


def _on_cpu(value: Any) -> Any:
    """Copy nested state to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_on_cpu(entry) for entry in value]
    return value
