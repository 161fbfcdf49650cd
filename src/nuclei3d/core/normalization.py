"""Intensity normalisation: one robust range for a whole volume, aware of the camera's noise.

A network sees ``(I - low) / (high - low)``. The range is measured once per frame, on the raw voxels before
any resampling, so that a plane, a tile or a block is normalised exactly as the whole frame is, in training as
in prediction. Percentiles alone blow the noise of a nearly empty frame up to full contrast, and a network
then answers with dozens of false nuclei; the range is therefore never less than a multiple of the noise.
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
NOISE_FLOOR = 10.0
"""Default least range in standard deviations of the noise; pure noise alone spans about 5 between the
default percentiles, frames with visible nuclei 20 and more (BBBC050: 21 to 125)."""

_MAX_SAMPLES = 16_000_000


@dataclass(frozen=True)
class IntensityRange:
    """The intensities that become 0 and 1.

    Attributes
    ----------
    low, high
        In the image's own units; ``high > low``.
    noise
        Standard deviation of the noise, in the image's own units (0 where none was found).
    """

    low: float
    high: float
    noise: float = 0.0

    def apply(self, image: NDArray[np.generic]) -> NDArray[np.float32]:
        """Normalise an image (or part of one) of any shape; values are not clipped."""
        result = image.astype(np.float32)
        result -= np.float32(self.low)
        result *= np.float32(1.0 / (self.high - self.low))
        return result


def measure_range(
    image: NDArray[np.generic],
    lower_percentile: float = LOWER_PERCENTILE,
    upper_percentile: float = UPPER_PERCENTILE,
    noise_floor: float = NOISE_FLOOR,
    *,
    sampled: bool = False,
) -> IntensityRange:
    """Measure the robust intensity range of a whole volume.

    Parameters
    ----------
    image
        Volume (z, y, x) or plane (y, x), any real dtype, finite. Of more than 16 million voxels every
        k-th plane is used.
    lower_percentile, upper_percentile
        Percentiles that become 0 and 1.
    noise_floor
        The range is at least this many standard deviations of the noise.
    sampled
        The image consists of the `sampled_planes` of a larger volume already.

    Returns
    -------
    IntensityRange
        A constant image has the range (value, value + 1): it becomes 0 everywhere.
    """
    step = 1 if sampled or image.ndim != 3 else sampled_planes(image.shape).step
    values = image[::step]
    if not _is_counted(values):
        values = values.astype(np.float32)
    low, high = _percentiles(values, (lower_percentile, upper_percentile))
    noise = measure_noise(values)
    high = max(high, low + noise_floor * noise)
    if not high > low:
        # More than 99.8 % of the voxels are equal: whatever differs is still to be seen.
        high = float(values.max())
    if not high > low:
        high = low + 1.0
    return IntensityRange(low=low, high=high, noise=noise)


def sampled_planes(shape: Sequence[int]) -> range:
    """Say which planes of a volume (z, y, x) `measure_range` looks at.

    Who has them alone, because the volume does not fit into memory, gets the range of the whole.
    """
    step = max(1, math.ceil(math.prod(shape) / _MAX_SAMPLES))
    return range(0, shape[0], step)


def measure_noise(image: NDArray[np.generic]) -> float:
    """Estimate the standard deviation of pixel noise from differences between neighbours in x.

    The median absolute difference ignores edges as long as they fill less than half of the image, and is
    that of the background where most of the image is background.

    Returns
    -------
    float
        Noise in the image's units; 0 for an image one voxel wide.
    """
    if image.shape[-1] < 2:
        return 0.0
    difference = np.diff(image.astype(np.int32 if _is_counted(image) else np.float32, copy=False), axis=-1)
    np.abs(difference, out=difference)
    (median,) = _percentiles(difference, (50.0,))
    # 1.4826: median absolute deviation to standard deviation; the difference has twice the variance.
    return median * 1.4826 / math.sqrt(2.0)


def _is_counted(image: NDArray[np.generic]) -> bool:
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
