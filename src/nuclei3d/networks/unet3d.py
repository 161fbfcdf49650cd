"""The 3D network: a residual U-Net in the manner of Cellpose's CPnet, shaped by the voxel size.

This file needs torch alone: it goes into the packages of bioimage.io as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Triple = tuple[int, int, int]
Targets = Literal["heat", "tanh"]

OUTPUTS = 4
"""5 x flow along (z, y, x), and the logit of the foreground."""


@dataclass(frozen=True)
class Architecture:
    """The shape of a `VolumeNetwork`.

    `channels` are those of each level, the finest first, `kernels` the sizes (z, y, x) of its convolutions,
    `pooling` the factors (z, y, x) from each level to the next. A level has so many `convolutions`, an even
    number, on the way down and again on the way up. With `style` the mean of the deepest features is fed to
    the way up, as in Cellpose.
    """

    channels: tuple[int, ...]
    pooling: tuple[Triple, ...]
    kernels: tuple[Triple, ...]
    convolutions: int = 4
    style: bool = False

    def __post_init__(self) -> None:
        levels = len(self.channels)
        if (
            not levels
            or len(self.kernels) != levels
            or len(self.pooling) != levels - 1
            or self.convolutions < 2
            or self.convolutions % 2
            or min(self.channels) < 1
            or any(size not in (1, 3) for kernel in self.kernels for size in kernel)
            or any(factor not in (1, 2) for step in self.pooling for factor in step)
        ):
            raise ValueError(f"no shape of a network: {self}")

    @property
    def multiple(self) -> Triple:
        """Sizes (z, y, x) of which a patch has to be a multiple."""
        total = [1, 1, 1]
        for step in self.pooling:
            total = [a * b for a, b in zip(total, step, strict=True)]
        return total[0], total[1], total[2]


@dataclass(frozen=True)
class VolumeSpec:
    """All that is needed to make a network and to use it.

    `anisotropy` is the edge of a voxel in z over that in x on the grid that the network sees, `patch` the
    shape (z, y, x) of the patches that it was trained on. Flows are unit vectors in um (`targets` ``heat``),
    or tanh of the distance to the centre over 5 voxels, as in Cellpose3D (``tanh``).
    """

    architecture: Architecture
    anisotropy: float
    patch: Triple
    targets: Targets = "heat"


class _Convolution(nn.Sequential):
    """Batch normalisation, ReLU (but not on the image itself), convolution."""

    def __init__(self, channels_in: int, channels_out: int, kernel: Triple, active: bool = True) -> None:
        layers: list[nn.Module] = [nn.BatchNorm3d(channels_in)]
        if active:
            layers.append(nn.ReLU(inplace=True))
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        layers.append(nn.Conv3d(channels_in, channels_out, kernel, padding=padding))
        super().__init__(*layers)


class _Level(nn.Module):
    """Residual pairs of convolutions; on the way up those of the way down are added inside the first."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        kernel: Triple,
        convolutions: int,
        style: int = 0,
        first: bool = False,
    ) -> None:
        super().__init__()
        self.project = _Convolution(channels_in, channels, (1, 1, 1), active=False)
        self.enter = _Convolution(channels_in, channels, kernel, active=not first)
        self.convolve = nn.ModuleList(
            _Convolution(channels, channels, kernel) for _ in range(convolutions - 1)
        )
        self.style = nn.Linear(style, channels) if style else None

    def forward(self, x: Tensor, skip: Tensor | None = None, style: Tensor | None = None) -> Tensor:
        entered = self.enter(x)
        if skip is not None:
            entered = entered + skip
        if self.style is not None and style is not None:
            entered = entered + self.style(style)[:, :, None, None, None]
        x = self.project(x) + self.convolve[0](entered)
        for first, second in zip(self.convolve[1::2], self.convolve[2::2], strict=True):
            x = x + second(first(x))
        return x


class VolumeNetwork(nn.Module):
    """A residual 3D U-Net; `spec` is kept as an attribute.

    Takes (n, 1, z, y, x), normalised, each size a multiple of ``spec.architecture.multiple``, and gives
    (n, 4, z, y, x): 5 x flow along (z, y, x), and the logit.
    """

    def __init__(self, spec: VolumeSpec) -> None:
        super().__init__()
        self.spec = spec
        shape = spec.architecture
        before = (1, *shape.channels[:-1])
        deepest = shape.channels[-1] if shape.style else 0
        self.down = nn.ModuleList(
            _Level(enter, channels, kernel, shape.convolutions, first=not number)
            for number, (enter, channels, kernel) in enumerate(
                zip(before, shape.channels, shape.kernels, strict=True)
            )
        )
        self.up = nn.ModuleList(
            _Level(deep, channels, kernel, shape.convolutions, deepest)
            for (channels, deep), kernel in zip(pairwise(shape.channels), shape.kernels[:-1], strict=True)
        )
        self.output = _Convolution(shape.channels[0], OUTPUTS, (1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Give flow and logit."""
        steps = self.spec.architecture.pooling
        features: list[Tensor] = []
        x = image
        for number, level in enumerate(self.down):
            if number:
                x = F.max_pool3d(x, steps[number - 1])
            x = level(x)
            features.append(x)
        style = None
        if self.spec.architecture.style:
            style = F.normalize(x.mean(dim=(2, 3, 4)), dim=1)
        for number in reversed(range(len(self.up))):
            x = F.interpolate(x, scale_factor=[float(factor) for factor in steps[number]], mode="nearest")
            x = self.up[number](x, features[number], style)
        result: Tensor = self.output(x)
        return result


def described_network(architecture: Mapping[str, Any], **others: Any) -> VolumeNetwork:
    """Make an untrained network from plain values, those of `VolumeSpec` as model.json holds them."""
    triples = {name: tuple(map(tuple, architecture[name])) for name in ("pooling", "kernels")}
    shape = Architecture(**{**architecture, **triples, "channels": tuple(architecture["channels"])})
    return VolumeNetwork(VolumeSpec(shape, **{**others, "patch": tuple(others["patch"])}))


def new_volume_network(spec: VolumeSpec, seed: int) -> VolumeNetwork:
    """Make an untrained network; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VolumeNetwork(spec)


def count_parameters(network: nn.Module) -> int:
    """Count what is learned."""
    return sum(parameter.numel() for parameter in network.parameters())


def same_architecture(network: nn.Module, spec: VolumeSpec) -> bool:
    """Say whether a network has a spec's architecture and targets, so that its weights can be a start."""
    found = getattr(network, "spec", None)
    return (
        isinstance(found, VolumeSpec)
        and found.architecture == spec.architecture
        and found.targets == spec.targets
    )


def describe(architecture: Architecture) -> str:
    """Say the shape in a line: kernels and pooling from the finest level down."""

    def words(triples: Sequence[Triple]) -> str:
        return " ".join("x".join(map(str, triple)) for triple in triples)

    return f"kernels {words(architecture.kernels)}, pooling {words(architecture.pooling)}"
