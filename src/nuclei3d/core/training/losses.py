"""The loss of Cellpose (Stringer et al., Nature Methods 2021), with optional weights per pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nuclei3d.core.networks import FLOW_SCALE


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
