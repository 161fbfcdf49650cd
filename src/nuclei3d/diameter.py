"""The diameter of the nuclei in an image, estimated without a network.

Blobs in scale space (Lindeberg, IJCV 1998): minus the Laplacian of a Gaussian of standard deviation s, times
s squared, is largest in the middle of a ball of diameter 2 sqrt(3) s, over space and over s. Only blocks of
an image are looked at, those with most signal, so that its size does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d, laplace, maximum_filter, median_filter

from nuclei3d.grid import isotropic_shape, resize_linear
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import (
    LOWER_PERCENTILE,
    UPPER_PERCENTILE,
    Box,
    IntensityRange,
    measure_boxes,
    sampled_boxes,
)

_BLOCKS = 3
_BLOCK_VOXELS = 6_000_000
_GRID_VOXELS = 3_000_000
_STEP = 2 ** (1 / 3)
"""Ratio of the diameters that are tried."""
_LEAST_VOXELS = 4.0
_SIGMA = 1 / (2 * math.sqrt(3))
"""Of the Gaussian that answers most to a ball of diameter 1."""
_SIGMA_PX = 1.5
"""Of the Gaussian, on the grid on which a diameter is tried."""
_FIRST_SIGMA_PX = 0.75
"""Of the one that takes out noise before intensities are cut off."""
_PLATEAU = 0.5
"""Share of the range at which intensities are cut off: texture inside of nuclei does not count as blobs."""
_LEAST_RESPONSE = 0.2
_LEAST_NOISE = 5.0
"""A response is at least so many standard deviations of that to noise."""
_LEAST_SHARE = 0.5
"""Of the response of the strongest tenth; weaker blobs are no nuclei."""
_MOST_BLOBS = 2000
_SIGNAL = 0.25
_SIGNAL_PX = 8
"""Means over squares of so many pixels tell where there is signal: noise alone is not."""
_FALL_OFF = 1.15
"""Nuclei are brightest in the middle, and people outline them where they end: on BBBC050 a labelled nucleus
is so many times as wide as its blob."""
_OWN_ERROR = 0.1
"""Relative error with any number of nuclei (BBBC050, simulated embryos: two frames of three are within)."""


@dataclass(frozen=True)
class DiameterEstimate:
    """The median diameter of the nuclei in um, its standard error, and the number of nuclei seen."""

    diameter_um: float
    error_um: float
    nuclei: int

    def __str__(self) -> str:
        return f"{self.diameter_um:.3g} +- {self.error_um:.2g} um ({self.nuclei} nuclei seen)"


def estimate_diameter(image: NDArray[Any], voxel_size: VoxelSize) -> DiameterEstimate | None:
    """Estimate the diameter of the nuclei in a volume (z, y, x), any dtype; None if nothing stands out."""
    boxes = sampled_boxes(image.shape)
    parts = [image[box] for box in boxes]
    intensity = measure_boxes(parts)
    chosen = choose_blocks(image.shape, boxes, parts, voxel_size, intensity)
    return estimate_from_blocks(
        [clean_block(image[box], box, intensity) for box in chosen], voxel_size, intensity
    )


def clean_block(block: NDArray[Any], box: Box, intensity: IntensityRange) -> NDArray[np.float32]:
    """Give a box of an image without fill, debris and uneven background, in the image's units."""
    return intensity.of_part(*box[1:]).clean(block)[0].astype(np.float32)


