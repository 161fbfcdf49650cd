"""Changing how a patch of a volume looks: what `crop_appearance` does to crops of planes, in 3D.

A nucleus is dimmed in all its planes alike, light falls along z, and the blur is wider along z than across.

Compiled filters of small images, in place.

Dimming of single nuclei, with the shot noise that dimming takes away put back.

Faint nuclei are missed, and brightness changed for a whole image teaches nothing, since prediction normalises
it away. Only a nucleus dimmed against its neighbours is new. Scaling an image's noise with its light would
teach that smooth means faint; so the noise of the crop is measured, and what is missing is added.

Random changes of how a crop or a patch looks: dimmed nuclei, depth, blur, resolution, noise, brightness.

Intensities are normalised (0 is background, about 1 the brightest nuclei). Prediction normalises whole
frames robustly, so what only a change *relative* to the other nuclei of a frame can teach is taught by
dimming nucleus by nucleus; the shot noise that dimming takes away is put back, or the network would
learn that smooth means faint.

Here is what crops and patches share: what is drawn, and the changes pixel by pixel. `crop_appearance` and
`patch_appearance` do the changes, each along its axes.

Changing how a crop of a plane looks: planes xz and yz have z along their rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.config.sections import AugmentParams
from nuclei3d.training.crops import CropPlan, Stream
from nuclei3d.training.samples import PlaneInfo

Image = NDArray[np.float32]


@njit(cache=True, nogil=True)
def blur(image: Image, sigma_y: float, sigma_x: float) -> None:
    """Blur with a Gaussian in place, mirrored at the edges (cut at 3 sigma)."""
    height, width = image.shape
    if sigma_y > 0.0:
        reach = math.ceil(3.0 * sigma_y)
        kernel = np.empty(2 * reach + 1, np.float32)
        for k in range(2 * reach + 1):
            kernel[k] = math.exp(-0.5 * ((k - reach) / sigma_y) ** 2)
        kernel /= kernel.sum()
        source = image.copy()
        for i in range(height):
            for j in range(width):
                image[i, j] = 0.0
            for k in range(2 * reach + 1):
                row = i + k - reach
                if row < 0:
                    row = -row - 1
                if row >= height:
                    row = 2 * height - 1 - row
                row = min(max(row, 0), height - 1)
                weight = kernel[k]
                for j in range(width):
                    image[i, j] += weight * source[row, j]
    if sigma_x > 0.0:
        reach = math.ceil(3.0 * sigma_x)
        kernel = np.empty(2 * reach + 1, np.float32)
        for k in range(2 * reach + 1):
            kernel[k] = math.exp(-0.5 * ((k - reach) / sigma_x) ** 2)
        kernel /= kernel.sum()
        padded = np.empty(width + 2 * reach, np.float32)
        for i in range(height):
            for j in range(width + 2 * reach):
                column = j - reach
                if column < 0:
                    column = -column - 1
                if column >= width:
                    column = 2 * width - 1 - column
                padded[j] = image[i, min(max(column, 0), width - 1)]
            for j in range(width):
                total = np.float32(0.0)
                for k in range(2 * reach + 1):
                    total += kernel[k] * padded[j + k]
                image[i, j] = total


@njit(cache=True, nogil=True)
def coarsen(image: Image, factor_y: float, factor_x: float) -> None:
    """Average over blocks of about factor_y x factor_x pixels and interpolate back linearly, in place."""
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
        y = min(max((i + 0.5) * rows / height - 0.5, 0.0), rows - 1.0)
        y0 = min(int(y), max(rows - 2, 0))
        y1 = min(y0 + 1, rows - 1)
        fy = y - y0
        for j in range(width):
            x = min(max((j + 0.5) * columns / width - 0.5, 0.0), columns - 1.0)
            x0 = min(int(x), max(columns - 2, 0))
            x1 = min(x0 + 1, columns - 1)
            fx = x - x0
            upper = small[y0, x0] * (1 - fx) + small[y0, x1] * fx
            lower = small[y1, x0] * (1 - fx) + small[y1, x1] * fx
            image[i, j] = upper * (1 - fy) + lower * fy


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


class Appearance(NamedTuple):
    """How one crop is changed; the neutral values change nothing.

    Attributes
    ----------
    dims
        Whether nuclei are dimmed.
    attenuation
        Optical depth; negative: light comes from the other side.
    blur
        Sigma across z in pixels; along z it is `AugmentParams.blur_anisotropy` times as wide.
    coarse
        Pixels averaged into one and interpolated back, along z where that is seen (1: none).
    noise
        Standard deviation of the shot noise at intensity 1; the read noise is half of it.
    gain, offset, gamma
        ``sign(I) |I|**gamma * gain + offset``.
    """

    dims: bool = False
    attenuation: float = 0.0
    blur: float = 0.0
    coarse: float = 1.0
    noise: float = 0.0
    gain: float = 1.0
    offset: float = 0.0
    gamma: float = 1.0


class Fields(NamedTuple):
    """Random numbers by label and by pixel; None where an appearance needs none.

    Attributes
    ----------
    dimming
        Light kept per label (`draw_dimming`), and a standard normal field of the crop's shape, which is
        changed in use.
    noise
        A standard normal field of the crop's shape.
    """

    dimming: tuple[NDArray[np.float32], NDArray[np.float32]] | None
    noise: NDArray[np.float32] | None


def draw_appearance(augment: AugmentParams, rng: np.random.Generator) -> Appearance:
    """Draw the changes of one crop.

    Parameters
    ----------
    augment
        Strengths; 0 is off.
    rng
        Its numbers are used in fixed places: one setting does not shift the draws of another.
    """
    draw = rng.random(8)
    coarse = 1.0
    if draw[1] < augment.low_resolution:
        coarse = 1.0 + (augment.low_resolution_factor - 1.0) * draw[2]
    return Appearance(
        dims=augment.dim_share > 0,
        attenuation=augment.depth_attenuation * (2 * draw[3] - 1),
        blur=augment.blur_px * draw[0],
        coarse=coarse,
        noise=augment.noise * draw[4],
        gain=1.0 + augment.brightness_linear * (2 * draw[5] - 1),
        offset=0.1 * augment.brightness_linear * (2 * draw[6] - 1),
        gamma=math.exp(augment.brightness_gamma * (2 * draw[7] - 1)),
    )


def draw_fields(
    appearance: Appearance,
    augment: AugmentParams,
    largest_label: int,
    shape: Sequence[int],
    generator_of: Callable[[int], np.random.Generator],
) -> Fields:
    """Draw the fields of a crop of this shape; `generator_of` gives the generator of a `Stream`."""
    dimming = noise = None
    if appearance.dims:
        keeps = draw_dimming(augment, largest_label, generator_of(Stream.DIMMING))
        dimming = keeps, generator_of(Stream.DIMMING_NOISE).standard_normal(shape, dtype=np.float32)
    if appearance.noise:
        noise = generator_of(Stream.NOISE).standard_normal(shape, dtype=np.float32)
    return Fields(dimming, noise)


def finish(image: Image, appearance: Appearance, noise: Image | None) -> None:
    """Do the last changes of an image, in place: noise and brightness."""
    if noise is not None:
        add_noise(image, noise, appearance.noise)
    if appearance.gain != 1 or appearance.offset != 0 or appearance.gamma != 1:
        brighten(image, appearance.gain, appearance.offset, appearance.gamma)


@njit(cache=True, nogil=True)
def attenuate(image: Image, attenuation: float, middle: float, per_row: float, per_column: float) -> None:
    """Let light fall by ``exp(-|attenuation| * depth)``; a negative one counts depth from the other side."""
    height, width = image.shape
    for i in range(height):
        for j in range(width):
            depth = middle + per_row * (i + 0.5 - height / 2) + per_column * (j + 0.5 - width / 2)
            depth = min(max(depth, 0.0), 1.0)
            if attenuation < 0 and (per_row != 0.0 or per_column != 0.0):
                depth = 1.0 - depth
            image[i, j] *= math.exp(-abs(attenuation) * depth)


@njit(cache=True, nogil=True)
def add_noise(image: Image, noise: Image, strength: float) -> None:
    """Add Poisson-Gaussian noise of variance ``strength**2 * (I + 1/4)``."""
    height, width = image.shape
    for i in range(height):
        for j in range(width):
            image[i, j] += strength * math.sqrt(max(image[i, j], 0.0) + 0.25) * noise[i, j]


@njit(cache=True, nogil=True)
def brighten(image: Image, gain: float, offset: float, gamma: float) -> None:
    """Change brightness: ``sign(I) |I|**gamma * gain + offset``."""
    height, width = image.shape
    for i in range(height):
        for j in range(width):
            value = image[i, j]
            if gamma != 1.0:
                value = math.copysign(abs(value) ** gamma, value)
            image[i, j] = value * gain + offset


def change_crop(
    image: Image,
    labels: NDArray[np.uint16],
    appearance: Appearance,
    augment: AugmentParams,
    fields: Fields,
    *,
    plan: CropPlan,
    info: PlaneInfo,
    radius_px: int,
) -> None:
    """Change a crop in place.

    Parameters
    ----------
    image
        float32 (P, P), normalised.
    labels
        uint16 (P, P).
    appearance
        What to do.
    augment
        Widths that are no draws: `psf_px`, `blur_anisotropy`, `dim_noise`.
    fields
        Drawn for this appearance.
    plan, info
        Where the crop was cut, and from which plane.
    radius_px
        Half-width of the window in which the local background is averaged, about a nucleus' diameter.
    """
    if fields.dimming is not None:
        dim_nuclei(image, labels, *fields.dimming, radius_px, augment.psf_px, augment.dim_noise)
    if appearance.attenuation:
        attenuate(image, appearance.attenuation, *depth_of_crop(plan, info.view, info.height))
    if appearance.blur:
        blur(image, *blur_sigmas(appearance.blur, augment.blur_anisotropy, info.view, plan.turned))
    if appearance.coarse > 1:
        coarsen(image, *coarse_factors(appearance.coarse, info.view, plan.turned))
    finish(image, appearance, fields.noise)


def depth_of_crop(plan: CropPlan, view: str, height: int) -> tuple[float, float, float]:
    """Give the relative depth at a crop's middle, and its change per row and column of the crop.

    Planes xz and yz have their depth along their rows, 0 to 1 from the first to the last; an xy plane lies
    at one depth, for which 1 is taken (its attenuation is drawn as a whole).
    """
    if view == "xy":
        return 1.0, 0.0, 0.0
    return plan.centre_y / height, plan.q00 / plan.scale / height, plan.q01 / plan.scale / height


def blur_sigmas(sigma: float, anisotropy: float, view: str, turned: bool) -> tuple[float, float]:
    """Give the sigmas along (y, x) of the crop: wider along z, whose direction turns with the plane."""
    along = sigma if view == "xy" else sigma * anisotropy
    return (sigma, along) if turned else (along, sigma)


def coarse_factors(factor: float, view: str, turned: bool) -> tuple[float, float]:
    """Give the factors along (y, x) of the crop: of both in an xy plane, otherwise of z alone."""
    across = factor if view == "xy" else 1.0
    return (across, factor) if turned else (factor, across)


Patch = NDArray[np.float32]


def change_patch(
    image: Patch,
    labels: NDArray[np.uint32],
    appearance: Appearance,
    augment: AugmentParams,
    fields: Fields,
    *,
    anisotropy: float,
    depth: tuple[float, float],
    radius_px: int,
) -> None:
    """Change a patch in place; parameters not listed as those of `crop_appearance.change_crop`.

    Parameters
    ----------
    image
        float32 (Z, Y, X), normalised, contiguous.
    labels
        uint32 (Z, Y, X).
    anisotropy
        Pixels of the plane per distance of planes.
    depth
        (at the patch's middle, per plane): relative depth in the volume, 0 to 1 over the volume.
    """
    # the planes one below the other, and each plane as one row: what filters of planes need to work along z
    tall = image.reshape(-1, image.shape[2])
    rows = image.reshape(len(image), -1)
    wider = augment.blur_anisotropy
    if fields.dimming is not None:
        sigmas = augment.psf_px * wider / anisotropy, augment.psf_px
        _dim_nuclei(image, labels, *fields.dimming, radius_px, *sigmas, augment.dim_noise)
    if appearance.attenuation:
        attenuate(rows, appearance.attenuation, *depth, 0.0)
    if appearance.blur:
        _blur(image, rows, appearance.blur * wider / anisotropy, appearance.blur)
    if appearance.coarse > max(1.0, anisotropy):
        coarsen(rows, appearance.coarse / anisotropy, 1.0)
    finish(tall, appearance, None if fields.noise is None else fields.noise.reshape(tall.shape))


@njit(cache=True, nogil=True)
def _blur(volume: Patch, rows: Patch, sigma_z: float, sigma_xy: float) -> None:
    """Blur in place; `rows` is the same memory with a row per plane."""
    blur(rows, sigma_z, 0.0)
    for plane in volume:
        blur(plane, sigma_xy, sigma_xy)


def _dim_nuclei(
    image: Patch,
    labels: NDArray[np.uint32],
    keeps: NDArray[np.float32],
    noise: Patch,
    radius_px: int,
    sigma_z: float,
    sigma_xy: float,
    noise_strength: float,
) -> None:
    """Dim nuclei plane by plane, each by the same share in all its planes and in the blur around it."""
    lost = np.zeros(image.shape, np.float32)
    rows = lost.reshape(len(lost), -1)
    if not lost_light(labels.reshape(rows.shape), keeps, rows):
        return
    _blur(lost, rows, sigma_z, sigma_xy)
    for plane in range(len(image)):
        if lost[plane].any():
            dim_by(image[plane], labels[plane], lost[plane], noise[plane], radius_px, noise_strength)
