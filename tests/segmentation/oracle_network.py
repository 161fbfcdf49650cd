"""Networks that know the truth: exact flows computed from what the image shows."""

import numpy as np
import torch
from scipy import ndimage
from torch import nn

from nuclei3d.flows import flows_2d, flows_3d
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.unet3d import Architecture, VolumeNetwork, VolumeSpec

TINY = Architecture((4, 8), ((1, 2, 2),), ((1, 3, 3), (3, 3, 3)), 2)


class OracleNetwork(nn.Module):
    """Reads labels from the image and answers with exact flows (times 5) and a logit of +-6.

    With `separate` the image shows nuclei as values above 0.5 that do not touch; else the values are the
    labels themselves (an image normalised by the range 0 to 1 keeps them).
    """

    def __init__(self, *, separate: bool) -> None:
        super().__init__()
        self.separate = separate
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, stack: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.shapes.append(tuple(stack.shape))
        output = np.empty((len(stack), 3, *stack.shape[2:]), np.float32)
        for i, plane in enumerate(stack[:, 0].float().numpy()):
            labels = ndimage.label(plane > 0.5)[0] if self.separate else np.rint(plane).astype(np.int32)
            output[i, :2] = 5 * flows_2d(labels)
            output[i, 2] = np.where(labels > 0, 6, -6)
        return torch.from_numpy(output), None


class VolumeOracle(VolumeNetwork):
    """Reads labels from the image and answers with exact flows (times 5) and a logit of +-6."""

    def __init__(self, anisotropy: float, patch=(8, 16, 16), targets="heat") -> None:
        super().__init__(VolumeSpec(TINY, anisotropy, patch, targets))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(image.shape[2:]))
        output = np.empty((len(image), 4, *image.shape[2:]), np.float32)
        for one, made in zip(image[:, 0].float().numpy(), output, strict=True):
            labels = np.rint(one).astype(np.int32)
            made[:3] = 5 * flows_3d(labels, VoxelSize(self.spec.anisotropy, 1.0, 1.0))
            made[3] = np.where(labels > 0, 6, -6)
        return torch.from_numpy(output)


def ball_labels(
    shape: tuple[int, int, int], centres: np.ndarray, radii: np.ndarray, edges: tuple[float, float, float]
) -> np.ndarray:
    """Give balls (centres and radii in um) as labels; where two overlap, the nearer centre wins."""
    grid = np.stack(
        np.meshgrid(*((np.arange(n) + 0.5) * e for n, e in zip(shape, edges, strict=True)), indexing="ij"), -1
    )
    labels = np.zeros(shape, np.uint32)
    best = np.ones(shape)
    for label, (centre, radius) in enumerate(zip(centres, radii, strict=True), start=1):
        distance = ((grid - centre) ** 2).sum(-1) / radius**2
        nearer = distance < best
        labels[nearer] = label
        best[nearer] = distance[nearer]
    return labels