def estimate_from_blocks(
    blocks: Sequence[NDArray[np.float32]], voxel_size: VoxelSize, intensity: IntensityRange
) -> DiameterEstimate | None:
    """Estimate the diameter of the nuclei in an image from its blocks (z, y, x), equal in shape.

    What is bright is told by the blocks, once noise is smoothed out, and not by the range of the image, which
    is wide where it is noisy.
    """
    shape, edges = blocks[0].shape, voxel_size
    least = max(
        _LEAST_VOXELS * edges.x,
        1.2 * edges.z,
        _SIGMA_PX / _SIGMA * (math.prod(shape) * edges.volume_um3 / _GRID_VOXELS) ** (1 / 3),
    )
    finest = isotropic_shape(shape, edges, max(_SIGMA * least / _SIGMA_PX, edges.x))
    grids = [
        gaussian_filter(resize_linear(block, finest), _FIRST_SIGMA_PX, mode="nearest") for block in blocks
    ]
    low = min(float(np.percentile(grid, LOWER_PERCENTILE)) for grid in grids)
    high = max(float(np.percentile(grid, UPPER_PERCENTILE)) for grid in grids)
    if not high > low:
        return None
    extent = np.array(shape) * edges.zyx
    noise = intensity.noise * math.sqrt(edges.volume_um3) / (high - low)
    return _summarise(
        np.concatenate(
            [
                _find_blobs(np.clip((grid - low) / (high - low), 0, _PLATEAU), extent, least, noise)
                for grid in grids
            ]
        )
    )


def choose_blocks(
    shape: Sequence[int],
    boxes: Sequence[Box],
    parts: Sequence[NDArray[Any]],
    voxel_size: VoxelSize,
    intensity: IntensityRange,
) -> list[Box]:
    """Choose the blocks of a volume with most signal; the whole of a small volume is one.

    `parts` are what the volume holds in its `sampled_boxes`, `boxes`.
    """
    sides = _block_shape(shape, voxel_size)
    if sides == tuple(shape):
        return [(slice(0, sides[0]), slice(0, sides[1]), slice(0, sides[2]))]
    counts = [math.ceil(size / side) for size, side in zip(shape, sides, strict=True)]
    means, places = [], []
    for box, part in zip(boxes, parts, strict=True):
        clean = clean_block(part, box, intensity)
        coarse = resize_linear(
            clean, [part.shape[0], *(max(1, round(size / _SIGNAL_PX)) for size in part.shape[1:])]
        )
        means.append(coarse.ravel())
        # the block in which the middle of each square lies
        at = [
            ((np.arange(n) + 0.5) * size / n + side.start).astype(int) // edge
            for n, size, side, edge in zip(coarse.shape, part.shape, box, sides, strict=True)
        ]
        places.append(np.ravel_multi_index(np.meshgrid(*at, indexing="ij"), counts).ravel())
    mean, place = np.concatenate(means), np.concatenate(places)
    low, high = np.percentile(mean, (LOWER_PERCENTILE, UPPER_PERCENTILE))
    seen = np.bincount(place, minlength=math.prod(counts))
    bright = np.bincount(place, mean > low + _SIGNAL * (high - low), minlength=math.prod(counts))
    # of a block of which little was seen nothing is said
    share = np.where(seen > seen.max() / 10, bright / np.maximum(seen, 1), -1)
    chosen = []
    for number in np.argsort(-share, kind="stable")[:_BLOCKS]:
        if share[number] >= 0:
            starts = [
                min(i * edge, size - edge)
                for i, edge, size in zip(np.unravel_index(number, counts), sides, shape, strict=True)
            ]
            z, y, x = (
                slice(int(start), int(start) + edge) for start, edge in zip(starts, sides, strict=True)
            )
            chosen.append((z, y, x))
    return chosen


def _block_shape(shape: Sequence[int], voxel_size: VoxelSize) -> tuple[int, int, int]:
    """Give a box that is a cube in um, as far as the volume allows, of at most so many voxels."""
    sides, free, room = list(shape), [0, 1, 2], float(_BLOCK_VOXELS)
    while free and math.prod(shape) > _BLOCK_VOXELS:
        edge_um = (room * math.prod(voxel_size.zyx[axis] for axis in free)) ** (1 / len(free))
        short = [axis for axis in free if shape[axis] * voxel_size.zyx[axis] <= edge_um]
        if not short:
            for axis in free:
                sides[axis] = max(1, int(edge_um / voxel_size.zyx[axis]))
            break
        room /= math.prod(shape[axis] for axis in short)
        free = [axis for axis in free if axis not in short]
    return sides[0], sides[1], sides[2]


