"""Random changes of how a crop looks: dimmed nuclei, depth, blur, resolution, noise, brightness.

Intensities are normalised (0 is background, about 1 the brightest nuclei). Prediction normalises whole
frames robustly, so what only a change *relative* to the other nuclei of a frame can teach is taught by
dimming nucleus by nucleus. Scaling an image's noise with its light would teach that smooth means faint; so
the noise of the crop is measured, and the shot noise that dimming takes away is put back.

Crops are (Z, Y, X), those of planes have depth 1, and every change acts along the axes of the crop: light
falls along the embryo's z, blur is wider and resolution lower along it, wherever it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.config.sections import AugmentParams
from nuclei3d.training.crops import CropGrid, CropPlan, Stream, interpolate
from nuclei3d.training.samples import SampleInfo

Image = NDArray[np.float32]
Labels = NDArray[np.int32]
Triple = tuple[float, float, float]


class Appearance(NamedTuple):
    """How one crop is changed; the neutral values change nothing. Dimming is drawn nucleus by nucleus.

    `attenuation` is an optical depth (negative: light comes from the other side), `blur` the sigma across z
    in pixels (along z it is `AugmentParams.blur_anisotropy` times as wide), `coarse` the pixels averaged into
    one and interpolated back (1: none), `noise` the standard deviation of the shot noise at intensity 1, half
    of which is the read noise. Brightness becomes ``sign(I) |I|**gamma * gain + offset``.
    """

    attenuation: float = 0.0
    blur: float = 0.0
    coarse: float = 1.0
    noise: float = 0.0
    gain: float = 1.0
    offset: float = 0.0
    gamma: float = 1.0


def draw_appearance(augment: AugmentParams, rng: np.random.Generator) -> Appearance:
    """Draw the changes of one crop; each uses numbers in a fixed place, so none shifts those of another."""
    draw = rng.random(8)
    coarse = 1.0
    if draw[1] < augment.low_resolution:
        coarse = 1.0 + (augment.low_resolution_factor - 1.0) * draw[2]
    return Appearance(
        attenuation=augment.depth_attenuation * (2 * draw[3] - 1),
        blur=augment.blur_px * draw[0],
        coarse=coarse,
        noise=augment.noise * draw[4],
        gain=1.0 + augment.brightness_linear * (2 * draw[5] - 1),
        offset=0.1 * augment.brightness_linear * (2 * draw[6] - 1),
        gamma=math.exp(augment.brightness_gamma * (2 * draw[7] - 1)),
    )


def draw_dimming(augment: AugmentParams, largest_label: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw how much light each label keeps: float32 (largest_label + 1,), 1 for the undimmed."""
    draw = rng.random((2, largest_label + 1))
    keeps = np.exp(math.log(augment.dim_min) * draw[1])
    keeps[draw[0] >= augment.dim_share] = 1.0
    keeps[0] = 1.0
    return np.asarray(keeps, np.float32)


def change_crop(
    image: Image,
    labels: Labels,
    augment: AugmentParams,
    generator_of: Callable[[int], np.random.Generator],
    *,
    plan: CropPlan,
    info: SampleInfo,
    grid: CropGrid,
    largest_label: int,
) -> None:
    """Draw the changes of a crop and do them in place.

    `image` and `labels` are float32 and int32 (Z, Y, X), contiguous, the image normalised; `generator_of`
    gives the generator of a `nuclei3d.training.crops.Stream`; dimming is drawn up to `largest_label`.
    """
    appearance = draw_appearance(augment, generator_of(Stream.APPEARANCE))
    if augment.dim_share > 0:
        keeps = draw_dimming(augment, largest_label, generator_of(Stream.DIMMING))
        noise = generator_of(Stream.DIMMING_NOISE).standard_normal(image.shape, dtype=np.float32)
        psf_z = augment.psf_px * augment.blur_anisotropy / grid.anisotropy
        sigmas = psf_z, augment.psf_px, augment.psf_px
        # half-width of the window in which the local background is averaged
        radius_px = max(2, round(grid.diameter_px))
        dim_nuclei(image, labels, keeps, noise, radius_px, sigmas, augment.dim_noise)
    if appearance.attenuation:
        attenuate(image, appearance.attenuation, *depth_of_crop(plan, info))
    if appearance.blur:
        blur(image, blur_sigmas(appearance.blur, augment.blur_anisotropy, plan, info, grid))
    if appearance.coarse > 1:
        coarsen(image, coarse_factors(appearance.coarse, plan, info, grid))
    if appearance.noise:
        noise = generator_of(Stream.NOISE).standard_normal(image.shape, dtype=np.float32)
        add_noise(image, noise, appearance.noise)
    if appearance.gain != 1 or appearance.offset != 0 or appearance.gamma != 1:
        brighten(image, appearance.gain, appearance.offset, appearance.gamma)


