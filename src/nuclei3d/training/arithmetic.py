"""Where and in which types of numbers a training computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nuclei3d.config.sections import TrainParams
from nuclei3d.networks.cpnet import choose_precision


@dataclass(frozen=True)
class Arithmetic:
    """Where and in which types a network computes.

    `precision` is the type of the convolutions (weights, loss and optimiser are float32), `layout` the order
    of the axes in memory.
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
    return Arithmetic(device, choose_precision(params.precision, device), last)
