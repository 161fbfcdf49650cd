"""Labelled planes in compact types, 6 bytes a pixel, ready to cut crops from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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


@dataclass(frozen=True)
class PlaneSet:
    """Many planes, one after the other in three flat arrays (in memory, or mapped from a file).

    Attributes
    ----------
    infos
        One per plane.
    pixels
        uint16 (N,): intensities as stored.
    labels
        uint16 (N,): 0 is background, 1..n per plane.
    flows
        int8 (N, 2): (dy, dx) times `FLOW_STEPS`.
    step, offset
        float64 (planes,): intensity = stored * step + offset, in the units of the image.
    """

    infos: tuple[PlaneInfo, ...]
    pixels: NDArray[np.uint16]
    labels: NDArray[np.uint16]
    flows: NDArray[np.int8]
    step: NDArray[np.float64]
    offset: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.infos)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Position of each plane's first pixel, and of the end: int64 (planes + 1,)."""
        return np.concatenate([[0], np.cumsum([info.pixels for info in self.infos], dtype=np.int64)])

    @cached_property
    def gains(self) -> NDArray[np.float32]:
        """float32 (planes, 2): normalised intensity = stored * gains[:, 0] + gains[:, 1]."""
        low = np.array([info.norm_low for info in self.infos])
        span = np.array([info.norm_high for info in self.infos]) - low
        return np.asarray(np.stack([self.step / span, (self.offset - low) / span], axis=1), np.float32)

    def plane_labels(self, plane: int) -> NDArray[np.uint16]:
        """Labels (Y, X) of one plane."""
        info = self.infos[plane]
        return self.labels[self.starts[plane] : self.starts[plane + 1]].reshape(info.height, info.width)

    def plane_image(self, plane: int) -> NDArray[np.float32]:
        """Normalised image (Y, X) of one plane."""
        info = self.infos[plane]
        stored = self.pixels[self.starts[plane] : self.starts[plane + 1]].reshape(info.height, info.width)
        return np.asarray(stored.astype(np.float32) * self.gains[plane, 0] + self.gains[plane, 1])


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
    empty = np.zeros(0, np.uint16)
    return PlaneSet(
        infos=tuple(infos),
        pixels=np.concatenate([empty, *(s[0].ravel() for s in stored)]),
        labels=np.concatenate([empty, *(plane.astype(np.uint16).ravel() for plane in labels)]),
        flows=np.concatenate(
            [np.zeros((0, 2), np.int8), *(quantise_flows(flow).reshape(2, -1).T for flow in flows)]
        ),
        step=np.array([s[1] for s in stored]),
        offset=np.array([s[2] for s in stored]),
    )
