"""Labelled images in compact types: what planes and volumes have in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

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
