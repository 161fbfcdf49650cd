"""Patches that cover a box of a volume, and the Gaussian weights with which they are blended."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.volume_network import VolumeSpec

Box = tuple[slice, slice, slice]

_SIGMAS = 8.0
"""A patch is this many sigmas of its Gaussian weight wide (nnU-Net)."""


@dataclass(frozen=True)
class _Axis:
    """Equal patches over one axis of the box, the same overlap between all; the last may reach beyond it."""

    start: int
    stop: int
    starts: tuple[int, ...]
    size: int

    @cached_property
    def weights(self) -> dict[int, NDArray[np.float32]]:
        """Share of each patch in each of its voxels; over all patches the shares of a voxel add up to 1."""
        place = (np.arange(self.size) + 0.5) / self.size - 0.5
        bell = np.exp(-0.5 * (_SIGMAS * place) ** 2)
        total = np.zeros(self.starts[-1] + self.size)
        for start in self.starts:
            total[start : start + self.size] += bell
        return {start: (bell / total[start : start + self.size]).astype(np.float32) for start in self.starts}


class PatchTiling:
    """Patches that cover a box of a volume.

    Parameters
    ----------
    box
        What is to be covered.
    spec
        Of the network: patches are multiples of its pooling, and at least as large as those it was trained on
        where the box is.
    overlap
        Voxels (z, y, x) by which neighbours overlap at least; about a nucleus.
    max_voxels
        Of a patch.

    Attributes
    ----------
    box
        As given.
    places
        Of all patches, cut at the box.
    """

    def __init__(self, box: Box, spec: VolumeSpec, overlap: Sequence[float], max_voxels: int) -> None:
        self.box = box
        multiple, trained = spec.architecture.multiple, spec.patch
        lengths = [part.stop - part.start for part in box]
        sizes = [padded(length, factor) for length, factor in zip(lengths, multiple, strict=True)]
        while math.prod(sizes) > max_voxels:
            # the axis that is longest against the patches of the training is cut first
            spare = [
                size / least if size > least else 0.0 for size, least in zip(sizes, trained, strict=True)
            ]
            longest = int(np.argmax(spare))
            if not spare[longest]:
                break
            half = padded(math.ceil((sizes[longest] + overlap[longest]) / 2), multiple[longest])
            smaller = max(half, trained[longest])
            if smaller >= sizes[longest]:
                smaller = trained[longest]
            sizes[longest] = smaller
        self._axes = [
            _cover(part.start, part.stop, size, min(over, size / 2), factor)
            for part, size, over, factor in zip(box, sizes, overlap, multiple, strict=True)
        ]
        self.size = tuple(sizes)
        self.places = [
            self._place(starts) for starts in itertools.product(*(axis.starts for axis in self._axes))
        ]

    def _place(self, starts: Sequence[int]) -> Box:
        z, y, x = (
            slice(axis.start + start, min(axis.start + start + axis.size, axis.stop))
            for axis, start in zip(self._axes, starts, strict=True)
        )
        return z, y, x

    def weight(self, place: Box) -> NDArray[np.float32]:
        """Share (z, y, x) of a patch in each of its voxels."""
        z, y, x = (
            axis.weights[part.start - axis.start][: part.stop - part.start]
            for axis, part in zip(self._axes, place, strict=True)
        )
        return np.asarray(z[:, None, None] * y[:, None] * x)


def _cover(start: int, stop: int, size: int, overlap: float, multiple: int) -> _Axis:
    """Place patches that start on the network's lattice; it pools `multiple` voxels into one."""
    length = stop - start
    if length <= size:
        return _Axis(start, stop, (0,), size)
    last = padded(length - size, multiple)
    count = 1 + math.ceil(last / max(multiple, (size - overlap) // multiple * multiple))
    starts = (np.linspace(0, last, count) / multiple).round().astype(int) * multiple
    return _Axis(start, stop, tuple(int(first) for first in starts), size)


def padded(length: int, multiple: int) -> int:
    """Round up to the next multiple."""
    return -(-length // multiple) * multiple
