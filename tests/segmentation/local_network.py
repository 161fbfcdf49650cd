"""Networks of which one can say by hand what they answer."""

import torch
from torch import nn


class LocalNetwork(nn.Module):
    """A network that sees 3 x 3 pixels only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, stack: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(stack, self.weight, padding=1)


class PositionNetwork(nn.Module):
    """Answers with the coordinates of the pixel in the plane it is given, and the image as the logit."""

    def forward(self, stack: torch.Tensor) -> torch.Tensor:
        _, _, height, width = stack.shape
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grid = torch.stack([y, x]).float().expand(len(stack), 2, height, width)
        return torch.cat([5 * grid, stack[:, :1]], dim=1)
