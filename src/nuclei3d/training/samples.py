"""Labelled volumes with 3D flows in compact types, ready to cut patches from.

Labelled images in compact types: what planes and volumes have in common.

Labelled planes in compact types, 6 bytes a pixel, ready to cut crops from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from nuclei3d.images.voxel_size import VoxelSize

FLOW_STEPS = 127
"""A flow component of 1 is stored as this int8; the rounding error of a direction is below half a degree."""


@dataclass(frozen=True)
class ImageInfo:
    """Where an image came from and what is in it (one row of manifest.csv)."""

    file: str
    embryo: str
    frame: str
    nuclei: int
    min_contrast: float
    norm_low: float
    norm_high: float


Info = TypeVar("Info", bound=ImageInfo)


@dataclass(frozen=True)
class StoredImages(Generic[Info]):
    """Many images, wherever their pixels lie.

    Attributes
    ----------
    infos
        One per image.
    step, offset
        float64 (images,): intensity = stored * step + offset, in the units of the image.
    """

    infos: tuple[Info, ...]
    step: NDArray[np.float64]
    offset: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.infos)

    @cached_property
    def gains(self) -> NDArray[np.float32]:
        """float32 (images, 2): normalised intensity = stored * gains[:, 0] + gains[:, 1]."""
        low = np.array([info.norm_low for info in self.infos])
        span = np.array([info.norm_high for info in self.infos]) - low
        return np.asarray(np.stack([self.step / span, (self.offset - low) / span], axis=1), np.float32)


def quantise_image(image: NDArray[np.generic]) -> tuple[NDArray[np.uint16], float, float]:
    """Store an image as uint16; exact for unsigned integers of up to 16 bits, else to 1/65535 of its range.

    Returns
    -------
    stored, step, offset
        ``image = stored * step + offset``.
    """
    if image.dtype in (np.uint8, np.uint16, np.bool_):
        return image.astype(np.uint16, copy=False), 1.0, 0.0
    values = image.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    step = (high - low) / 65535 or 1.0
    return np.rint((values - low) / step).astype(np.uint16), step, low


def quantise_flows(flows: NDArray[np.floating[Any]]) -> NDArray[np.int8]:
    """Store flows (component, ...) from -1 to 1 as int8 (..., component), times `FLOW_STEPS`."""
    stored = np.asarray(np.rint(np.clip(flows, -1, 1) * FLOW_STEPS), np.int8)
    return np.ascontiguousarray(np.moveaxis(stored, 0, -1))


VIEWS = ("xy", "xz", "yz")


@dataclass(frozen=True)
class PlaneInfo(ImageInfo):
    """Where a plane came from and what is on it (one row of manifest.csv)."""

    view: str
    index: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.height * self.width


class PlaneArrays(NamedTuple):
    """The pixels of one plane.

    Attributes
    ----------
    pixels
        uint16 (Y, X): intensities as stored.
    labels
        uint16 (Y, X): 0 is background, 1..n.
    flows
        int8 (Y, X, 2): (dy, dx) times `nuclei3d.training.samples.FLOW_STEPS`.
    """

    pixels: NDArray[np.uint16]
    labels: NDArray[np.uint16]
    flows: NDArray[np.int8]


@dataclass(frozen=True)
class PlaneSet(StoredImages[PlaneInfo]):
    """Many planes.

    Attributes
    ----------
    read
        Gives the pixels of a plane, from memory or from a file; called from several threads.
    """

    read: Callable[[int], PlaneArrays]

    def plane_image(self, plane: int) -> NDArray[np.float32]:
        """Normalised image (Y, X) of one plane."""
        stored = self.read(plane).pixels.astype(np.float32)
        return np.asarray(stored * self.gains[plane, 0] + self.gains[plane, 1])


def stack_planes(
    infos: Sequence[PlaneInfo],
    images: Sequence[NDArray[np.generic]],
    labels: Sequence[NDArray[np.integer[Any]]],
    flows: Sequence[NDArray[np.floating[Any]]],
) -> PlaneSet:
    """Pack planes given as arrays: images (Y, X), labels (Y, X), flows (2, Y, X) as unit vectors (dy, dx)."""
    stored = [quantise_image(image) for image in images]
    arrays = [
        PlaneArrays(
            np.ascontiguousarray(pixels),
            np.ascontiguousarray(plane_labels, dtype=np.uint16),
            quantise_flows(plane_flows),
        )
        for (pixels, _, _), plane_labels, plane_flows in zip(stored, labels, flows, strict=True)
    ]
    return PlaneSet(
        infos=tuple(infos),
        step=np.array([step for _, step, _ in stored]),
        offset=np.array([offset for _, _, offset in stored]),
        read=arrays.__getitem__,
    )


_FAINT_QUANTILE = 0.2


@dataclass(frozen=True)
class VolumeInfo(ImageInfo):
    """Where a volume came from and what is in it (one row of manifest.csv)."""

    shape: tuple[int, int, int]
    voxel_size: VoxelSize


class VolumeArrays(NamedTuple):
    """The voxels of one volume.

    Attributes
    ----------
    pixels
        uint16 (Z, Y, X): intensities as stored.
    labels
        Unsigned integers (Z, Y, X): 0 is background, 1..n.
    flows
        int8 (Z, Y, X, 3): (dz, dy, dx) times `nuclei3d.training.samples.FLOW_STEPS`.
    """

    pixels: NDArray[np.uint16]
    labels: NDArray[np.unsignedinteger[Any]]
    flows: NDArray[np.int8]


class NucleusTable(NamedTuple):
    """The nuclei of one volume, in the order of their labels 1..n.

    Attributes
    ----------
    centres
        float32 (n, 3): (z, y, x) in voxels, voxel i covers i to i + 1.
    volumes_um3, contrasts
        float32 (n,); a contrast may be nan.
    """

    centres: NDArray[np.float32]
    volumes_um3: NDArray[np.float32]
    contrasts: NDArray[np.float32]


@dataclass(frozen=True)
class VolumeSet(StoredImages[VolumeInfo]):
    """Many volumes.

    Attributes
    ----------
    nuclei
        One table per volume.
    flow_power
        float64 (volumes, 3): mean square of the flow (z, y, x) inside nuclei; nan without nuclei.
    read
        Gives the voxels of a volume, from memory or mapped from a file; called from several threads.
    """

    nuclei: tuple[NucleusTable, ...]
    flow_power: NDArray[np.float64]
    read: Callable[[int], VolumeArrays]

    @cached_property
    def faint_contrast(self) -> float:
        """Contrast below which a nucleus is one of the faintest fifth; -inf without known contrasts."""
        known = np.concatenate([table.contrasts for table in self.nuclei] or [np.empty(0, np.float32)])
        known = known[np.isfinite(known)]
        return float(np.quantile(known, _FAINT_QUANTILE)) if len(known) else -np.inf

    @property
    def flow_variances(self) -> tuple[float, float, float]:
        """Mean square of the flow along (z, y, x) over all nuclei; y and x are alike under rotation."""
        counts = np.array([table.volumes_um3.sum() for table in self.nuclei], dtype=np.float64)
        known = np.isfinite(self.flow_power).all(axis=1) & (counts > 0)
        if not known.any():
            return 1 / 3, 1 / 3, 1 / 3
        z, y, x = (float(v) for v in np.average(self.flow_power[known], axis=0, weights=counts[known]))
        return max(z, 1e-3), max((y + x) / 2, 1e-3), max((y + x) / 2, 1e-3)


def measure_flow_power(
    flows: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]
) -> tuple[float, ...]:
    """Mean square of the flow along (z, y, x) inside nuclei; nan without nuclei."""
    inside = labels > 0
    if not inside.any():
        return (float("nan"),) * 3
    return tuple(float(np.square(part[inside], dtype=np.float64).mean()) for part in flows)


def stack_volumes(
    infos: Sequence[VolumeInfo],
    images: Sequence[NDArray[np.generic]],
    labels: Sequence[NDArray[np.integer[Any]]],
    flows: Sequence[NDArray[np.floating[Any]]],
    nuclei: Sequence[NucleusTable],
) -> VolumeSet:
    """Pack volumes given as arrays: images and labels (Z, Y, X), flows (3, Z, Y, X)."""
    stored = [quantise_image(image) for image in images]
    arrays = [
        VolumeArrays(
            np.ascontiguousarray(pixels),
            compact_type(volume_labels),
            quantise_flows(volume_flows),
        )
        for (pixels, _, _), volume_labels, volume_flows in zip(stored, labels, flows, strict=True)
    ]
    return VolumeSet(
        infos=tuple(infos),
        nuclei=tuple(nuclei),
        step=np.array([step for _, step, _ in stored]),
        offset=np.array([offset for _, _, offset in stored]),
        flow_power=np.array(
            [measure_flow_power(f, ls) for f, ls in zip(flows, labels, strict=True)], dtype=np.float64
        ).reshape(-1, 3),
        read=arrays.__getitem__,
    )


def compact_type(labels: NDArray[np.integer[Any]]) -> NDArray[np.unsignedinteger[Any]]:
    """Store labels as uint16 where they fit, else as uint32."""
    dtype = np.uint16 if int(labels.max(initial=0)) < 2**16 else np.uint32
    return np.ascontiguousarray(labels, dtype=dtype)
