"""The size of a voxel in micrometres, and the units of length and time that files state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from nuclei3d.errors import InputError

_PREFIXES = {"pico": 1e-6, "nano": 1e-3, "micro": 1.0, "milli": 1e3, "centi": 1e4, "deci": 1e5, "": 1e6}
_SYMBOLS = {"pm": 1e-6, "nm": 1e-3, "um": 1.0, "µm": 1.0, "mm": 1e3, "cm": 1e4, "dm": 1e5, "m": 1e6}
_MICROMETRES = {
    **{f"{prefix}meter": factor for prefix, factor in _PREFIXES.items()},
    **_SYMBOLS,
    "micron": 1.0,
    "angstrom": 1e-4,
    "å": 1e-4,
    "in": 25400.0,
    "inch": 25400.0,
}
_SECONDS = {
    **{f"{prefix}second": factor * 1e-6 for prefix, factor in _PREFIXES.items()},
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "sec": 1.0,
    "min": 60.0,
    "minute": 60.0,
    "h": 3600.0,
    "hour": 3600.0,
    "d": 86400.0,
    "day": 86400.0,
}

# No microscope makes smaller or larger voxels; such numbers are a unit that was misread.
SMALLEST_EDGE_UM = 1e-3
LARGEST_EDGE_UM = 1e3


def micrometres_per(unit: str) -> float | None:
    r"""Give the length of a unit in micrometres; None where it is no length, for example "pixel".

    Names and symbols are those that ImageJ, OME and OME-Zarr write; plural and British spelling are
    understood, as are the Greek letter, the micro sign and Fiji's escape ``\u00B5m``.
    """
    name = unit.strip().lower().replace("\\u00b5", "µ").replace("μ", "µ").replace("â", "").replace("\x00", "")
    if name in _MICROMETRES:
        return _MICROMETRES[name]
    name = name.removesuffix("es") if name == "inches" else name.removesuffix("s")
    if name.endswith("metre"):
        name = name.removesuffix("metre") + "meter"
    return _MICROMETRES.get(name)


def seconds_per(unit: str) -> float | None:
    """Give the length of a unit of time in seconds; None where it is none."""
    name = unit.strip().lower().replace("μ", "µ")
    return _SECONDS.get(name, _SECONDS.get(name.removesuffix("s")))


def voxel_size_or_reason(z: float | None, y: float | None, x: float | None) -> tuple[VoxelSize | None, str]:
    """Make a voxel size from the edges in um that a file holds; None marks an edge that it does not hold.

    Where there is none the text says what is wrong with the file's numbers ("" where it holds none at all).
    """
    edges = {"z": z, "y": y, "x": x}
    known = {axis: edge for axis, edge in edges.items() if edge is not None}
    if not known:
        return None, ""
    text = ", ".join(f"{axis} = {edge:g} um" for axis, edge in known.items())
    missing = [axis for axis, edge in edges.items() if edge is None]
    if missing:
        return None, f"it holds {text}, but not the spacing of {' and '.join(missing)}"
    if not all(
        math.isfinite(edge) and SMALLEST_EDGE_UM <= edge <= LARGEST_EDGE_UM for edge in known.values()
    ):
        return None, f"it says {text}, which cannot be"
    try:
        return VoxelSize.of(known.values()), ""
    except InputError as error:
        return None, str(error)


@dataclass(frozen=True)
class VoxelSize:
    """Edge lengths of a voxel in micrometres, finite and positive, in the axis order (z, y, x)."""

    z: float
    y: float
    x: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(edge) and edge > 0 for edge in self.zyx):
            raise InputError(f"voxel size must be three positive numbers (z, y, x) in um, got {self.zyx}")

    @classmethod
    def of(cls, zyx: VoxelSize | Iterable[float]) -> VoxelSize:
        """Make a voxel size from any three numbers in the order (z, y, x); one that is given stays."""
        if isinstance(zyx, VoxelSize):
            return zyx
        z, y, x = (float(edge) for edge in zyx)
        return cls(z, y, x)

    @classmethod
    def given(cls, zyx: Iterable[float] | None) -> VoxelSize | None:
        """Do the same with what the user may have left out."""
        return None if zyx is None else cls.of(zyx)

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

    def scaled(self, factor: float) -> VoxelSize:
        """Give voxels of the same shape whose edges are so many times as long."""
        return VoxelSize.of(edge * factor for edge in self.zyx)

    @property
    def looks_reversed(self) -> bool:
        """Whether voxels are much flatter than wide, as where the edges were given in the order x, y, z."""
        return 2 * self.z < self.x

    def differs_from(self, other: VoxelSize, tolerance: float = 0.01) -> bool:
        """Tell whether any edge differs by more than the relative tolerance."""
        return any(abs(a - b) > tolerance * max(a, b) for a, b in zip(self.zyx, other.zyx, strict=True))

    def __str__(self) -> str:
        return f"{self.z:g} x {self.y:g} x {self.x:g} um (z, y, x)"
