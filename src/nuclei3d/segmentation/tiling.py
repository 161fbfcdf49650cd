"""Where a network's tiles lie: over a plane, a volume, or a part of an image.

A network that halves a plane three times pools pixels in squares of eight, counted from the corner of what it
is shown. Shown a part that starts two pixels off that lattice, it pools other pixels together: its logits
differ from those of the whole by .06 to .25 (root mean square, two networks), everywhere and however wide the
margin, against .003 to .03 for a part on the lattice, where the rest is Cellpose's style vector. Tiles and
boxes therefore start on the lattice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

POOLING = 8
"""Pixels along an axis that Cellpose's CNN pools into one. A multiple of 16 would make no pixel cheaper
(measured on AVX2) and small volumes a sixth dearer."""

TILE_OVERLAP = 64
_TILE_RIM = 16
"""Pixels at a cut side of a tile that are not used where another tile has them: they lack surroundings."""

_SIGMAS = 8.0
"""A patch is this many sigmas of its Gaussian weight wide (nnU-Net)."""

_NEAR = 0.15
"""Pixels off the lattice that do not matter."""

_LEAST_REACH = 4
"""Voxels before a part among which the nearest to the lattice is chosen, however large they are."""


class Tiling:
    """Equal tiles that cover a box, start on the network's lattice, and are blended by weights.

    Parameters
    ----------
    size, overlap
        Of a tile along each axis; neighbours overlap by so much at least, but half a tile at most.
    multiple
        Pixels along each axis that the network pools into one.
    profile
        Gives the weight of a tile along an axis from its size and from whether another tile lies before and
        behind it; of any scale.

    Attributes
    ----------
    boxes
        Of all tiles, cut at the end of the box.
    """

    def __init__(
        self,
        box: Sequence[slice],
        size: Sequence[int],
        overlap: Sequence[float],
        multiple: Sequence[int],
        profile: Callable[[int, bool, bool], NDArray[np.floating[Any]]],
    ) -> None:
        self.size = tuple(size)
        self._weights: list[dict[int, NDArray[np.float32]]] = []
        parts = []
        for whole, width, over, factor in zip(box, size, overlap, multiple, strict=True):
            starts = _spread(whole.stop - whole.start, width, min(over, width / 2), factor)
            profiles = [profile(width, start > 0, start < starts[-1]) for start in starts]
            total = np.zeros(starts[-1] + width, profiles[0].dtype)
            for start, each in zip(starts, profiles, strict=True):
                total[start : start + width] += each
            self._weights.append(
                {
                    whole.start + start: (each / total[start : start + width]).astype(np.float32)
                    for start, each in zip(starts, profiles, strict=True)
                }
            )
            parts.append([slice(start, min(start + width, whole.stop)) for start in self._weights[-1]])
        self.boxes = list(itertools.product(*parts))

    def weight(self, box: Sequence[slice]) -> NDArray[np.float32]:
        """Share of a tile in each of its pixels; over all tiles the shares of a pixel add up to 1."""
        along = [
            weights[part.start][: part.stop - part.start]
            for weights, part in zip(self._weights, box, strict=True)
        ]
        return np.asarray(reduce(np.multiply.outer, along))


def _spread(length: int, size: int, overlap: float, multiple: int) -> list[int]:
    """Place tiles over an axis; all overlap by about the same, and the last may reach beyond the end."""
    if length <= size:
        return [0]
    last = padded(length - size, multiple)
    count = 1 + math.ceil(last / max(multiple, (size - overlap) // multiple * multiple))
    starts = (np.linspace(0, last, count) / multiple).round().astype(int) * multiple
    return [int(start) for start in starts]


def tile_plane(shape: Sequence[int], largest: int) -> Tiling:
    """Cover a padded plane by as few equal tiles as possible, overlapping by at least `TILE_OVERLAP`."""
    overlap = TILE_OVERLAP + POOLING
    sizes = []
    for length in shape:
        count = max(1, -(-(length - overlap) // (largest - overlap)))
        sizes.append(min(length, largest, padded(-(-(length + (count - 1) * overlap) // count))))
    box = [slice(0, length) for length in shape]
    return Tiling(box, sizes, (overlap, overlap), (POOLING, POOLING), _ramp)


def _ramp(size: int, cut_before: bool, cut_behind: bool) -> NDArray[np.float32]:
    inside = np.maximum(np.arange(size, dtype=np.float32) + 1 - _TILE_RIM, 0)
    ramp = np.full(size, float(TILE_OVERLAP - 2 * _TILE_RIM), np.float32)
    if cut_before:
        ramp = np.minimum(ramp, inside)
    if cut_behind:
        ramp = np.minimum(ramp, inside[::-1])
    return ramp


def tile_volume(
    box: Sequence[slice],
    multiple: Sequence[int],
    trained: Sequence[int],
    overlap: Sequence[float],
    max_voxels: int,
) -> Tiling:
    """Cover a box of a volume by patches of at most `max_voxels`.

    They are no smaller than the patches that the network was `trained` on, where the box is as large;
    `multiple` and `overlap` as in `Tiling`.
    """
    sizes = [padded(part.stop - part.start, factor) for part, factor in zip(box, multiple, strict=True)]
    while math.prod(sizes) > max_voxels:
        # the axis that is longest against the patches of the training is cut first
        spare = [size / least if size > least else 0.0 for size, least in zip(sizes, trained, strict=True)]
        longest = int(np.argmax(spare))
        if not spare[longest]:
            break
        half = padded(math.ceil((sizes[longest] + overlap[longest]) / 2), multiple[longest])
        smaller = max(half, trained[longest])
        sizes[longest] = smaller if smaller < sizes[longest] else trained[longest]
    return Tiling(box, sizes, overlap, multiple, _bell)


def _bell(size: int, cut_before: bool, cut_behind: bool) -> NDArray[np.float64]:
    place = (np.arange(size) + 0.5) / size - 0.5
    return np.asarray(np.exp(-0.5 * (_SIGMAS * place) ** 2))


def padded(size: int, multiple: int = POOLING) -> int:
    """Round up to the next multiple."""
    return -(-size // multiple) * multiple


def grow_to_lattice(
    part: slice, size: int, pixels: float | Sequence[float] = 1.0, pooling: int = POOLING
) -> slice:
    """Grow a part of an axis to one that starts on the network's lattice, and is sampled as the whole.

    The start lies within 0.15 pixels of the lattice, or as near as two squares allow; if the stop is not that
    of the axis, the part is nearly a whole number of pixels long.

    Parameters
    ----------
    size
        Of the whole axis.
    pixels
        Pixels of the network per voxel, along this axis; of several networks, if several are to see it: the
        one that is worst off counts.
    pooling
        Pixels that the network pools into one.
    """
    start, stop = int(part.start), int(part.stop)
    scales = np.atleast_1d(np.asarray(pixels, np.float64))
    if start > 0:
        reach = max(int(np.ceil(2 * pooling / scales.min())), _LEAST_REACH)
        starts = np.arange(start, max(start - reach, 0) - 1, -1)
        start = _first_near(starts, np.outer(scales, starts) / pooling, _NEAR / pooling)
    if stop < size:
        stops = np.arange(stop, min(stop + POOLING, size) + 1)
        stop = _first_near(stops, np.outer(scales, stops - start), _NEAR)
    return slice(start, stop)


def _first_near(candidates: NDArray[np.int_], values: NDArray[np.float64], tolerance: float) -> int:
    """Give the first candidate whose values (a row per network) are nearly whole, or else the nearest."""
    off = np.abs(values - np.rint(values)).max(axis=0)
    near = np.flatnonzero(off <= tolerance)
    return int(candidates[near[0] if len(near) else int(np.argmin(off))])
