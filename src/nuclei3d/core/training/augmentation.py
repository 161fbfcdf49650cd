"""Random changes of how a crop looks: dimmed nuclei, depth, blur, resolution, noise, brightness.

Intensities are normalised (0 is background, about 1 the brightest nuclei). Prediction normalises whole
frames robustly, so what only a change *relative* to the other nuclei of a frame can teach is taught by
dimming nucleus by nucleus; the shot noise that dimming takes away is put back, or the network would
learn that smooth means faint.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.config.train import AugmentParams
from nuclei3d.core.training.crops import CropPlan
from nuclei3d.core.training.dimming import dim_nuclei
from nuclei3d.core.training.filters import Image, blur, coarsen


class Appearance(NamedTuple):
    """How one crop is changed; the neutral values change nothing.

    Attributes
    ----------
    dims
        Whether nuclei are dimmed.
    attenuation
        Optical depth; negative: light comes from the plane's other side.
    blur_y, blur_x
        Sigmas in crop pixels.
    coarse_y, coarse_x
        Pixels averaged into one and interpolated back (1: none).
    noise
        Standard deviation of the shot noise at intensity 1; the read noise is half of it.
    gain, offset, gamma
        ``sign(I) |I|**gamma * gain + offset``.
    """

    dims: bool = False
    attenuation: float = 0.0
    blur_y: float = 0.0
    blur_x: float = 0.0
    coarse_y: float = 1.0
    coarse_x: float = 1.0
    noise: float = 0.0
    gain: float = 1.0
    offset: float = 0.0
    gamma: float = 1.0


def draw_appearance(augment: AugmentParams, view: str, turned: bool, rng: np.random.Generator) -> Appearance:
    """Draw the changes of one crop.

    Parameters
    ----------
    augment
        Strengths; 0 is off.
    view
        Of the crop's plane: the rows of xz and yz planes run along z.
    turned
        Whether the plane's rows are the crop's columns.
    rng
        Its numbers are used in fixed places: one setting does not shift the draws of another.
    """
    draw = rng.random(8)
    side = view != "xy"
    sigma = augment.blur_px * draw[0]
    along = sigma * augment.blur_anisotropy if side else sigma
    coarse = 1.0
    if draw[1] < augment.low_resolution:
        coarse = 1.0 + (augment.low_resolution_factor - 1.0) * draw[2]
    across = 1.0 if side else coarse
    return Appearance(
        dims=augment.dim_share > 0,
        attenuation=augment.depth_attenuation * (2 * draw[3] - 1),
        blur_y=sigma if turned else along,
        blur_x=along if turned else sigma,
        coarse_y=across if turned else coarse,
        coarse_x=coarse if turned else across,
        noise=augment.noise * draw[4],
        gain=1.0 + augment.brightness_linear * (2 * draw[5] - 1),
        offset=0.1 * augment.brightness_linear * (2 * draw[6] - 1),
        gamma=math.exp(augment.brightness_gamma * (2 * draw[7] - 1)),
    )


def change_appearance(
    image: Image,
    labels: NDArray[np.uint16],
    appearance: Appearance,
    augment: AugmentParams,
    *,
    depth: tuple[float, float, float],
    radius_px: int,
    keeps: NDArray[np.float32] | None,
    dimming_noise: Image | None,
    noise: Image | None,
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
        Widths that are no draws: `psf_px`, `dim_noise`.
    depth
        (at the crop's middle, per row, per column): relative depth in its plane, 0 to 1 over the plane.
    radius_px
        Half-width of the window in which the local background is averaged, about a nucleus' diameter.
    keeps
        Light kept per label (`draw_dimming`).
    dimming_noise, noise
        Standard normal fields (P, P).
    """
    if appearance.dims and keeps is not None and dimming_noise is not None:
        dim_nuclei(image, labels, keeps, dimming_noise, radius_px, augment.psf_px, augment.dim_noise)
    if appearance.attenuation:
        attenuate(image, appearance.attenuation, *depth)
    if appearance.blur_y or appearance.blur_x:
        blur(image, appearance.blur_y, appearance.blur_x)
    if appearance.coarse_y > 1 or appearance.coarse_x > 1:
        coarsen(image, appearance.coarse_y, appearance.coarse_x)
    if appearance.noise and noise is not None:
        add_noise(image, noise, appearance.noise)
    if appearance.gain != 1 or appearance.offset != 0 or appearance.gamma != 1:
        brighten(image, appearance.gain, appearance.offset, appearance.gamma)


def depth_of_crop(plan: CropPlan, view: str, height: int) -> tuple[float, float, float]:
    """Give the relative depth at a crop's middle, and its change per row and column of the crop.

    Planes xz and yz have their depth along their rows, 0 to 1 from the first to the last; an xy plane lies
    at one depth, for which 1 is taken (its attenuation is drawn as a whole).
    """
    if view == "xy":
        return 1.0, 0.0, 0.0
    return plan.centre_y / height, plan.q00 / plan.scale / height, plan.q01 / plan.scale / height


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