def _find_blobs(
    image: NDArray[np.float32], extent: NDArray[np.float64], least: float, noise: float
) -> NDArray[np.float64]:
    """Find blobs that do not overlap, a row each: response and diameter in um.

    `image`, from 0 to the plateau, is on the grid of the `least` diameter and `extent` um wide; `noise` is
    the standard deviation in voxels of 1 um3.
    """
    diameters, strongest, candidates = [], [], []
    voxel = extent[2] / image.shape[2]
    diameter, first_sigma = least, _FIRST_SIGMA_PX * voxel
    while diameter < extent[1:].min() / 2:
        sigma = _SIGMA * diameter
        edge = max(sigma / _SIGMA_PX, voxel)
        grid = resize_linear(image, [max(1, round(length / edge)) for length in extent])
        smooth = gaussian_filter(grid, math.sqrt(sigma**2 - first_sigma**2) / edge, mode="nearest")
        response = -((sigma / edge) ** 2) * laplace(smooth, mode="nearest")
        # the response to white noise has this standard deviation (Gaussian integrals)
        expected = noise * math.sqrt(15 / 32) * math.pi**-0.75 * sigma**-1.5
        strongest.append(maximum_filter(response, 3))
        bright = response > max(_LEAST_RESPONSE, _LEAST_NOISE * expected)
        candidates.append(np.argwhere((response == strongest[-1]) & bright))
        diameters.append(diameter)
        diameter *= _STEP
    rows: list[NDArray[np.float64]] = [np.empty((0, 5))]
    for i in range(1, len(diameters) - 1):
        place = (candidates[i] + 0.5) / strongest[i].shape
        finer, here, coarser = (
            each[tuple((place * each.shape).astype(int).T)] for each in strongest[i - 1 : i + 2]
        )
        # a parabola through three responses has its top between the diameters
        bend = finer - 2 * here + coarser
        top = np.clip(0.5 * (finer - coarser) / np.where(bend < 0, bend, -np.inf), -0.5, 0.5)
        row = np.column_stack([here, diameters[i] * _STEP**top, place * extent])
        rows.append(row[(here >= finer) & (here >= coarser)])
    found = np.concatenate(rows)
    found = found[np.argsort(-found[:, 0], kind="stable")][:_MOST_BLOBS]
    kept: list[int] = []
    for i, (_, diameter, *centre) in enumerate(found):
        others = found[kept]
        apart = np.linalg.norm(others[:, 2:] - centre, axis=1)
        if (apart > 0.5 * np.maximum(others[:, 1], diameter)).all():
            kept.append(i)
    return found[kept, :2]


def _summarise(blobs: NDArray[np.float64]) -> DiameterEstimate | None:
    """Give the median diameter of the strong blobs, weighted with response and diameter, and its error."""
    if not len(blobs):
        return None
    strong = np.sort(blobs[:, 0])[-(len(blobs) // 10 + 1) :].mean()
    response, diameter = blobs[blobs[:, 0] > _LEAST_SHARE * strong].T
    size, weight = np.log(diameter), response * diameter
    median = _weighted_median(size, weight)
    spread = 1.4826 * _weighted_median(np.abs(size - median), weight)
    # 1.25: the standard error of a median over that of a mean
    error = math.hypot(_OWN_ERROR, 1.25 * spread / math.sqrt(len(size)))
    diameter_um = _FALL_OFF * math.exp(median)
    return DiameterEstimate(diameter_um, error * diameter_um, len(size))


def smooth_over_time(times: Sequence[int], diameters_um: Sequence[float], wanted: int) -> NDArray[np.float64]:
    """Give a diameter for each of so many frames of a time-lapse from estimates at some of them.

    A running median over five estimates forgets those of a frame that says little (a metaphase has no round
    nucleus), a Gaussian over them takes out the rest; the logarithm is interpolated between.
    """
    logarithm = median_filter(np.log(np.asarray(diameters_um, float)), 5, mode="nearest")
    smooth = gaussian_filter1d(logarithm, 1.0, mode="nearest")
    interpolated: NDArray[np.float64] = np.exp(np.interp(np.arange(wanted), times, smooth))
    return interpolated


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    order = np.argsort(values)
    below = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(below, below[-1] / 2)])
