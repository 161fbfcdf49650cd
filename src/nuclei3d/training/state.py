"""The state of a training between two epochs: everything that the next epoch depends on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

FORMAT = 2

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
    nan.
    """

    epoch: int
    measured: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        """Give one value, nan if it was not measured."""
        return self.measured.get(name, math.nan)

    def metrics(self) -> dict[str, float]:
        """Give the measured numbers by name, in the order of `METRICS`."""
        return {name: self[name] for name in METRICS if not math.isnan(self[name])}

    @property
    def train_loss(self) -> float:
        """Mean loss over the crops of the epoch."""
        return self["train_loss"]

    @property
    def validation_loss(self) -> float:
        """Mean loss on the validation crops, or nan."""
        return self["validation_loss"]

    @property
    def volume_ap(self) -> float:
        """Average precision on the validation volumes, or nan."""
        return self["volume_ap"]


@dataclass(frozen=True)
class TrainingState:
    """The state after an epoch.

    Attributes
    ----------
    network, optimizer, average
        States of the network, the optimiser and the mean of the weights (None: off).
    generator
        State of torch's global generator on the CPU.
    history
        One report per epoch.
    best_epoch, best_score
        The best epoch so far (0: none) and its score; larger is better.
    best
        The weights of that epoch.
    """

    network: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Tensor] | None
    generator: Tensor
    history: tuple[EpochReport, ...]
    best_epoch: int
    best_score: float
    best: dict[str, Tensor]

    @property
    def epoch(self) -> int:
        """Number of epochs done."""
        return len(self.history)

    def as_plain(self) -> dict[str, Any]:
        """Give the state, without the best weights, as tensors, numbers, texts, lists and dictionaries."""
        history = [asdict(report) for report in self.history]
        return {**vars(self), "best": None, "history": history, "format": FORMAT}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], best: dict[str, Tensor]) -> TrainingState:
        """Restore what `as_plain` gave; KeyError or TypeError if it is something else."""
        if plain["format"] != FORMAT:
            raise KeyError("format")
        history = tuple(EpochReport(**report) for report in plain["history"])
        values = {name: value for name, value in plain.items() if name != "format"}
        return cls(**{**values, "history": history, "best": best})


def copy_state(module: nn.Module) -> dict[str, Tensor]:
    """Copy a module's state to the CPU."""
    return {name: copy_to_cpu(value) for name, value in module.state_dict().items()}


def copy_to_cpu(value: Tensor) -> Tensor:
    """Copy a tensor, once, wherever it is."""
    return value.detach().to("cpu", copy=True)


class WeightAverage:
    """Exponential mean of a network's weights; buffers (running means of batch norm) are averaged alike.

    The decay rises with the number of steps, ``min(decay, (1 + n) / (10 + n))``, so that the first weights
    are forgotten quickly.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._decay = decay
        followed = network.state_dict()
        self._mean = {name: value.detach().clone() for name, value in followed.items()}
        floating = [name for name, value in followed.items() if value.is_floating_point()]
        self._pairs = [(self._mean[name], value) for name, value in followed.items() if name not in floating]
        self._means = [self._mean[name] for name in floating]
        self._values = [followed[name] for name in floating]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the network's weights after a step (counted from 0)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        # all tensors in one call: one by one they would keep a GPU waiting
        get_ema_multi_avg_fn(decay)(self._means, self._values, None)  # type: ignore[no-untyped-call]
        for mean, value in self._pairs:
            mean.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Give the mean weights (not a copy)."""
        return self._mean

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over mean weights."""
        for name, value in state.items():
            self._mean[name].copy_(value)
