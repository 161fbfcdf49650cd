"""Intensities of a volume: the range that becomes 0 to 1, noise, and what is no image at all (fill, debris).

A network sees ``(I - low) / (high - low)``. That range is measured once per frame, on the raw voxels before
any resampling, so that a plane, a tile or a block is normalised exactly as the whole frame is, in training as
in prediction. Percentiles alone blow the noise of a nearly empty frame up to full contrast, and a network
then answers with dozens of false nuclei; the range is therefore never less than a multiple of the noise.
Registration, fusion of views, deskewing and drift correction leave a constant around the image: were it
counted, the range would start far below the camera's offset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOWER_PERCENTILE = 1.0
UPPER_PERCENTILE = 99.8
#: Default least range in standard deviations of the noise; pure noise alone spans about 5 between the
#: default percentiles, frames with visible nuclei 20 and more (BBBC050: 21 to 125).
NOISE_FLOOR = 10.0

_MAX_SAMPLES = 16_000_000
_FILL_SHARE = 2e-3
_FILL_SIGMAS = 6.0
_MOSTLY_FILL = 0.9
_DEBRIS_RATIO = 12.0
_DEBRIS_PERCENTILE = 98.8


@dataclass(frozen=True)
class IntensityRange:
    """The intensities that become 0 and 1.

    All are in the image's own units.

    Attributes
    ----------
    noise
        Standard deviation of the noise (0 where none was found).
    fill
        Voxels up to this intensity, and those that are not finite, are no image: what registration, fusion
        and deskewing leave around it. None where the image has no such constant far below its background.
    ceiling
        What is brighter (debris, hot pixels) is taken for this; None: nothing is.
    """

    low: float
    high: float
    noise: float = 0.0
    fill: float | None = None
    ceiling: float | None = None

    def apply(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Normalise an image (or part of one) of any shape; values are not clipped but at the ceiling."""
        result = image.astype(np.float32)
        if self.ceiling is not None:
            np.minimum(result, np.float32(self.ceiling), out=result)
        result -= np.float32(self.low)
        result *= np.float32(1.0 / (self.high - self.low))
        return result

    def fill_mask(self, image: NDArray[Any]) -> NDArray[np.bool_] | None:
        """Say which voxels of an image (or part of one) are fill; None: none is."""
        mask: NDArray[np.bool_] | None = None
        if np.issubdtype(image.dtype, np.floating):
            mask = ~np.isfinite(image)
        if self.fill is not None:
            dark = np.asarray(image <= self.fill)
            mask = dark if mask is None else mask | dark
        return mask if mask is not None and mask.any() else None

    def without_fill(self, image: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Put the intensity of background where an image (or part of one) is fill.

        A plane of a volume (z, y, x) that is nearly all fill and lies between others is interpolated from
        the nearest of them, so that nuclei go on through it.

        The very image is given if it has no fill; and the mask where no nucleus can be, fill that was not
        interpolated, or None if there is none.
        """
        mask = self.fill_mask(image)
        if mask is None:
            return image, None
        whole = np.issubdtype(image.dtype, np.integer)
        filled = np.where(mask, np.asarray(round(self.low) if whole else self.low, image.dtype), image)
        if image.ndim != 3:
            return filled, mask
        there = np.flatnonzero(mask.mean(axis=(1, 2)) <= _MOSTLY_FILL)
        for z in set(range(len(image))) - set(there.tolist()):
            after = int(np.searchsorted(there, z))
            if 0 < after < len(there):
                first, last = int(there[after - 1]), int(there[after])
                share = (z - first) / (last - first)
                between = filled[first] * (1 - share) + filled[last] * share
                filled[z] = np.rint(between) if whole else between
                mask[z] = mask[first] & mask[last]
        return filled, mask


def measure_range(
    image: NDArray[Any],
    lower_percentile: float = LOWER_PERCENTILE,
    upper_percentile: float = UPPER_PERCENTILE,
    noise_floor: float = NOISE_FLOOR,
    *,
    sampled: bool = False,
) -> IntensityRange:
    """Measure the robust intensity range of a whole volume.

    Fill is left out. Where the brightest 1.2 % reach twelve times as high above the background as what is
    below them, and that in turn stands out of the noise, they are debris, and left out of the upper
    percentile (on BBBC050 the ratio is below 11). A constant image has the range (value, value + 1).

    Parameters
    ----------
    image
        Volume (z, y, x) or plane (y, x), any real dtype; what is not finite is fill. Of more than 16 million
        voxels every k-th plane is used.
    lower_percentile, upper_percentile
        They become 0 and 1, but the range is at least `noise_floor` standard deviations of the noise.
    sampled
        The image consists of the `sampled_planes` of a larger volume already.
    """
    step = 1 if sampled or image.ndim != 3 else sampled_planes(image.shape).step
    values = image[::step]
    if not _is_counted(values):
        values = values.astype(np.float32)
    fill = _find_fill(values)
    noise = measure_noise(values, fill)
    seen = values if fill is None and _all_finite(values) else values[_image_mask(values, fill)]
    if not seen.size:
        return IntensityRange(low=0.0, high=1.0, fill=fill)
    low, high, bulk = _percentiles(seen, (lower_percentile, upper_percentile, _DEBRIS_PERCENTILE))
    ceiling = None
    if bulk - low > noise_floor * noise > 0 and high - low > _DEBRIS_RATIO * (bulk - low):
        ceiling = low + _DEBRIS_RATIO * (bulk - low)
        (high,) = _percentiles(seen[seen <= ceiling], (upper_percentile,))
    high = max(high, low + noise_floor * noise)
    if not high > low:
        # More than 99.8 % of the voxels are equal: whatever differs is still to be seen.
        high = float(seen.max())
    if not high > low:
        high = low + 1.0
    return IntensityRange(low=low, high=high, noise=noise, fill=fill, ceiling=ceiling)


def _all_finite(values: NDArray[Any]) -> bool:
    return _is_counted(values) or bool(np.isfinite(values).all())


def _image_mask(values: NDArray[Any], fill: float | None) -> NDArray[np.bool_]:
    """Say which values are of the image and not fill."""
    finite: NDArray[np.bool_] = np.isfinite(values)
    return finite if fill is None else finite & (values > fill)


def _find_fill(values: NDArray[Any]) -> float | None:
    """Find the intensity up to which voxels are fill.

    The lowest intensity is fill if it is that of many voxels in runs (a camera's noise leaves no two
    neighbours alike over long) and lies far below the rest. The limit lies between, so that values in
    between, from interpolation at the edge of the image, are fill as well.
    """
    finite = values if _all_finite(values) else values[np.isfinite(values)]
    if not finite.size:
        return None
    lowest = finite.min()
    equal = values == lowest
    if equal.mean() < _FILL_SHARE:
        return None
    in_runs = np.zeros_like(equal)
    for axis in (-1, -2):
        pair = np.swapaxes(equal, axis, -1)
        pair = pair[..., 1:] & pair[..., :-1]
        target = np.swapaxes(in_runs, axis, -1)
        target[..., 1:] |= pair
        target[..., :-1] |= pair
    if in_runs.sum() < 0.5 * equal.sum():
        return None
    rest = finite[finite > lowest]
    if not rest.size:
        return None
    noise = measure_noise(values, float(lowest))
    (background,) = _percentiles(rest, (5.0,))
    limit = background - _FILL_SIGMAS * noise
    return float(limit) if lowest < limit and noise > 0 else None


def sampled_planes(shape: Sequence[int]) -> range:
    """Say which planes of a volume (z, y, x) `measure_range` looks at.

    Who has them alone, because the volume does not fit into memory, gets the range of the whole.
    """
    step = max(1, math.ceil(math.prod(shape) / _MAX_SAMPLES))
    return range(0, shape[0], step)


def measure_noise(image: NDArray[Any], fill: float | None = None) -> float:
    """Estimate the standard deviation of pixel noise from differences between neighbours in x.

    The median absolute difference ignores edges as long as they fill less than half of the image, and is
    that of the background where most of the image is background. Voxels that are not finite, or of an
    intensity up to `fill`, are left out. It is in the image's units, and 0 for an image one voxel wide.
    """
    if image.shape[-1] < 2:
        return 0.0
    difference = np.diff(image.astype(np.int32 if _is_counted(image) else np.float32, copy=False), axis=-1)
    np.abs(difference, out=difference)
    if fill is not None or not _all_finite(image):
        inside = _image_mask(image, fill)
        difference = difference[inside[..., 1:] & inside[..., :-1]]
        if not difference.size:
            return 0.0
    (median,) = _percentiles(difference, (50.0,))
    # 1.4826: median absolute deviation to standard deviation; the difference has twice the variance.
    return median * 1.4826 / math.sqrt(2.0)


def _is_counted(image: NDArray[Any]) -> bool:
    """Say whether values can be counted one by one, as a camera's can."""
    return image.dtype in (np.uint8, np.uint16)


def _percentiles(values: NDArray[Any], wanted: Sequence[float]) -> list[float]:
    """Give percentiles as `numpy.percentile` does; of non-negative integers ten times faster, by counting."""
    if not np.issubdtype(values.dtype, np.integer):
        return [float(value) for value in np.percentile(values, wanted)]
    below = np.cumsum(np.bincount(values.ravel()))
    found = []
    for percentile in wanted:
        rank = percentile / 100 * (values.size - 1)
        first, second = np.searchsorted(below, [math.floor(rank), math.ceil(rank)], side="right")
        found.append(float(first + (second - first) * (rank - math.floor(rank))))
    return found
