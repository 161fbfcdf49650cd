"""Dimming of single nuclei, with the shot noise that dimming takes away put back.

Faint nuclei are missed, and brightness changed for a whole image teaches nothing, since prediction normalises
it away. Only a nucleus dimmed against its neighbours is new. Scaling an image's noise with its light would
teach that smooth means faint; so the noise of the crop is measured, and what is missing is added.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.config.train import AugmentParams
from nuclei3d.core.training.filters import Image, blur


def draw_dimming(augment: AugmentParams, largest_label: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw how much light each label keeps: float32 (largest_label + 1,), 1 for the undimmed."""
    draw = rng.random((2, largest_label + 1))
    keeps = np.exp(math.log(augment.dim_min) * draw[1])
    keeps[draw[0] >= augment.dim_share] = 1.0
    keeps[0] = 1.0
    return np.asarray(keeps, np.float32)


@njit(cache=True, nogil=True)
def dim_nuclei(
    image: Image,
    labels: NDArray[np.unsignedinteger[Any]],
    keeps: NDArray[np.float32],
    noise: Image,
    radius_px: int,
    psf_px: float,
    noise_strength: float,
) -> None:
    """Dim nuclei against their local background and put the lost shot noise back, in place.

    ``I' = B + (I - B) * (1 - (1 - s) * M)`` with the local background B, the light kept s and the nucleus'
    mask M blurred by the PSF. Noise, correlated as that of the crop's background is, is then added until its
    variance is that of an image taken at I'. `noise` is changed.
    """
    lost = np.zeros(image.shape, np.float32)
    if not lost_light(labels, keeps, lost):
        return
    blur(lost, psf_px, psf_px)
    dim_by(image, labels, lost, noise, radius_px, noise_strength)


@njit(cache=True, nogil=True)
def lost_light(labels: NDArray[np.unsignedinteger[Any]], keeps: NDArray[np.float32], lost: Image) -> bool:
    """Write the share of light that each pixel's label loses into `lost`; say whether any does."""
    height, width = labels.shape
    any_lost = False
    for i in range(height):
        for j in range(width):
            lost[i, j] = 1.0 - keeps[labels[i, j]]
            if lost[i, j] > 0.0:
                any_lost = True
    return any_lost


@njit(cache=True, nogil=True)
def dim_by(
    image: Image,
    labels: NDArray[np.unsignedinteger[Any]],
    lost: Image,
    noise: Image,
    radius_px: int,
    noise_strength: float,
) -> None:
    """Take the shares `lost` of the light above the background; see `dim_nuclei`."""
    height, width = image.shape
    background = local_background(image, labels, radius_px)
    correlation_y = noise_correlation(image, labels, False)
    correlation_x = noise_correlation(image, labels, True)
    variance, level, gain = noise_of_crop(image, labels, correlation_y, correlation_x)
    correlate_noise(noise, correlation_y, correlation_x)
    for i in range(height):
        for j in range(width):
            if lost[i, j] <= 0.0:
                continue
            kept = 1.0 - lost[i, j]
            before = image[i, j]
            after = background[i, j] + (before - background[i, j]) * kept
            had = max(variance + gain * (before - level), 0.25 * variance)
            wanted = max(variance + gain * (after - level), 0.25 * variance)
            missing = wanted - kept * kept * had
            if missing > 0.0:
                after += noise_strength * math.sqrt(missing) * noise[i, j]
            image[i, j] = after


@njit(cache=True, nogil=True)
def local_background(image: Image, labels: NDArray[np.unsignedinteger[Any]], radius_px: int) -> Image:
    """Average the unlabelled pixels within a square window; where there is none, all of the crop's."""
    height, width = image.shape
    sums = np.zeros((height + 1, width + 1))
    counts = np.zeros((height + 1, width + 1), np.int64)
    for i in range(height):
        row_sum = 0.0
        row_count = 0
        for j in range(width):
            if labels[i, j] == 0:
                row_sum += image[i, j]
                row_count += 1
            sums[i + 1, j + 1] = sums[i, j + 1] + row_sum
            counts[i + 1, j + 1] = counts[i, j + 1] + row_count
    everywhere = 0.0
    if counts[height, width] > 0:
        everywhere = sums[height, width] / counts[height, width]
    background = np.empty((height, width), np.float32)
    for i in range(height):
        top = max(i - radius_px, 0)
        bottom = min(i + radius_px + 1, height)
        for j in range(width):
            left = max(j - radius_px, 0)
            right = min(j + radius_px + 1, width)
            count = counts[bottom, right] - counts[top, right] - counts[bottom, left] + counts[top, left]
            if count > 0:
                total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
                background[i, j] = total / count
            else:
                background[i, j] = everywhere
    return background