def depth_of_crop(plan: CropPlan, info: SampleInfo) -> tuple[float, Triple]:
    """Give the relative depth at a crop's middle, 0 to 1 over the sample, and its change per voxel (z, y, x).

    An xy plane lies at one depth, for which 1 is taken (its attenuation is drawn as a whole).
    """
    if info.view == "xy":
        return 1.0, (0.0, 0.0, 0.0)
    length = info.shape[info.z_axis]
    if info.z_axis == 0:
        return plan.centre_z / length, (plan.flip_z / plan.scale_z / length, 0.0, 0.0)
    return plan.centre_y / length, (
        0.0,
        plan.q00 / plan.scale_y / length,
        plan.q01 / plan.scale_y / length,
    )


def blur_sigmas(sigma: float, anisotropy: float, plan: CropPlan, info: SampleInfo, grid: CropGrid) -> Triple:
    """Give the sigmas along (z, y, x) of the crop: `anisotropy` times wider along the embryo's z."""
    return _along_z(sigma * anisotropy / grid.anisotropy, sigma, plan, info)


def coarse_factors(factor: float, plan: CropPlan, info: SampleInfo, grid: CropGrid) -> Triple:
    """Give the factors along (z, y, x) of the crop: of y and x in an xy plane, otherwise of z alone."""
    if info.view == "xy":
        return 1.0, factor, factor
    return _along_z(factor / grid.anisotropy, 1.0, plan, info)


def _along_z(value: float, across: float, plan: CropPlan, info: SampleInfo) -> Triple:
    axis = plan.crop_axis(info.z_axis)
    z, y, x = (value if axis == each else across for each in range(3))
    return z, y, x


@njit(cache=True, nogil=True)
def dim_nuclei(
    image: Image,
    labels: Labels,
    keeps: NDArray[np.float32],
    noise: Image,
    radius_px: int,
    psf: Triple,
    noise_strength: float,
) -> None:
    """Dim nuclei against their local background and put the lost shot noise back, in place.

    ``I' = B + (I - B) * (1 - (1 - s) * M)`` with the local background B, the light kept s and the nucleus'
    mask M blurred by the PSF (sigmas z, y, x). Noise, correlated as that of the plane's background is, is
    then added until its variance is that of an image taken at I'. `noise` is changed.
    """
    lost = (1.0 - np.take(keeps, labels)).astype(np.float32)
    if not lost.any():
        return
    blur(lost, psf)
    for k in range(lost.shape[0]):
        if lost[k].any():
            _dim_plane(image[k], labels[k], lost[k], noise[k], radius_px, noise_strength)


