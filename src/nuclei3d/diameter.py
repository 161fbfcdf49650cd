"""The diameter of the nuclei in an image, estimated without a network.

Blobs in scale space (Lindeberg, IJCV 1998): minus the Laplacian of a Gaussian of standard deviation s, times
s squared, is largest in the middle of a ball of diameter 2 sqrt(3) s, over space and over s. Only blocks of
an image are looked at, those with most signal, so that its size does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d, laplace, maximum_filter, median_filter

from nuclei3d.grid import isotropic_shape, resize_linear
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import IntensityRange, measure_range, sampled_planes

Box = tuple[slice, slice, slice]

_BLOCKS = 3
_BLOCK_VOXELS = 8_000_000
_GRID_VOXELS = 4_000_000
_STEP = 2 ** (1 / 3)
"""Ratio of the diameters that are tried."""
_LEAST_VOXELS = 4.0
_SIGMA_PX = 1.5
"""Of the Gaussian, on the grid on which a diameter is tried."""
_PLATEAU = 0.5
"""Share of the range at which intensities are cut off: texture inside of nuclei does not count as blobs."""
_LEAST_RESPONSE = 0.2
"""Noise alone, of which the range is at least ten standard deviations, reaches .15."""
_LEAST_SHARE = 0.5
"""Of the response of the strongest tenth; weaker blobs are no nuclei."""
_MOST_BLOBS = 2000
_SIGNAL = 0.25
_FALL_OFF = 1.2
"""Nuclei are brightest in the middle, and people outline them where they end: on BBBC050 and on simulated
embryos a labelled nucleus is so many times as wide as its blob."""
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


def estimate_diameter(
    image: NDArray[Any], voxel_size: VoxelSize, intensity: IntensityRange | None = None
) -> DiameterEstimate | None:
    """Estimate the diameter of the nuclei in a volume (z, y, x), any real dtype; None if nothing stands out.

    `intensity` is its range if that is known.
    """
    planes = image[:: sampled_planes(image.shape).step]
    intensity = intensity or measure_range(planes, sampled=True)
    return estimate_from_blocks(image.__getitem__, image.shape, planes, voxel_size, intensity)


def estimate_from_blocks(
    read_block: Callable[[Box], NDArray[Any]],
    shape: Sequence[int],
    planes: NDArray[Any],
    voxel_size: VoxelSize,
    intensity: IntensityRange,
) -> DiameterEstimate | None:
    """Estimate the diameter of the nuclei in a volume that is read in blocks.

    Parameters
    ----------
    read_block
        Gives the voxels of a box (z, y, x).
    shape
        Of the volume, (z, y, x).
    planes
        Those of its planes that `sampled_planes` names.
    """
    found = []
    for box in _choose_blocks(shape, planes, voxel_size, intensity):
        part = intensity.of_part(*box[1:])
        block = part.apply(part.clean(read_block(box))[0])
        found.append(_find_blobs(np.clip(block, 0, _PLATEAU), voxel_size))
    return _summarise(np.concatenate(found))


def _choose_blocks(
    shape: Sequence[int], planes: NDArray[Any], voxel_size: VoxelSize, intensity: IntensityRange
) -> list[Box]:
    """Choose the blocks with most signal; the whole of a small volume is one."""
    depth, height, width = _block_shape(shape, voxel_size)
    stride = sampled_planes(shape).step
    slabs = range(0, len(planes), max(1, math.ceil(depth / stride)))
    ranked: list[tuple[float, Box]] = []
    for slab in slabs:
        z = min(max(0, slab * stride - (depth // 2 if stride > depth else 0)), shape[0] - depth)
        seen = planes[slab : slab + slabs.step]
        bright = intensity.apply(intensity.clean(seen)[0]) > _SIGNAL
        for y in _starts(shape[1], height):
            for x in _starts(shape[2], width):
                share = float(bright[:, y : y + height, x : x + width].mean())
                ranked.append((share, np.s_[z : z + depth, y : y + height, x : x + width]))
    ranked.sort(key=lambda entry: -entry[0])
    return [box for _, box in ranked[:_BLOCKS]]


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


def _starts(length: int, side: int) -> list[int]:
    """Lay sides over a length, the last against its end."""
    return [*range(0, length - side, side), length - side]


def _find_blobs(block: NDArray[np.float32], voxel_size: VoxelSize) -> NDArray[np.float64]:
    """Find blobs that do not overlap, a row each: response and diameter in um."""
    extent = np.array(block.shape) * voxel_size.zyx
    sigma = 1 / (2 * math.sqrt(3))  # of a diameter of 1
    least = max(
        _LEAST_VOXELS * voxel_size.x,
        1.2 * voxel_size.z,
        _SIGMA_PX / sigma * (extent.prod() / _GRID_VOXELS) ** (1 / 3),
    )
    diameters, strongest, candidates = [], [], []
    diameter = least
    while diameter < extent[1:].min() / 2:
        edge = max(sigma * diameter / _SIGMA_PX, voxel_size.x)
        grid = resize_linear(block, isotropic_shape(block.shape, voxel_size, edge))
        width = sigma * diameter / edge
        response = -(width**2) * laplace(gaussian_filter(grid, width, mode="nearest"), mode="nearest")
        strongest.append(maximum_filter(response, 3))
        candidates.append(np.argwhere((response == strongest[-1]) & (response > _LEAST_RESPONSE)))
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
