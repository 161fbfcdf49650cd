"""A network with its optimiser and the mean of its weights: what does a step, is saved and restored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nuclei3d.config.train import TrainParams
from nuclei3d.core.networks import choose_precision
from nuclei3d.core.training.batches import Batch
from nuclei3d.core.training.recorded_gradients import RecordedGradients
from nuclei3d.core.training.state import TrainingState, WeightAverage, copy_state, copy_to_cpu


class LossParts(Protocol):
    """The loss of a batch: scalar tensors, of which `total` is minimised and the others are reported."""

    @property
    def flow(self) -> Tensor:
        """Of the flows."""

    @property
    def probability(self) -> Tensor:
        """Of the foreground."""

    @property
    def total(self) -> Tensor:
        """What is minimised."""


@dataclass(frozen=True)
class Arithmetic:
    """Where and in which types a network computes.

    Attributes
    ----------
    device
        Where.
    precision
        Type of the convolutions; weights, loss and optimiser are float32.
    layout
        Order of the axes in memory.
    """

    device: torch.device
    precision: torch.dtype
    layout: torch.memory_format

    def run(self, network: nn.Module, images: Tensor) -> Tensor:
        """Run a network over a batch on the device; of several outputs the first is given."""
        images = images.contiguous(memory_format=self.layout)
        mixed = self.precision != torch.float32
        # no weight is used twice, so there is nothing to keep; and a CUDA graph must hold the casts
        with torch.autocast(self.device.type, dtype=self.precision, enabled=mixed, cache_enabled=False):
            output = network(images)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first


def choose_arithmetic(params: TrainParams, device: torch.device, axes: int) -> Arithmetic:
    """Choose how to compute with images of so many spatial axes."""
    last = torch.channels_last if axes == 2 else torch.channels_last_3d
    return Arithmetic(
        device,
        choose_precision(params.precision, device),
        last if params.channels_last else torch.contiguous_format,
    )


class Learner:
    """A network under training.

    Parameters
    ----------
    network
        It is moved to the device and changed.
    params
        Optimiser, clipping, mean of the weights.
    arithmetic
        How it computes.
    loss_of
        Gives the loss of the network's output on a batch.
    """

    def __init__(
        self,
        network: nn.Module,
        params: TrainParams,
        arithmetic: Arithmetic,
        loss_of: Callable[[Tensor, Batch], LossParts],
    ) -> None:
        self.network = network.to(device=arithmetic.device)
        self.network.to(memory_format=arithmetic.layout)  # type: ignore[call-overload]
        self.arithmetic = arithmetic
        self._loss_of = loss_of
        self._clip = params.gradient_clip
        self._optimizer = _new_optimizer(self.network, params)
        self._average = WeightAverage(self.network, params.ema) if params.ema else None
        self._gradients: Callable[[Batch], tuple[Tensor, Tensor]] = self._compute_gradients
        if arithmetic.device.type == "cuda" and params.cuda_graph:
            self._gradients = RecordedGradients(self._compute_gradients, self.network)

    def step(self, batch: Batch, rate: float, number: int) -> tuple[Tensor, Tensor]:
        """Do one step down the gradient of the loss of a batch.

        Parameters
        ----------
        batch
            On the device.
        rate
            Learning rate.
        number
            Of the step, from 0 over the whole training.

        Returns
        -------
        output : Tensor
            Of the network, before the step; overwritten by the next one.
        values : Tensor
            The two parts of the loss, on the device; likewise.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        output, values = self._gradients(batch)
        if self._clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self._clip)
        self._optimizer.step()
        if self._average is not None:
            self._average.update(number)
        return output, values

    def _compute_gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Fill in the gradients; give the output and the two parts of the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        output = self.arithmetic.run(self.network, batch.images)
        loss = self._loss_of(output, batch)
        loss.total.backward()  # type: ignore[no-untyped-call]
        return output.detach(), torch.stack([loss.flow.detach(), loss.probability.detach()])

    def restore(self, state: TrainingState) -> None:
        """Go back to a state, the random numbers of torch included."""
        if not state.epoch:
            return
        self.network.load_state_dict(state.network)
        self._optimizer.load_state_dict(state.optimizer)
        if self._average is not None and state.average is not None:
            self._average.load(state.average)
        torch.set_rng_state(state.generator)

    def optimizer_state(self) -> dict[str, Any]:
        """Copy the state of the optimiser to the CPU."""
        return dict(_on_cpu(self._optimizer.state_dict()))

    def average_state(self) -> dict[str, Tensor] | None:
        """Copy the mean of the weights to the CPU; None without one."""
        return None if self._average is None else dict(_on_cpu(self._average.state()))

    def judged_network(self) -> nn.Module:
        """Give the network that is validated: with the mean weights if there are."""
        if self._average is None:
            return self.network
        judged = copy.deepcopy(self.network)
        judged.load_state_dict(self._average.state())
        return judged

    def kept_weights(self) -> dict[str, Tensor]:
        """Copy the weights that a model would have now to the CPU."""
        return self.average_state() or copy_state(self.network)


def _new_optimizer(network: nn.Module, params: TrainParams) -> torch.optim.Optimizer:
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
        return copy_to_cpu(value)
    if isinstance(value, dict):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_on_cpu(entry) for entry in value]
    return value