@njit(cache=True, nogil=True)
def _lag_ratio(image: Image, labels: NDArray[np.unsignedinteger[Any]], along_rows: bool) -> float:
    """Median square difference of neighbours over that of next but one neighbours, in the background."""
    height, width = image.shape
    step_y = 0 if along_rows else 1
    step_x = 1 if along_rows else 0
    first = np.empty(height * width, np.float32)
    second = np.empty(height * width, np.float32)
    count = 0
    for i in range(height - 2 * step_y):
        for j in range(width - 2 * step_x):
            if labels[i, j] > 0 or labels[i + 2 * step_y, j + 2 * step_x] > 0:
                continue
            here = image[i, j]
            if here == 0.0:
                continue  # padding beyond the plane's edge
            first[count] = abs(image[i + step_y, j + step_x] - here)
            second[count] = abs(image[i + 2 * step_y, j + 2 * step_x] - here)
            count += 1
    if count < 20:
        return 1.0
    far = np.median(second[:count])
    if far <= 0.0:
        return 1.0
    return float((np.median(first[:count]) / far) ** 2)


@njit(cache=True, nogil=True)
def noise_correlation(image: Image, labels: NDArray[np.unsignedinteger[Any]], along_rows: bool) -> float:
    """Estimate the correlation r of the noise of neighbouring pixels, along rows or columns.

    Interpolation (of z in xz and yz planes, of rescaled crops) correlates noise. For a Gaussian correlation,
    with r**4 between next but one neighbours, differences of neighbours have 1 / (1 + r + r**2 + r**3) of
    the variance of the differences between next but one neighbours; slow structure hardly enters either.
    """
    ratio = _lag_ratio(image, labels, along_rows)
    low = 0.0
    high = 0.95
    for _ in range(20):
        middle = 0.5 * (low + high)
        if 1.0 / (1.0 + middle + middle**2 + middle**3) > ratio:
            low = middle
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def noise_of_crop(
    image: Image, labels: NDArray[np.unsignedinteger[Any]], correlation_y: float, correlation_x: float
) -> tuple[float, float, float]:
    """Estimate the noise's variance as a function of intensity.

    The residual of a pixel against the mean of its two neighbours, along the axis of the lesser correlation,
    has a known share of the pixel's variance (3/2 without correlation); its median absolute value ignores
    edges and speckles of texture.

    Returns
    -------
    variance, level, gain
        Of the noise at intensity I: ``variance + gain * (I - level)``; variance is that of the background,
        whose mean is level.
    """
    height, width = image.shape
    residuals = np.empty((2, height * width), np.float32)
    counts = np.zeros(2, np.int64)
    sums = np.zeros(2)
    step_y = 1 if correlation_y < correlation_x else 0
    step_x = 1 - step_y
    correlation = min(correlation_y, correlation_x)
    for i in range(1, height - 1):
        for j in range(1, width - 1):
            kind = 1 if labels[i, j] > 0 else 0
            around = image[i - step_y, j - step_x] + image[i + step_y, j + step_x]
            if image[i, j] == 0.0 and around == 0.0:
                continue  # padding beyond the plane's edge
            residuals[kind, counts[kind]] = abs(image[i, j] - 0.5 * around)
            counts[kind] += 1
            sums[kind] += image[i, j]
    if counts[0] < 20:
        return 0.0, 0.0, 0.0
    share = max(1.5 - 2 * correlation + 0.5 * correlation**4, 0.05)
    level = sums[0] / counts[0]
    variance = (1.4826 * np.median(residuals[0, : counts[0]])) ** 2 / share
    if counts[1] < 20:
        return variance, level, 0.0
    inside = (1.4826 * np.median(residuals[1, : counts[1]])) ** 2 / share
    rise = sums[1] / counts[1] - level
    if rise <= 0.0 or inside <= variance:
        return variance, level, 0.0
    return variance, level, (inside - variance) / rise


@njit(cache=True, nogil=True)
def _lag_sum(sigma: float, lag: int) -> float:
    """Autocorrelation of the kernel of `blur`: the covariance that it gives to white noise of variance 1."""
    if sigma <= 0.0:
        return 1.0 if lag == 0 else 0.0
    reach = math.ceil(3.0 * sigma)
    total = 0.0
    result = 0.0
    for k in range(-reach, reach + 1):
        weight = math.exp(-0.5 * (k / sigma) ** 2)
        total += weight
        if k + lag <= reach:
            result += weight * math.exp(-0.5 * ((k + lag) / sigma) ** 2)
    return result / total**2


@njit(cache=True, nogil=True)
def _sigma_of_correlation(correlation: float) -> float:
    """Find the sigma for which blurred white noise has this correlation between neighbours."""
    if correlation < 0.02:
        return 0.0
    low = 0.1
    high = 4.0
    for _ in range(25):
        middle = 0.5 * (low + high)
        if _lag_sum(middle, 1) / _lag_sum(middle, 0) < correlation:
            low = middle
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def correlate_noise(noise: Image, correlation_y: float, correlation_x: float) -> None:
    """Give white noise a Gaussian correlation with these values between neighbours; its variance stays 1."""
    sigma_y = _sigma_of_correlation(correlation_y)
    sigma_x = _sigma_of_correlation(correlation_x)
    blur(noise, sigma_y, sigma_x)
    factor = math.sqrt(_lag_sum(sigma_y, 0) * _lag_sum(sigma_x, 0))
    factor = 1.0 / factor
    if factor != 1.0:
        height, width = noise.shape
        for i in range(height):
            for j in range(width):
                noise[i, j] *= factor
