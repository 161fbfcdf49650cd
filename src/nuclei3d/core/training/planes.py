"""Labelled planes in compact types, 6 bytes a pixel, ready to cut crops from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.training.stored_images import ImageInfo, StoredImages, quantise_flows, quantise_image

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
        int8 (Y, X, 2): (dy, dx) times `nuclei3d.core.training.stored_images.FLOW_STEPS`.
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
