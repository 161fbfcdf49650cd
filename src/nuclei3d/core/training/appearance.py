"""Random changes of how a crop or a patch looks: dimmed nuclei, depth, blur, resolution, noise, brightness.

Intensities are normalised (0 is background, about 1 the brightest nuclei). Prediction normalises whole
frames robustly, so what only a change *relative* to the other nuclei of a frame can teach is taught by
dimming nucleus by nucleus; the shot noise that dimming takes away is put back, or the network would
learn that smooth means faint.

Here is what crops and patches share: what is drawn, and the changes pixel by pixel. `crop_appearance` and
`patch_appearance` do the changes, each along its axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.config.train import AugmentParams
from nuclei3d.core.training.dimming import draw_dimming
from nuclei3d.core.training.draws import Stream
from nuclei3d.core.training.filters import Image


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
