"""Embryo-like volumes, and networks to run on them, for the benchmarks of prediction."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn

from nuclei3d.flows import flows_2d
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import new_network
from shapes import Ellipsoid, draw_labels

CUBIC = VoxelSize(1, 1, 1)
Volume = tuple[NDArray[np.uint16], NDArray[np.uint32]]


def draw_volume(
    shape: tuple[int, int, int], diameter: float, share: float, rng: np.random.Generator
) -> Volume:
    """Draw nuclei, touching or nearly, in an ellipsoid that fills a share of the volume (1: everywhere)."""
    spacing = 1.08 * diameter
    axes = [np.arange(0.6 * spacing, size - 0.4 * spacing, spacing) for size in shape]
    centres = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    centres += rng.uniform(-0.12, 0.12, centres.shape) * diameter
    if share < 1:
        middle = np.array(shape) / 2
        # An ellipsoid that touches all faces fills pi / 6.
        scale = (share / (np.pi / 6)) ** (1 / 3)
        reach = scale * middle - diameter / 2
        centres = centres[(((centres - middle) / reach) ** 2).sum(1) < 1]
    bodies = []
    for centre in centres:
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        semi_axes = diameter / 2 * rng.uniform(0.85, 1.15) * rng.uniform(0.9, 1.1, 3)
        bodies.append(Ellipsoid(centre, semi_axes, rotation))
    labels = draw_labels(bodies, tuple(map(float, shape)), CUBIC)
    brightness = np.append(0, rng.uniform(0.5, 1.2, int(labels.max())))[labels]
    light = ndimage.gaussian_filter(brightness.astype(np.float32), (diameter / 9, 0.8, 0.8))
    image = rng.poisson(100 + 300 * light) + rng.normal(0, 3, shape)
    return np.clip(image, 0, None).astype(np.uint16), labels


def train_briefly(diameter: float, steps: int, seed: int) -> nn.Module:
    """Train a network on planes of a volume of its own, enough to find such nuclei."""
    rng = np.random.default_rng(seed)
    image, labels = draw_volume((64, 160, 160), diameter, 1.0, rng)
    low, high = np.percentile(image, (1, 99.8))
    planes = ((image - low) / (high - low)).astype(np.float32)
    network = new_network(diameter, seed).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        batch, targets = [], []
        for _ in range(6):
            axis = int(rng.integers(3))
            index = int(rng.integers(labels.shape[axis]))
            plane, truth = planes.take(index, axis), labels.take(index, axis)
            y, x = (int(rng.integers(size - 64 + 1)) for size in plane.shape)
            box = (slice(y, y + 64), slice(x, x + 64))
            batch.append(np.stack([plane[box], 0 * plane[box]]))
            inside = (truth > 0)[box].astype(np.float32)
            targets.append(np.concatenate([5 * flows_2d(truth)[:, box[0], box[1]], inside[None]]))
        wanted = torch.from_numpy(np.stack(targets))
        output = network(torch.from_numpy(np.stack(batch)).contiguous(memory_format=torch.channels_last))[0]
        loss = nn.functional.mse_loss(output[:, :2], wanted[:, :2]) / 2
        loss = loss + nn.functional.binary_cross_entropy_with_logits(output[:, 2], wanted[:, 2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


class Filters(nn.Module):
    """Three filters in the place of a network: flow up the blurred brightness, logit by brightness.

    The first batches go through CPnet as well, so that its share of the memory is there.
    """

    def __init__(self, diameter: float) -> None:
        super().__init__()
        reach = int(diameter / 2)
        position = torch.arange(-reach, reach + 1).float()
        bell = torch.exp(-(position**2) / (2 * (diameter / 4) ** 2))
        blur = bell[:, None] * bell
        kernels = torch.stack([blur * position[:, None], blur * position, blur / blur.sum()])
        self.weight = nn.Parameter(kernels[:, None], requires_grad=False)
        self.diam_mean = nn.Parameter(torch.tensor([diameter]), requires_grad=False)
        self.real = new_network(diameter, 0)
        self.real_batches = 0
        self.mkldnn = False
        self.nout = 3
        self.device = torch.device("cpu")

    def forward(self, stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give flow and logit, and a style as CPnet does."""
        if self.real_batches > 0:
            self.real_batches -= 1
            self.real(stack)
        output = nn.functional.conv2d(stack[:, :1].float(), self.weight, padding="same")
        length = output[:, :2].square().sum(1, keepdim=True).sqrt() + 1e-6
        flow = 5 * output[:, :2] / length
        logit = 10 * (output[:, 2:] - 0.35)
        return torch.cat([flow, logit], 1), torch.zeros(len(stack), 256)
