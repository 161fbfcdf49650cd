"""Frames as pictures: three maximum projections side by side and the silhouettes of the nuclei in them.

A picture is laid out as the views of the report: xy, to its right yz, below it xz; its pixels are square.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.grid import find_boxes, resize_linear
from nuclei3d.images.voxel_size import VoxelSize

Box = tuple[slice, slice, slice]
Polygon = NDArray[np.float32]
_GAP_PX = 4
_TOLERANCE_PX = 0.4
# Per view the axes that run down and across, and the axis along which it looks (0 z, 1 y, 2 x).
_VIEWS = ((1, 2, 0), (1, 0, 2), (0, 2, 1))


@dataclass(frozen=True)
class PictureGrid:
    """How a volume (z, y, x) lies in a picture; `px_um` is the edge of a pixel."""

    shape: tuple[int, int, int]
    voxel_size: VoxelSize
    px_um: float

    @classmethod
    def fitting(cls, shape: tuple[int, int, int], voxel_size: VoxelSize, pixels: float) -> PictureGrid:
        """Choose pixels as small as those of the image, or as small as so many in the picture allow."""
        z, y, x = (n * edge for n, edge in zip(shape, voxel_size.zyx, strict=True))
        smallest = float(np.sqrt((x + z) * (y + z) / pixels))
        return cls(shape, voxel_size, max(smallest, min(voxel_size.y, voxel_size.x)))

    @property
    def size(self) -> tuple[int, int, int]:
        """The volume in pixels of the picture along (z, y, x)."""
        z, y, x = (
            max(1, round(n * edge / self.px_um))
            for n, edge in zip(self.shape, self.voxel_size.zyx, strict=True)
        )
        return z, y, x

    @property
    def coarse(self) -> tuple[int, int, int]:
        """The shape (z, y, x) on which silhouettes are taken: in pixels, but no finer than the volume."""
        z, y, x = (min(n, px) for n, px in zip(self.shape, self.size, strict=True))
        return z, y, x

    @property
    def corners(self) -> tuple[tuple[int, int], ...]:
        """Top and left of the views xy, yz, xz."""
        _, height, width = self.size
        return (0, 0), (0, width + _GAP_PX), (height + _GAP_PX, 0)


def project_image(grid: PictureGrid, blocks: Iterable[tuple[Box, NDArray[Any]]]) -> NDArray[np.uint8]:
    """Draw the maximum projections of an image that comes in blocks (box, voxels); fill counts for nothing.

    Grey values are square roots between the percentiles 1 and 99.8 of the projections.
    """
    maxima = [
        np.full((grid.shape[down], grid.shape[across]), -np.inf, np.float32) for down, across, _ in _VIEWS
    ]
    for box, voxels in blocks:
        for maximum, (down, across, along) in zip(maxima, _VIEWS, strict=True):
            seen = voxels.max(axis=along)
            if voxels.dtype.kind == "f" and not np.isfinite(seen).all():
                seen = np.where(np.isfinite(voxels), voxels, -np.inf).max(axis=along)
            part = maximum[box[down], box[across]]
            np.maximum(part, seen if down < across else seen.T, out=part)
    known = np.concatenate([maximum[np.isfinite(maximum)] for maximum in maxima])
    low, high = np.percentile(known, (1, 99.8)) if known.size else (0.0, 1.0)
    (height, width), depth = grid.size[1:], grid.size[0]
    picture = np.zeros((height + _GAP_PX + depth, width + _GAP_PX + depth), np.uint8)
    for maximum, (down, across, _), (top, left) in zip(maxima, _VIEWS, grid.corners, strict=True):
        shown = resize_linear(np.maximum(maximum, low), (grid.size[down], grid.size[across]))
        share = np.clip((shown - low) / max(high - low, 1e-12), 0, 1)
        rows, columns = share.shape
        picture[top : top + rows, left : left + columns] = np.round(255 * np.sqrt(share))
    return picture


def coarse_labels(grid: PictureGrid, blocks: Iterable[tuple[Box, NDArray[np.uint32]]]) -> NDArray[np.uint32]:
    """Thin labels that come in blocks to the grid's coarse shape: each voxel takes the one at its centre."""
    coarse = np.zeros(grid.coarse, np.uint32)
    centres = [
        (2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(grid.shape, grid.coarse, strict=True)
    ]
    for box, labels in blocks:
        bounds = [np.searchsorted(at, (part.start, part.stop)) for at, part in zip(centres, box, strict=True)]
        chosen = [at[a:b] - part.start for at, (a, b), part in zip(centres, bounds, box, strict=True)]
        coarse[tuple(slice(a, b) for a, b in bounds)] = labels[np.ix_(*chosen)]
    return coarse


def silhouettes(grid: PictureGrid, coarse: NDArray[np.uint32], labels: Sequence[int]) -> list[list[Polygon]]:
    """Trace each of these labels as seen along z, x and y, in the pixels of the picture.

    Gives per label three polygons (n, 2), x before y; one without points where a label is not there.
    """
    boxes = find_boxes(coarse)
    scale = [px / n for px, n in zip(grid.size, grid.coarse, strict=True)]
    traced = []
    for label in labels:
        if label >= len(boxes.voxels) or not boxes.voxels[label]:
            traced.append([np.zeros((0, 2), np.float32)] * 3)
            continue
        first, last = boxes.boxes[label].reshape(3, 2).T
        inside = coarse[tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))] == label
        polygons = []
        for (down, across, along), (top, left) in zip(_VIEWS, grid.corners, strict=True):
            seen = inside.any(axis=along)
            outline = _trace(seen if down < across else seen.T)
            place = (outline + np.take(first, (down, across))) * np.take(scale, (down, across)) + (top, left)
            polygons.append(np.asarray(place[:, ::-1], np.float32))
        traced.append(polygons)
    return traced


def _trace(silhouette: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Trace the longest outline of a silhouette as (n, 2) of y and x, the first pixel covering 0 to 1."""
    from cv2 import approxPolyDP
    from skimage.measure import find_contours

    padded = np.pad(silhouette, 1).astype(np.float32)
    contours = find_contours(padded, 0.5, fully_connected="high")  # type: ignore[no-untyped-call]
    longest = max(contours, key=len)[:-1].astype(np.float32)
    return np.asarray(approxPolyDP(longest, _TOLERANCE_PX, closed=True)[:, 0] - 0.5, np.float64)
