"""The gradients of a batch on a GPU, recorded once as a CUDA graph and then replayed.

A step over a small batch is some thousand short kernels, which Python launches more slowly than a GPU runs
them. A graph launches them all at once; what it computes is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nuclei3d.core.training.batches import Batch

_EAGER_STEPS = 3
"""Steps before the recording: libraries choose their algorithms in them, which cannot be recorded."""

Compute = Callable[[Batch], tuple[Tensor, Tensor]]
"""Fills in the gradients; gives the network's output and the parts of the loss."""


class RecordedGradients:
    """Computes gradients by replaying a graph, batch by batch of the shape that came first.

    Parameters
    ----------
    compute
        Fills in the gradients of a batch, starting from none, without waiting for the device.
    network
        Whose gradients they are.
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
        """Fill in the gradients of a batch on the device.

        Returns
        -------
        output, values
            As `compute` gives them; both are overwritten by the next call.
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
        for kept, new in zip(_tensors(self._batch), _tensors(batch), strict=True):
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
        kept = Batch(
            batch.images.clone(),
            batch.foreground.clone(),
            batch.flows.clone(),
            None if batch.weights is None else batch.weights.clone(),
            batch.labels,
            batch.planes,
        )
        for parameter in self._parameters:
            parameter.grad = None
        # the threads that cut crops take page-locked memory meanwhile: only this thread is recorded
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = self._compute(kept)
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._batch = kept


def _tensors(batch: Batch) -> Sequence[Tensor]:
    tensors = (batch.images, batch.foreground, batch.flows, batch.weights)
    return [tensor for tensor in tensors if tensor is not None]


def _shapes(batch: Batch) -> list[torch.Size]:
    return [tensor.shape for tensor in _tensors(batch)]
