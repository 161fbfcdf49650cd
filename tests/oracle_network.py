"""Networks of which one can say by hand what they answer, and oracles: exact flows of what an image shows."""

from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import nn

from nuclei3d.flows import flows_2d, flows_3d
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.folder import Model, ModelInfo, save_model
from nuclei3d.networks.planning import plan_architecture
from nuclei3d.networks.unet3d import Architecture, VolumeNetwork, VolumeSpec, new_volume_network

TINY = Architecture((4, 8), ((1, 2, 2),), ((1, 3, 3), (3, 3, 3)), 2)
SPEC = VolumeSpec(plan_architecture(2.0, "small"), 2.0, (16, 24, 24))
SOLID = ModelInfo(name="oracle", kind="full3d", full3d=SPEC, diameter_px=12, nucleus_diameter_um=12)


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


def seen_in(image: np.ndarray, separate: bool) -> np.ndarray:
    """Give the nuclei: values above 0.5 that do not touch, or values that are the labels themselves.

    An image normalised by the range 0 to 1 keeps its labels.
    """
    return ndimage.label(image > 0.5)[0] if separate else np.rint(image).astype(np.int32)


class OracleNetwork(nn.Module):
    """Reads labels from planes (see `seen_in`) and answers with exact flows (times 5) and a logit of +-6."""

    def __init__(self, *, separate: bool) -> None:
        super().__init__()
        self.separate = separate
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, stack: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.shapes.append(tuple(stack.shape))
        output = np.empty((len(stack), 3, *stack.shape[2:]), np.float32)
        for plane, made in zip(stack[:, 0].float().numpy(), output, strict=True):
            labels = seen_in(plane, self.separate)
            made[:2] = 5 * flows_2d(labels)
            made[2] = np.where(labels > 0, 6, -6)
        return torch.from_numpy(output), None


class VolumeOracle(VolumeNetwork):
    """The same for volumes, whose planes are as far apart as the spec says."""

    def __init__(self, spec: VolumeSpec = SPEC, *, separate: bool = True) -> None:
        super().__init__(spec)
        self.separate = separate
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(image.shape[2:]))
        output = np.empty((len(image), 4, *image.shape[2:]), np.float32)
        for one, made in zip(image[:, 0].float().numpy(), output, strict=True):
            labels = seen_in(one, self.separate)
            made[:3] = 5 * flows_3d(labels, VoxelSize(self.spec.anisotropy, 1.0, 1.0))
            made[3] = np.where(labels > 0, 6, -6)
        return torch.from_numpy(output)


def save_oracle(folder: Path) -> Path:
    """Write a model folder with the 3D oracle's model.json; its weights are any."""
    save_model(folder, new_volume_network(SPEC, 0), SOLID, "oracle")
    return folder


def load_oracle(path: Path) -> Model:
    """Load such a folder as the oracle."""
    return Model(VolumeOracle(), SOLID, path if path.is_file() else path / "oracle")


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


def separate_balls(edges: tuple[float, float, float]) -> np.ndarray:
    """Give four balls of about 22 um that do not touch."""
    centres = np.array([(30, 15, 15), (30, 15, 45), (28, 44, 20), (33, 44, 48)], float)
    return ball_labels((int(60 / edges[0]), 60, 64), centres, np.array([11, 10, 12, 11.5]), edges)
