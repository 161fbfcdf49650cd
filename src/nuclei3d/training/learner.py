"""A network with its optimiser and the mean of its weights: what does a step, is saved and restored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nuclei3d.config.sections import TrainParams
from nuclei3d.training.arithmetic import Arithmetic
from nuclei3d.training.examples import Batch
from nuclei3d.training.losses import Loss


def learning_rate(params: TrainParams, step: int, steps_per_epoch: int) -> float:
    """Give the learning rate of a step (counted from 0 over the whole training).

    ``constant`` and ``warmup_cosine`` rise linearly over ``warmup_steps``; the cosine then falls to a
    hundredth at the last step. ``cellpose`` is the schedule of ``cellpose.train.train_seg``: by epochs, ten
    of warm-up from 0, then, in trainings of more than 100 (300) epochs, ten halvings over the last 50 (100).
    """
    peak = params.learning_rate
    if params.schedule == "cellpose":
        return peak * _cellpose_factor(step // steps_per_epoch, params.epochs)
    warmup = min(1.0, (step + 1) / (params.warmup_steps + 1))
    if params.schedule == "constant":
        return peak * warmup
    total = params.epochs * steps_per_epoch
    progress = max(0.0, step - params.warmup_steps) / max(1, total - 1 - params.warmup_steps)
    return peak * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _cellpose_factor(epoch: int, epochs: int) -> float:
    if epoch < 10:
        return epoch / 9
    halvings, length = (10, 10) if epochs > 300 else (10, 5) if epochs > 100 else (0, 1)
    first = epochs - halvings * length
    return 0.5 ** max(0, (epoch - first) // length + 1) if epoch >= first and halvings else 1.0


_EAGER_STEPS = 3
"""Steps before the recording: libraries choose their algorithms in them, which cannot be recorded."""

Compute = Callable[[Batch], tuple[Tensor, Tensor]]
"""Fills in the gradients; gives the network's output and the parts of the loss."""


class RecordedGradients:
    """Computes gradients on a GPU by replaying a CUDA graph, batch by batch of the shape that came first.

    A step over a small batch is some thousand short kernels, which Python launches more slowly than a GPU
    runs them. A graph launches them all at once; what it computes is the same. `compute` fills in the
    gradients of a batch, starting from none, without waiting for the device.
    """

    def __init__(self, compute: Compute, network: nn.Module) -> None:
        self._compute = compute
        self._parameters = [each for each in network.parameters() if each.requires_grad]
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._eager_steps = 0
        self._batch: Batch | None = None
        self._graph = torch.cuda.CUDAGraph()
        self._result: tuple[Tensor, Tensor] | None = None
        self._gradients: list[Tensor | None] = []

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Fill in the gradients of a batch on the device; what `compute` gives is overwritten by the next
        call.
        """
        if self._batch is None and self._eager_steps < _EAGER_STEPS:
            self._eager_steps += 1
            return self._compute_aside(batch)
        if self._batch is None:
            self._record(batch)
        assert self._batch is not None
        if _shapes(batch) != _shapes(self._batch):
            # the last batch of an epoch may be smaller
            return self._compute(batch)
        for kept, new in zip(self._batch.tensors, batch.tensors, strict=True):
            kept.copy_(new, non_blocking=True)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._graph.replay()
        assert self._result is not None
        return self._result

    def _compute_aside(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute on a stream of its own, as CUDA wants it before a recording."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = self._compute(batch)
        here.wait_stream(self._stream)
        return result

    def _record(self, batch: Batch) -> None:
        kept = batch.copied(Tensor.clone)
        for parameter in self._parameters:
            parameter.grad = None
        # the threads that cut crops take page-locked memory meanwhile: only this thread is recorded
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = self._compute(kept)
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._batch = kept


def _shapes(batch: Batch) -> list[torch.Size]:
    return [tensor.shape for tensor in batch.tensors]


class Learner:
    """A network under training; it is moved to the device and changed.

    `params` gives optimiser, clipping and mean of the weights, `loss_of` the loss of the output on a batch.
    """

    def __init__(
        self,
        network: nn.Module,
        params: TrainParams,
        arithmetic: Arithmetic,
        loss_of: Callable[[Tensor, Batch], Loss],
    ) -> None:
        self.network = network.to(device=arithmetic.device)
        self.network.to(memory_format=arithmetic.layout)  # type: ignore[call-overload]
        self.arithmetic = arithmetic
        self._loss_of = loss_of
        self._clip = params.gradient_clip
        self._optimizer = _new_optimizer(self.network, params)
        self._average = average_weights(self.network, params.ema) if params.ema else None
        self._gradients: Callable[[Batch], tuple[Tensor, Tensor]] = self._compute_gradients
        if arithmetic.device.type == "cuda" and params.cuda_graph:
            self._gradients = RecordedGradients(self._compute_gradients, self.network)

    def step(self, batch: Batch, rate: float) -> tuple[Tensor, Tensor]:
        """Do one step down the gradient of a batch.

        Gives the network's output before the step and the two parts of the loss, on the device; both are
        overwritten by the next step.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        output, values = self._gradients(batch)
        if self._clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self._clip)
        self._optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self.network)
        return output, values

    def _compute_gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Fill in the gradients; give the output and the two parts of the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        output = self.arithmetic.run(self.network, batch.images)
        loss = self._loss_of(output, batch)
        loss.total.backward()  # type: ignore[no-untyped-call]
        return output.detach(), torch.stack([loss.flow.detach(), loss.probability.detach()])

    def state(self) -> dict[str, Any]:
        """Copy all that the next step depends on to the CPU, the random numbers of torch included."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "generator": torch.get_rng_state(),
        }
        return dict(copy_to_cpu(state))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a state that `state` gave."""
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        torch.set_rng_state(state["generator"])

    def judged_network(self) -> nn.Module:
        """Give the network that is validated and kept: with the mean weights if there are."""
        return self.network if self._average is None else self._average.module

    def kept_weights(self) -> dict[str, Tensor]:
        """Copy the weights that a model would have now to the CPU."""
        return dict(copy_to_cpu(self.judged_network().state_dict()))


Tensors = tuple[Tensor, ...] | list[Tensor]


def average_weights(network: nn.Module, decay: float) -> AveragedModel:
    """Make an exponential mean of a network's weights; running means of batch norm are averaged alike.

    The decay rises with the number of steps, ``min(decay, (1 + n) / (10 + n))`` after n of them, so that the
    first weights are forgotten quickly.
    """

    def update(means: Tensors, values: Tensors, _: Tensor | int) -> None:
        # all tensors in one call: one by one they would keep a GPU waiting
        if means[0].is_floating_point():
            # one more than the steps: at 0, torch would take the weights over as they are
            seen = int(mean.n_averaged)
            get_ema_multi_avg_fn(min(decay, seen / (9 + seen)))(means, values, None)  # type: ignore[no-untyped-call]
        else:
            torch._foreach_copy_(means, values)

    mean = AveragedModel(network, multi_avg_fn=update, use_buffers=True)
    mean.n_averaged.fill_(1)
    return mean


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


def copy_to_cpu(value: Any) -> Any:
    """Copy nested state to the CPU; what is on a GPU all at once, into page-locked memory."""
    copied = _copy_to_cpu(value)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.current_stream().synchronize()
    return copied


def _copy_to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        there = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return there.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: _copy_to_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_copy_to_cpu(entry) for entry in value]
    return value
