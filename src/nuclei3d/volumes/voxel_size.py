"""The size of a voxel in micrometres, and the anisotropy that follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from nuclei3d.errors import InputError


@dataclass(frozen=True)
class VoxelSize:
    """Edge lengths of a voxel in micrometres, in the axis order (z, y, x).

    Raises
    ------
    InputError
        If an edge is not a finite positive number.
    """

    z: float
    y: float
    x: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(edge) and edge > 0 for edge in self.zyx):
            raise InputError(f"voxel size must be three positive numbers (z, y, x) in um, got {self.zyx}")

    @classmethod
    def of(cls, zyx: Iterable[float]) -> VoxelSize:
        """Make a voxel size from any three numbers in the order (z, y, x)."""
        z, y, x = (float(edge) for edge in zyx)
        return cls(z, y, x)

    @property
    def zyx(self) -> tuple[float, float, float]:
        """The edges in um as a tuple (z, y, x)."""
        return (self.z, self.y, self.x)

    @property
    def anisotropy(self) -> float:
        """Depth of a voxel divided by its width in x."""
        return self.z / self.x

    @property
    def volume_um3(self) -> float:
        """Volume of one voxel in cubic micrometres."""
        return self.z * self.y * self.x

    def differs_from(self, other: VoxelSize, tolerance: float = 0.01) -> bool:
        """Tell whether any edge differs by more than the relative tolerance."""
        return any(abs(a - b) > tolerance * max(a, b) for a, b in zip(self.zyx, other.zyx, strict=True))

    def __str__(self) -> str:
        return f"{self.z:g} x {self.y:g} x {self.x:g} um (z, y, x)"
