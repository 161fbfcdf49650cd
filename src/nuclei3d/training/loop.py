"""The training loop: from examples and a network to trained weights, one epoch at a time.

Every number that enters an epoch is either in `TrainingState` or derived from (seed, epoch, crop), so a
training that was killed and goes on from its last state ends, on a CPU, with the same weights bit by bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nuclei3d.config.sections import TrainParams
from nuclei3d.errors import InputError
from nuclei3d.training.examples import Batch, Examples
from nuclei3d.training.learner import Learner, choose_arithmetic, learning_rate
from nuclei3d.training.state import EpochReport, TrainingState, copy_state

_DIVERGED_FACTOR = 5.0
_WORKERS_BESIDE_GPU = 8


class StopTraining(Exception):  # noqa: N818 - a request, not an error
    """Raised by a callback to end the training after this epoch; what was trained so far is kept."""


class DivergedError(InputError):
    """The loss became NaN, infinite or far larger than at the start: the parameters are at fault."""


@dataclass(frozen=True)
class TrainingOutcome:
    """What a training ended with.

    `weights` is the state dict of the chosen `epoch`, `state` the last one, `stopped` says why it ended
    before its last epoch, or is empty.
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
    save, on_epoch
        Called after each epoch, with the state and whether it is the best so far, and then with the report;
        the
        latter may raise `StopTraining`, or any exception, which ends the training.
    validate_volumes
        Segments the validation volumes with a network and gives the average precision.
    on_step
        Called after each step with the loss, the number of crops and the learning rate.
    """

    save: Callable[[TrainingState, bool], None] | None = None
    validate_volumes: Callable[[nn.Module], float] | None = None
    on_epoch: Callable[[EpochReport], None] | None = None
    on_step: Callable[[float, int, float], None] | None = None


def train_network(
    network: nn.Module,
    examples: Examples,
    params: TrainParams,
    *,
    device: torch.device,
    start: TrainingState | None = None,
    callbacks: Callbacks | None = None,
) -> TrainingOutcome:
    """Train a network.

    Parameters
    ----------
    network
        It is moved to the device and changed. Its first output is what the examples' loss wants.
    examples
        What to learn and to be judged by; without validation data the training loss chooses the best epoch.
    start
        State to go on from.

    Raises
    ------
    DivergedError
        If the loss is not finite, or an epoch's is several times that of the first.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    learner = Learner(network, params, choose_arithmetic(params, device, examples.grid.axes), examples.loss)
    return _Loop(learner, examples, params, callbacks or Callbacks()).run(start)


@dataclass(frozen=True)
class _Loop:
    learner: Learner
    examples: Examples
    params: TrainParams
    callbacks: Callbacks

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.examples.crops / self.params.batch_size)

    def run(self, start: TrainingState | None) -> TrainingOutcome:
        state = start or TrainingState({}, {}, None, torch.get_rng_state(), (), 0, -math.inf, {})
        self.learner.restore(state)
        stopped = ""
        on_gpu = self.learner.arithmetic.device.type == "cuda"
        workers = self.params.workers or (_WORKERS_BESIDE_GPU if on_gpu else 1)
        epochs = range(state.epoch, self.params.epochs)
        with self.examples.batches(epochs, workers, pinned=on_gpu) as batches:
            while state.epoch < self.params.epochs:
                stopped = self._why_stop(state)
                if stopped:
                    break
                state, is_best = self._epoch(state, batches)
                if self.callbacks.save is not None:
                    self.callbacks.save(state, is_best)
                if self.callbacks.on_epoch is not None:
                    try:
                        self.callbacks.on_epoch(state.history[-1])
                    except StopTraining as request:
                        stopped = str(request) or "stopped on request"
                        break
        last = self.params.select == "last" or not state.best
        return TrainingOutcome(
            weights=self.learner.kept_weights() if last else state.best,
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

    def _epoch(self, state: TrainingState, batches: Iterator[Batch]) -> tuple[TrainingState, bool]:
        began = time.perf_counter()
        report = self._train_epoch(state.epoch, batches)
        first = state.history[0] if state.history else report
        if report.train_loss > _DIVERGED_FACTOR * first.train_loss:
            raise DivergedError(
                f"training diverged in epoch {report.epoch}: the loss is {report.train_loss:.3g}, in the "
                f"first epoch it was {first.train_loss:.3g}; {_MEND}"
            )
        judged = self.learner.judged_network()
        more = self.examples.validate(judged, self.learner.arithmetic)
        every = self.params.validate_volumes_every
        validate_volumes = self.callbacks.validate_volumes
        if validate_volumes is not None and every and report.epoch % every == 0:
            more["volume_ap"] = validate_volumes(judged)
        more["seconds"] = time.perf_counter() - began
        report = EpochReport(report.epoch, {**report.measured, **more})
        score = _score(report, in_volumes=validate_volumes is not None and every > 0)
        is_best = score > state.best_score
        return (
            TrainingState(
                network=copy_state(self.learner.network),
                optimizer=self.learner.optimizer_state(),
                average=self.learner.average_state(),
                generator=torch.get_rng_state(),
                history=(*state.history, report),
                best_epoch=report.epoch if is_best else state.best_epoch,
                best_score=score if is_best else state.best_score,
                best=self.learner.kept_weights() if is_best else state.best,
            ),
            is_best,
        )

    def _train_epoch(self, epoch: int, batches: Iterator[Batch]) -> EpochReport:
        learner, crops = self.learner, self.examples.crops
        device, on_step = learner.arithmetic.device, self.callbacks.on_step
        learner.network.train()
        began = time.perf_counter()
        waited = 0.0
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        # reading a loss makes the host wait for a GPU, so there it is done now and then
        look_every = 1 if device.type == "cpu" else 20
        step = epoch * self.steps_per_epoch
        rate = math.nan
        unseen = 0
        for _ in range(self.steps_per_epoch):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            rate = learning_rate(self.params, step, self.steps_per_epoch)
            batch = batch.to(device)
            output, losses = learner.step(batch, rate, step)
            self.examples.observe(output, batch)
            sums += losses.double() * len(batch.samples)
            unseen += len(batch.samples)
            step += 1
            if step % look_every == 0:
                loss = float(losses.sum())
                if not math.isfinite(loss):
                    break
                if on_step is not None:
                    on_step(loss, unseen, rate)
                unseen = 0
        flow, probability = (float(value) / crops for value in sums)
        if not math.isfinite(flow + probability):
            raise DivergedError(f"training diverged: the loss is no number in epoch {epoch + 1}; {_MEND}")
        measured = {
            "train_loss": flow + probability,
            "train_flow_loss": flow,
            "train_probability_loss": probability,
            "learning_rate": rate,
            "crops_per_second": crops / (time.perf_counter() - began),
            "waited_seconds": waited,
        }
        return EpochReport(epoch + 1, measured)


_MEND = "lower train.learning_rate, or set train.gradient_clip (try 5)"


def _loss_of(report: EpochReport) -> float:
    return report.train_loss if math.isnan(report.validation_loss) else report.validation_loss


def _score(report: EpochReport, *, in_volumes: bool) -> float:
    """Larger is better: the average precision where epochs are judged in 3D, else minus the loss."""
    if in_volumes:
        return -math.inf if math.isnan(report.volume_ap) else report.volume_ap
    return -_loss_of(report)
