"""The training loop: from examples and a network to trained weights, one epoch at a time.

Every number that enters an epoch is either in `TrainingState` or derived from (seed, epoch, crop), so a
training that was killed and goes on from its last state ends, on a CPU, with the same weights bit by bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nuclei3d.config.sections import TrainParams
from nuclei3d.errors import InputError
from nuclei3d.training.arithmetic import choose_arithmetic
from nuclei3d.training.examples import Batch, Examples
from nuclei3d.training.learner import Learner, learning_rate

_DIVERGED_FACTOR = 5.0
_WORKERS_BESIDE_GPU = 8


_FORMAT = 3

_FIGURES = (*(f"flow_{figure}_{axis}" for figure in ("mse", "cosine") for axis in "zyx"), "dice")

METRICS = (
    "train_loss",
    "train_flow_loss",
    "train_probability_loss",
    "validation_loss",
    "validation_flow_loss",
    "validation_probability_loss",
    "validation_loss_xy",
    "validation_loss_xz",
    "validation_loss_yz",
    *(f"train_{name}" for name in _FIGURES),
    *(f"validation_{name}" for name in _FIGURES),
    "found_faintest",
    "found_faint",
    "found_middle",
    "found_bright",
    "found_brightest",
    "volume_ap",
    "learning_rate",
    "crops_per_second",
    "seconds",
    "waited_seconds",
)
"""What an epoch is measured by, in the order of history.csv.

train_... are means over the crops of the epoch, validation_... over the fixed validation crops, also by view.
The figures of the flow and `dice` are those of a 3D network (`nuclei3d.training.losses.FlowFigures`).
found_... is the mean share of a nucleus' pixels that are called foreground, by quintile of the nuclei's
contrast; volume_ap the average precision at IoU 0.5 on the validation volumes. The learning rate is that of
the last step; crops_per_second is of training alone; waited_seconds is how much of `seconds`, the time of the
whole epoch, the network waited for crops.
"""


@dataclass(frozen=True)
class EpochReport:
    """What one epoch, counted from 1, did: values by name (`METRICS`); what was not measured is absent or
    nan. Epoch 0 is the model that the training starts from.
    """

    epoch: int
    measured: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        """Give one value, nan if it was not measured."""
        return self.measured.get(name, math.nan)

    def metrics(self) -> dict[str, float]:
        """Give the measured numbers by name, in the order of `METRICS`."""
        return {name: self[name] for name in METRICS if not math.isnan(self[name])}


@dataclass(frozen=True)
class TrainingState:
    """Everything after an epoch that the next one depends on.

    `learner` is as `Learner.state` gives it; `best` are the weights of the best epoch so far (empty: none),
    whose score is the larger, the better.
    """

    learner: dict[str, Any]
    history: tuple[EpochReport, ...] = ()
    best_epoch: int = 0
    best_score: float = -math.inf
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        """Number of epochs done."""
        return self.history[-1].epoch if self.history else 0

    def as_plain(self) -> dict[str, Any]:
        """Give the state, without the best weights, as tensors, numbers, texts, lists and dictionaries."""
        history = [asdict(report) for report in self.history]
        return {**vars(self), "best": None, "history": history, "format": _FORMAT}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], best: dict[str, Tensor]) -> TrainingState:
        """Restore what `as_plain` gave; KeyError or TypeError if it is something else."""
        values = dict(plain)
        if values.pop("format") != _FORMAT:
            raise KeyError("format")
        history = tuple(EpochReport(**report) for report in plain["history"])
        return cls(**{**values, "history": history, "best": best})


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

    After each epoch, epoch 0 (a start model as it is) too, `save` is called with the state and whether it is
    the best so far, in a thread beside the next epoch, and `on_epoch` with the report; the latter may raise
    `StopTraining`, or any exception, which ends the training, as soon as the state is saved.
    `validate_volumes` segments the validation volumes with a network and gives the average precision.
    `on_step` is called after each step with the loss, the number of crops and the learning rate.
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
    """Train a network, whose first output is what the examples' loss wants; it is moved and changed.

    `examples` are what to learn and to be judged by; without validation data the training loss chooses the
    best epoch. `start` is a state to go on from. DivergedError is raised if the loss is not finite, or an
    epoch's is several times that of the first.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    learner = Learner(network, params, choose_arithmetic(params, device, examples.grid.axes), examples.loss)
    return _Loop(learner, examples, params, callbacks or Callbacks()).run(start)


