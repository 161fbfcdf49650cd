"""The loss of the networks, and the figures that tell whether a 3D one learns every axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nuclei3d.config.sections import Full3dParams
from nuclei3d.networks.cpnet import FLOW_SCALE

AXES = ("z", "y", "x")


@dataclass(frozen=True)
class LossTerms:
    """What the loss is made of; the defaults are Cellpose's (Stringer et al., Nature Methods 2021).

    `flow`, `probability` and `dice` weigh the error of the flows, the foreground's cross-entropy and its Dice
    loss; `flow_axes` weigh the axes of the flow, (z, y, x), whose error is then that inside nuclei. None:
    half the mean squared error of 5 x flow everywhere, all axes alike.
    """

    flow: float = 1.0
    probability: float = 1.0
    dice: float = 0.0
    flow_axes: tuple[float, ...] | None = None

    @classmethod
    def of_volumes(cls, params: Full3dParams, variances: tuple[float, float, float]) -> LossTerms:
        """Give the terms of a 3D network.

        With `params.balance_axes` each axis' error is divided by three times the mean square of its flow, one
        of `variances` (1 in all if they are equal), so that predicting 0 costs as much on every axis;
        without, the errors of the axes are summed as they are.
        """
        axes = tuple(1 / (3 * variance) if params.balance_axes else 1.0 for variance in variances)
        return cls(params.flow_weight, params.probability_weight, params.dice_weight, axes)


CELLPOSE_TERMS = LossTerms()


@dataclass(frozen=True)
class Loss:
    """The parts of the loss, scalar tensors, each with its weight; `total` is what is minimised."""

    flow: Tensor
    entropy: Tensor
    dice: Tensor

    @property
    def probability(self) -> Tensor:
        """Both parts that concern the foreground."""
        return self.entropy + self.dice

    @property
    def total(self) -> Tensor:
        """Sum of all."""
        return self.flow + self.probability


def network_loss(
    output: Tensor,
    flows: Tensor,
    foreground: Tensor,
    weights: Tensor | None = None,
    terms: LossTerms = CELLPOSE_TERMS,
) -> Loss:
    """Compute the loss of a batch; on a GPU, without waiting for it.

    `output` is (B, components + 1, ...): 5 x flow in (y, x) or (z, y, x), logit; of any type, computed in
    float32. `flows` are (B, components, ...), 0 on the background; `foreground`, bool, and `weights`, factors
    of the errors of a pixel, are (B, ...). Means are over pixels, not over weights, so heavier nuclei do not
    make the background lighter.
    """
    output = output.float()
    target = foreground.float()
    components = flows.shape[1]
    logit = output[:, components]
    if terms.flow_axes is None:
        squared = (output[:, :components] - FLOW_SCALE * flows).square()
        flow = (squared if weights is None else squared * weights[:, None]).mean() / 2
    else:
        inside = target if weights is None else target * weights
        squared = (output[:, :components] / FLOW_SCALE - flows).square() * inside[:, None]
        by_axis = squared.sum(dim=(0, 2, 3, 4)) / target.sum().clamp(min=1)
        z, y, x = (error * weight for error, weight in zip(by_axis, terms.flow_axes, strict=True))
        flow = z + y + x
    if terms.flow_axes is None and weights is not None:
        # as below, but with the gradients that trainings on planes have always had, to the last bit
        entropy = (F.binary_cross_entropy_with_logits(logit, target, reduction="none") * weights).mean()
    else:
        entropy = F.binary_cross_entropy_with_logits(logit, target, weight=weights)
    dice = torch.zeros_like(entropy)
    if terms.dice:
        likely = torch.sigmoid(logit)
        dice = 1 - (2 * (likely * target).sum() + 1) / (likely.sum() + target.sum() + 1)
    return Loss(terms.flow * flow, terms.probability * entropy, terms.dice * dice)


def losses_of_crops(output: Tensor, flows: Tensor, foreground: Tensor) -> Tensor:
    """Compute Cellpose's loss of each crop of planes by itself: float32 (B, 2), flow and probability."""
    output = output.float()
    squared = (output[:, :2] - FLOW_SCALE * flows).square().mean(dim=(1, 2, 3)) / 2
    entropy = F.binary_cross_entropy_with_logits(output[:, 2], foreground.float(), reduction="none")
    return torch.stack([squared, entropy.mean(dim=(1, 2))], dim=1)


class FlowFigures:
    """Sums up, batch after batch, how well a 3D network does along each axis."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, output: Tensor, flows: Tensor, foreground: Tensor) -> None:
        """Take in a batch; arguments as in `network_loss`."""
        inside = foreground[:, None]
        predicted = torch.where(inside, output[:, :3].float() / FLOW_SCALE, 0.0)
        true = torch.where(inside, flows, 0.0)
        across = (0, 2, 3, 4)
        called = output[:, 3] > 0
        sums = torch.stack(
            [
                *(predicted * true).sum(across),
                *predicted.square().sum(across),
                *true.square().sum(across),
                (called & foreground).sum(),
                called.sum(),
                foreground.sum(),
            ]
        ).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def figures(self) -> dict[str, float]:
        """Give the figures of all batches; none before the first.

        ``flow_mse_z``, ``_y``, ``_x``: mean squared error of the flow inside nuclei; ``flow_cosine_z``, ...:
        sum of products over the root of the product of the sums of squares, 1 for a flow that is right up to
        its length, 0 for one that knows nothing; ``dice`` of the voxels whose logit is above 0.
        """
        if self._sums is None:
            return {}
        values = [float(value) for value in self._sums]
        products, predicted, true = values[0:3], values[3:6], values[6:9]
        hits, called, foreground = values[9:]
        result = {}
        for axis, ab, aa, bb in zip(AXES, products, predicted, true, strict=True):
            result[f"flow_mse_{axis}"] = (aa - 2 * ab + bb) / max(foreground, 1)
            result[f"flow_cosine_{axis}"] = ab / max((aa * bb) ** 0.5, 1e-12)
        result["dice"] = 2 * hits / max(called + foreground, 1)
        return result
