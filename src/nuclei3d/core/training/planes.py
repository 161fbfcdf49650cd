"""Labelled planes in compact types, 6 bytes a pixel, ready to cut crops from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

VIEWS = ("xy", "xz", "yz")
FLOW_STEPS = 127
"""A flow component of 1 is stored as this int8; the rounding error of a direction is below half a degree."""


@dataclass(frozen=True)
class PlaneInfo:
    """Where a plane came from and what is on it (one row of manifest.csv)."""

    file: str
    embryo: str
    frame: str
    view: str
    index: int
    nuclei: int
    min_contrast: float
    norm_low: float
    norm_high: float
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
        int8 (Y, X, 2): (dy, dx) times `FLOW_STEPS`.
    """

    pixels: NDArray[np.uint16]
    labels: NDArray[np.uint16]
    flows: NDArray[np.int8]


@dataclass(frozen=True)
class PlaneSet:
    """Many planes, wherever their pixels lie.

    Attributes
    ----------
    infos
        One per plane.
    step, offset
        float64 (planes,): intensity = stored * step + offset, in the units of the image.
    read
        Gives the pixels of a plane, from memory or from a file; called from several threads.
    """

    infos: tuple[PlaneInfo, ...]
    step: NDArray[np.float64]
    offset: NDArray[np.float64]
    read: Callable[[int], PlaneArrays]

    def __len__(self) -> int:
        return len(self.infos)

    @cached_property
    def gains(self) -> NDArray[np.float32]:
        """float32 (planes, 2): normalised intensity = stored * gains[:, 0] + gains[:, 1]."""
        low = np.array([info.norm_low for info in self.infos])
        span = np.array([info.norm_high for info in self.infos]) - low
        return np.asarray(np.stack([self.step / span, (self.offset - low) / span], axis=1), np.float32)

    def plane_image(self, plane: int) -> NDArray[np.float32]:
        """Normalised image (Y, X) of one plane."""
        stored = self.read(plane).pixels.astype(np.float32)
        return np.asarray(stored * self.gains[plane, 0] + self.gains[plane, 1])


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
    """Store flows (..., components up to 1 in size) as int8."""
    return np.asarray(np.rint(np.clip(flows, -1, 1) * FLOW_STEPS), np.int8)


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
            np.ascontiguousarray(np.moveaxis(quantise_flows(plane_flows), 0, -1)),
        )
        for (pixels, _, _), plane_labels, plane_flows in zip(stored, labels, flows, strict=True)
    ]
    return PlaneSet(
        infos=tuple(infos),
        step=np.array([step for _, step, _ in stored]),
        offset=np.array([offset for _, _, offset in stored]),
        read=arrays.__getitem__,
    )