class _Saver:
    """Saves states in a thread, in their order, and no more than one behind the training."""

    def __init__(self, save: Callable[[TrainingState, bool], None]) -> None:
        self._save = save
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __call__(self, state: TrainingState, is_best: bool) -> None:
        self._wait()
        self._pending = self._pool.submit(self._save, state, is_best)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def close(self) -> None:
        """Wait until the last is saved."""
        self._pool.shutdown()
        self._wait()


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
        with closing(_Saver(self.callbacks.save or (lambda state, is_best: None))) as save:
            return self._run(start or TrainingState({}), save)

    def _run(self, state: TrainingState, save: _Saver) -> TrainingOutcome:
        if state.history:
            self.learner.restore(state.learner)
        elif self.params.start_from is not None:
            state, _ = self._finish(state, EpochReport(0, {}), time.perf_counter(), save)
        stopped = ""
        on_gpu = self.learner.arithmetic.device.type == "cuda"
        workers = self.params.workers or (_WORKERS_BESIDE_GPU if on_gpu else 1)
        epochs = range(state.epoch, self.params.epochs)
        with closing(self.examples.batches(epochs, workers, pinned=on_gpu)) as batches:
            while state.epoch < self.params.epochs:
                stopped = self._why_stop(state)
                if stopped:
                    break
                state, stopped = self._epoch(state, batches, save)
                if stopped:
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
        losses = [loss for report in state.history if not math.isnan(loss := _loss_of(report))]
        if patience and losses and len(losses) - 1 - int(np.argmin(losses)) >= patience:
            return f"no better validation loss for {patience} epochs"
        return ""

    def _epoch(
        self, state: TrainingState, batches: Iterator[Batch], save: _Saver
    ) -> tuple[TrainingState, str]:
        began = time.perf_counter()
        report = self._train_epoch(state.epoch, batches)
        first = next((each for each in state.history if each.epoch), report)
        if report["train_loss"] > _DIVERGED_FACTOR * first["train_loss"]:
            raise DivergedError(
                f"training diverged in epoch {report.epoch}: the loss is {report['train_loss']:.3g}, in the "
                f"first epoch it was {first['train_loss']:.3g}; {_MEND}"
            )
        return self._finish(state, report, began, save)

    def _finish(
        self, state: TrainingState, report: EpochReport, began: float, save: _Saver
    ) -> tuple[TrainingState, str]:
        """Judge the network after an epoch, note it; gives the new state and why to stop, if it was asked."""
        judged = self.learner.judged_network()
        more = self.examples.validate(judged, self.learner.arithmetic)
        every = self.params.validate_volumes_every
        validate_volumes = self.callbacks.validate_volumes
        if validate_volumes is not None and every and report.epoch % every == 0:
            more["volume_ap"] = validate_volumes(judged)
        more["seconds"] = time.perf_counter() - began
        report = EpochReport(report.epoch, {**report.measured, **more})
        # larger is better; an epoch that was not judged in 3D where others are, nan, is never the best
        in_volumes = validate_volumes is not None and every > 0
        score = report["volume_ap"] if in_volumes else -_loss_of(report)
        is_best = score > state.best_score
        state = TrainingState(
            learner=self.learner.state(),
            history=(*state.history, report),
            best_epoch=report.epoch if is_best else state.best_epoch,
            best_score=score if is_best else state.best_score,
            best=self.learner.kept_weights() if is_best else state.best,
        )
        save(state, is_best)
        if self.callbacks.on_epoch is not None:
            try:
                self.callbacks.on_epoch(report)
            except StopTraining as request:
                return state, str(request) or "stopped on request"
        return state, ""

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
            output, losses = learner.step(batch, rate)
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
    return report["train_loss"] if math.isnan(report["validation_loss"]) else report["validation_loss"]