@njit(cache=True, nogil=True)
def _dim_plane(
    image: Image,
    labels: Labels,
    lost: Image,
    noise: Image,
    radius_px: int,
    noise_strength: float,
) -> None:
    """Take the shares `lost` of the light above the background."""
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
def local_background(image: Image, labels: Labels, radius_px: int) -> Image:
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
def _lag_ratio(image: Image, labels: Labels, along_rows: bool) -> float:
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
def noise_correlation(image: Image, labels: Labels, along_rows: bool) -> float:
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
    image: Image, labels: Labels, correlation_y: float, correlation_x: float
) -> tuple[float, float, float]:
    """Estimate the noise's variance as a function of intensity I: ``variance + gain * (I - level)``.

    The residual of a pixel against the mean of its two neighbours, along the axis of the lesser correlation,
    has a known share of the pixel's variance (3/2 without correlation); its median absolute value ignores
    edges and speckles of texture. The variance is that of the background, whose mean is level.
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
    _blur_columns(noise, sigma_y)
    _blur_rows(noise, sigma_x)
    factor = 1.0 / math.sqrt(_lag_sum(sigma_y, 0) * _lag_sum(sigma_x, 0))
    if factor != 1.0:
        height, width = noise.shape
        for i in range(height):
            for j in range(width):
                noise[i, j] *= factor


@njit(cache=True, nogil=True)
def attenuate(image: Image, attenuation: float, middle: float, per_voxel: Triple) -> None:
    """Let light fall by ``exp(-|attenuation| * depth)``; a negative one counts depth from the other side."""
    size_z, size_y, size_x = image.shape
    per_z, per_y, per_x = per_voxel
    turned = attenuation < 0 and (per_z != 0.0 or per_y != 0.0 or per_x != 0.0)
    for k in range(size_z):
        for i in range(size_y):
            for j in range(size_x):
                depth = middle + per_z * (k + 0.5 - size_z / 2)
                depth = depth + per_y * (i + 0.5 - size_y / 2) + per_x * (j + 0.5 - size_x / 2)
                depth = min(max(depth, 0.0), 1.0)
                if turned:
                    depth = 1.0 - depth
                image[k, i, j] *= math.exp(-abs(attenuation) * depth)


@njit(cache=True, nogil=True)
def blur(image: Image, sigmas: Triple) -> None:
    """Blur with a Gaussian in place, mirrored at the edges, cut at 3 sigma; a single plane not along z."""
    depth, height, width = image.shape
    if depth > 1:
        _blur_columns(image.reshape((depth, height * width)), sigmas[0])
    for k in range(depth):
        _blur_columns(image[k], sigmas[1])
        _blur_rows(image[k], sigmas[2])


@njit(cache=True, nogil=True)
def _gaussian(sigma: float) -> NDArray[np.float32]:
    reach = math.ceil(3.0 * sigma)
    kernel = np.empty(2 * reach + 1, np.float32)
    for k in range(2 * reach + 1):
        kernel[k] = math.exp(-0.5 * ((k - reach) / sigma) ** 2)
    kernel /= kernel.sum()
    return kernel


@njit(cache=True, nogil=True)
def _mirrored(index: int, length: int) -> int:
    if index < 0:
        index = -index - 1
    if index >= length:
        index = 2 * length - 1 - index
    return min(max(index, 0), length - 1)


@njit(cache=True, nogil=True)
def _blur_columns(image: Image, sigma: float) -> None:
    if sigma <= 0.0:
        return
    height, width = image.shape
    kernel = _gaussian(sigma)
    reach = len(kernel) // 2
    source = image.copy()
    for i in range(height):
        for j in range(width):
            image[i, j] = 0.0
        for k in range(2 * reach + 1):
            row = _mirrored(i + k - reach, height)
            weight = kernel[k]
            for j in range(width):
                image[i, j] += weight * source[row, j]


@njit(cache=True, nogil=True)
def _blur_rows(image: Image, sigma: float) -> None:
    if sigma <= 0.0:
        return
    height, width = image.shape
    kernel = _gaussian(sigma)
    reach = len(kernel) // 2
    padded = np.empty(width + 2 * reach, np.float32)
    for i in range(height):
        for j in range(width + 2 * reach):
            padded[j] = image[i, _mirrored(j - reach, width)]
        for j in range(width):
            total = np.float32(0.0)
            for k in range(2 * reach + 1):
                total += kernel[k] * padded[j + k]
            image[i, j] = total


def coarsen(image: Image, factors: Triple) -> None:
    """Average over blocks of about so many voxels (z, y, x) and interpolate back linearly, in place."""
    if factors[0] > 1:
        # planes as rows: along z, what filters planes works on volumes
        _coarsen_plane(image.reshape(len(image), -1), factors[0], 1.0)
    if max(factors[1:]) > 1:
        for plane in image:
            _coarsen_plane(plane, factors[1], factors[2])


@njit(cache=True, nogil=True)
def _coarsen_plane(image: Image, factor_y: float, factor_x: float) -> None:
    height, width = image.shape
    rows = max(1, round(height / factor_y))
    columns = max(1, round(width / factor_x))
    small = np.zeros((rows, columns), np.float32)
    counts = np.zeros((rows, columns), np.float32)
    for i in range(height):
        row = (i * rows) // height
        for j in range(width):
            column = (j * columns) // width
            small[row, column] += image[i, j]
            counts[row, column] += 1.0
    small /= counts
    for i in range(height):
        y = (i + 0.5) * rows / height - 0.5
        for j in range(width):
            image[i, j] = interpolate(small, y, (j + 0.5) * columns / width - 0.5)


@njit(cache=True, nogil=True)
def add_noise(image: Image, noise: Image, strength: float) -> None:
    """Add Poisson-Gaussian noise of variance ``strength**2 * (I + 1/4)``."""
    image[:] = image + strength * np.sqrt(np.maximum(image, 0.0) + 0.25) * noise


@njit(cache=True, nogil=True)
def brighten(image: Image, gain: float, offset: float, gamma: float) -> None:
    """Change brightness: ``sign(I) |I|**gamma * gain + offset``."""
    if gamma != 1.0:
        image[:] = np.copysign(np.abs(image) ** gamma, image) * gain + offset
    else:
        image[:] = image * gain + offset
