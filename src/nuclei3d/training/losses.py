"""The loss of the 3D network, and the figures that tell whether every axis is learned.

The loss of Cellpose (Stringer et al., Nature Methods 2021), with optional weights per pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nuclei3d.config.sections import Full3dParams
from nuclei3d.networks.cpnet import FLOW_SCALE


@dataclass(frozen=True)
class Loss:
    """The two parts of the loss, scalar tensors; `total` is what is minimised."""

    flow: Tensor
    probability: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of both."""
        return self.flow + self.probability


def cellpose_loss(output: Tensor, flows: Tensor, foreground: Tensor, weights: Tensor | None = None) -> Loss:
    """Compute Cellpose's loss: half the mean squared error of 5 x flow, plus cross-entropy of the logit.

    Parameters
    ----------
    output
        (B, 3, Y, X): 5 x flow in y, 5 x flow in x, logit. Computed in float32 whatever its type.
    flows
        (B, 2, Y, X), unit vectors; 0 on the background.
    foreground
        bool (B, Y, X).
    weights
        (B, Y, X), factors of both errors of a pixel. The mean is over pixels, not over weights, so heavier
        nuclei do not make the background lighter.
    """
    output = output.float()
    target = foreground.float()
    if weights is None:
        return Loss(
            flow=F.mse_loss(output[:, :2], FLOW_SCALE * flows) / 2,
            probability=F.binary_cross_entropy_with_logits(output[:, 2], target),
        )
    squared = (output[:, :2] - FLOW_SCALE * flows).square() * weights[:, None]
    entropy = F.binary_cross_entropy_with_logits(output[:, 2], target, reduction="none") * weights
    return Loss(flow=squared.mean() / 2, probability=entropy.mean())


def losses_of_crops(output: Tensor, flows: Tensor, foreground: Tensor) -> Tensor:
    """Compute the unweighted loss of each crop by itself; parameters as `cellpose_loss`.

    Returns
    -------
    Tensor
        float32 (B, 2): the parts flow and probability.
    """
    output = output.float()
    squared = (output[:, :2] - FLOW_SCALE * flows).square().mean(dim=(1, 2, 3)) / 2
    entropy = F.binary_cross_entropy_with_logits(output[:, 2], foreground.float(), reduction="none")
    return torch.stack([squared, entropy.mean(dim=(1, 2))], dim=1)


AXES = ("z", "y", "x")


@dataclass(frozen=True)
class VolumeLoss:
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


def volume_loss(
    output: Tensor,
    flows: Tensor,
    foreground: Tensor,
    params: Full3dParams,
    variances: tuple[float, float, float],
    weights: Tensor | None = None,
) -> VolumeLoss:
    """Compute the loss: error of the flows inside nuclei, cross-entropy and Dice of the foreground.

    Parameters
    ----------
    output
        (B, 4, Z, Y, X): 5 x flow along (z, y, x), logit. Computed in float32 whatever its type.
    flows
        (B, 3, Z, Y, X); 0 on the background.
    foreground
        bool (B, Z, Y, X).
    params
        Weights of the parts.
    variances
        Mean square of the flows along (z, y, x). With `params.balance_axes` each axis' error is divided by
        three times its own (1 in all if the variances are equal), so that predicting 0 costs as much on
        every axis; without, the errors of the axes are summed as they are.
    weights
        (B, Z, Y, X), factors of the errors of a voxel, or None.
    """
    output = output.float()
    target = foreground.float()
    inside = target if weights is None else target * weights
    scale = [1 / (3 * variance) if params.balance_axes else 1.0 for variance in variances]
    squared = (output[:, :3] / FLOW_SCALE - flows).square() * inside[:, None]
    voxels = target.sum().clamp(min=1)
    by_axis = squared.sum(dim=(0, 2, 3, 4)) / voxels
    flow = by_axis[0] * scale[0] + by_axis[1] * scale[1] + by_axis[2] * scale[2]
    entropy = F.binary_cross_entropy_with_logits(output[:, 3], target, weight=weights)
    likely = torch.sigmoid(output[:, 3])
    dice = 1 - (2 * (likely * target).sum() + 1) / (likely.sum() + target.sum() + 1)
    return VolumeLoss(
        params.flow_weight * flow, params.probability_weight * entropy, params.dice_weight * dice
    )


class FlowFigures:
    """Sums up, batch after batch, what `figures` gives."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, output: Tensor, flows: Tensor, foreground: Tensor) -> None:
        """Take in a batch; arguments as in `volume_loss`."""
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
        """Give the figures of all batches.

        Returns
        -------
        dict
            ``flow_mse_z``, ``_y``, ``_x``: mean squared error of the flow inside nuclei; ``flow_cosine_z``,
            ...: sum of products over the root of the product of the sums of squares, 1 for a flow that is
            right up to its length, 0 for one that knows nothing; ``dice`` of the voxels whose logit is above
            0. Empty before the first batch.
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
