"""The shape of a 3D network and of its patches, chosen from the voxel size.

An axis whose spacing is more than twice the finest is neither pooled nor convolved along (nnU-Net's rule,
Isensee et al., Nature Methods 2021): at anisotropy 11.5 the first levels look at planes, and depth comes in
where the pooled voxels have become about cubic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from nuclei3d.errors import InputError
from nuclei3d.networks.unet3d import Architecture, Triple

Pooling = Literal["spacing", "isotropic"]

PROFILES: Mapping[str, tuple[tuple[int, ...], int]] = {
    "default": ((24, 48, 96, 192), 4),
    "small": ((16, 24, 48, 64), 2),
}
"""Channels of the levels, and convolutions of each level on the way down and again on the way up."""

_MAX_RATIO = 2.0
_MAX_ANISOTROPY = 100.0


def plan_architecture(
    anisotropy: float, profile: str = "default", pooling: Pooling = "spacing", style: bool = False
) -> Architecture:
    """Choose pooling and kernels from the voxel size; `style` as in `Architecture`.

    `anisotropy` is the edge of a voxel in z over that in x and y. The `profile` is ``default`` (4.5 to 6.3 M
    parameters) or ``small`` (0.3 to 0.5 M, for two processor cores), the `pooling` ``spacing``, nnU-Net's
    rule, or ``isotropic``: every axis alike, whatever the voxel size.
    """
    if not 0 < anisotropy <= _MAX_ANISOTROPY:
        raise InputError(
            f"voxels {anisotropy:g} times as long in z as in x: no 3D network is made for that; check the "
            "voxel size (data.voxel_size_um)"
        )
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
