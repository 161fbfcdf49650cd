"""The 3D network: a residual U-Net in the manner of Cellpose's CPnet, shaped by the voxel size.

An axis whose spacing is more than twice the finest is neither pooled nor convolved along (nnU-Net's rule,
Isensee et al., Nature Methods 2021): at anisotropy 11.5 the first levels look at planes, and depth comes in
where the pooled voxels have become about cubic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nuclei3d.errors import InputError

Triple = tuple[int, int, int]
Pooling = Literal["spacing", "isotropic"]
Targets = Literal["heat", "tanh"]

OUTPUTS = 4
"""5 x flow along (z, y, x), and the logit of the foreground."""

PROFILES: Mapping[str, tuple[tuple[int, ...], int]] = {
    "default": ((24, 48, 96, 192), 4),
    "small": ((16, 24, 48, 64), 2),
}
"""Channels of the levels, and convolutions of each level on the way down and again on the way up."""

_MAX_RATIO = 2.0
_MAX_ANISOTROPY = 100.0


@dataclass(frozen=True)
class Architecture:
    """The shape of a `VolumeNetwork`.

    Attributes
    ----------
    channels
        Of each level, the finest first.
    pooling
        Factors (z, y, x) from each level to the next.
    kernels
        Sizes (z, y, x) of the convolutions of each level.
    convolutions
        Of each level, once on the way down and once on the way up; even.
    style
        Whether the mean of the deepest features is fed to the way up, as in Cellpose.
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

    Attributes
    ----------
    architecture
        Of the network.
    anisotropy
        Edge of a voxel in z over that in x, on the grid that the network sees.
    patch
        Shape (z, y, x) of the patches that it was trained on.
    targets
        ``heat``: flows are unit vectors in um; ``tanh``: tanh of the distance to the centre over 5 voxels,
        as in Cellpose3D.
    """

    architecture: Architecture
    anisotropy: float
    patch: Triple
    targets: Targets = "heat"


def plan_architecture(
    anisotropy: float, profile: str = "default", pooling: Pooling = "spacing", style: bool = False
) -> Architecture:
    """Choose pooling and kernels from the voxel size.

    Parameters
    ----------
    anisotropy
        Edge of a voxel in z over that in x and y.
    profile
        ``default`` (about 6 M parameters) or ``small`` (about 0.4 M, for two processor cores).
    pooling
        ``spacing``: nnU-Net's rule; ``isotropic``: every axis alike, whatever the voxel size.
    style
        See `Architecture`.

    Raises
    ------
    InputError
        If the anisotropy is no sensible number, or the profile unknown.
    """
    if not 0 < anisotropy <= _MAX_ANISOTROPY:
        raise InputError(
            f"voxels {anisotropy:g} times as long in z as in x: no 3D network is made for that; check the "
            "voxel size (data.voxel_size_um)"
        )
    if profile not in PROFILES:
        raise InputError(f"train.full3d.profile '{profile}' is unknown; choose {' or '.join(PROFILES)}")
    channels, convolutions = PROFILES[profile]
    spacing = [anisotropy, 1.0, 1.0]
    kernels: list[Triple] = []
    steps: list[Triple] = []
    for _ in channels:
        near = [pooling == "isotropic" or edge <= _MAX_RATIO * min(spacing) for edge in spacing]
        kernels.append((3 if near[0] else 1, 3 if near[1] else 1, 3 if near[2] else 1))
        step = (2 if near[0] else 1, 2 if near[1] else 1, 2 if near[2] else 1)
        steps.append(step)
        spacing = [edge * factor for edge, factor in zip(spacing, step, strict=True)]
    return Architecture(channels, tuple(steps[:-1]), tuple(kernels), convolutions, style)


def plan_patch(architecture: Architecture, diameter_px: float, anisotropy: float, diameters: float) -> Triple:
    """Choose the shape of patches: so many diameters of a nucleus along each axis, multiples of pooling."""
    sizes = (diameters * diameter_px / anisotropy, diameters * diameter_px, diameters * diameter_px)
    z, y, x = (
        max(1, round(size / multiple), -(-4 // multiple)) * multiple
        for size, multiple in zip(sizes, architecture.multiple, strict=True)
    )
    return z, y, x


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
    """A residual 3D U-Net.

    Takes (n, 1, z, y, x), normalised, each size a multiple of ``spec.architecture.multiple``, and gives
    (n, 4, z, y, x): 5 x flow along (z, y, x), and the logit.

    Parameters
    ----------
    spec
        Kept as the attribute `spec`.
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


def new_volume_network(spec: VolumeSpec, seed: int) -> VolumeNetwork:
    """Make an untrained network; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VolumeNetwork(spec)


def volume_network_from_state(
    spec: VolumeSpec, state: Mapping[str, Tensor], where: str = "the weights"
) -> VolumeNetwork:
    """Make a network from saved weights, in evaluation mode.

    Raises
    ------
    InputError
        If a name or a shape is not that of the architecture, or a value is not finite.
    """
    network = new_volume_network(spec, seed=0)
    wanted = network.state_dict()
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{where}: no weights of a network (a mapping of names to tensors was expected)")
    unknown, missing = sorted(set(state) - set(wanted)), sorted(set(wanted) - set(state))
    if unknown or missing:
        found = f"unknown '{unknown[0]}'" if unknown else f"missing '{missing[0]}'"
        raise InputError(
            f"{where}: not the 3D network that model.json describes: {found} ({len(unknown)} unknown, "
            f"{len(missing)} missing)"
        )
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise InputError(
                f"{where}: '{name}' has shape {tuple(value.shape)}, model.json describes "
                f"{tuple(wanted[name].shape)}"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{where}: '{name}' holds NaN or infinite values")
    network.load_state_dict(dict(state))
    return network.eval()


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
