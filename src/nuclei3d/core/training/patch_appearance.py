"""Random changes of how a patch looks: what `augmentation` does to planes, in 3D.

A nucleus is dimmed in all its planes alike, light falls along z, and the blur is wider along z than across.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.config.train import AugmentParams
from nuclei3d.core.training.augmentation import add_noise, attenuate, brighten
from nuclei3d.core.training.dimming import dim_by, lost_light
from nuclei3d.core.training.filters import blur, coarsen

Patch = NDArray[np.float32]


class PatchAppearance(NamedTuple):
    """How one patch is changed; the neutral values change nothing.

    Attributes
    ----------
    dims
        Whether nuclei are dimmed.
    attenuation
        Optical depth of the volume; negative: light comes from the last plane's side.
    blur_z, blur_xy
        Sigmas in voxels of the patch.
    coarse_z
        Planes averaged into one and interpolated back (1: none).
    noise
        Standard deviation of the shot noise at intensity 1; the read noise is half of it.
    gain, offset, gamma
        ``sign(I) |I|**gamma * gain + offset``.
    """

    dims: bool = False
    attenuation: float = 0.0
    blur_z: float = 0.0
    blur_xy: float = 0.0
    coarse_z: float = 1.0
    noise: float = 0.0
    gain: float = 1.0
    offset: float = 0.0
    gamma: float = 1.0


def draw_patch_appearance(
    augment: AugmentParams, anisotropy: float, rng: np.random.Generator
) -> PatchAppearance:
    """Draw the changes of one patch.

    Parameters
    ----------
    augment
        Strengths in pixels of the plane; 0 is off.
    anisotropy
        Pixels of the plane per distance of planes.
    rng
        Its numbers are used in fixed places: one setting does not shift the draws of another.
    """
    draw = rng.random(8)
    sigma = augment.blur_px * draw[0]
    coarse = 1.0
    if draw[1] < augment.low_resolution:
        coarse = max(1.0, (1.0 + (augment.low_resolution_factor - 1.0) * draw[2]) / anisotropy)
    return PatchAppearance(
        dims=augment.dim_share > 0,
        attenuation=augment.depth_attenuation * (2 * draw[3] - 1),
        blur_z=sigma * augment.blur_anisotropy / anisotropy,
        blur_xy=sigma,
        coarse_z=coarse,
        noise=augment.noise * draw[4],
        gain=1.0 + augment.brightness_linear * (2 * draw[5] - 1),
        offset=0.1 * augment.brightness_linear * (2 * draw[6] - 1),
        gamma=math.exp(augment.brightness_gamma * (2 * draw[7] - 1)),
    )


def change_patch(
    image: Patch,
    labels: NDArray[np.uint32],
    appearance: PatchAppearance,
    augment: AugmentParams,
    *,
    anisotropy: float,
    depth: tuple[float, float],
    radius_px: int,
    keeps: NDArray[np.float32] | None,
    dimming_noise: Patch | None,
    noise: Patch | None,
) -> None:
    """Change a patch in place.

    Parameters
    ----------
    image
        float32 (Z, Y, X), normalised, contiguous.
    labels
        uint32 (Z, Y, X).
    appearance
        What to do.
    augment
        Widths that are no draws: `psf_px`, `blur_anisotropy`, `dim_noise`.
    anisotropy
        Pixels of the plane per distance of planes.
    depth
        (at the patch's middle, per plane): relative depth in the volume, 0 to 1 over the volume.
    radius_px
        Half-width of the window in which the local background is averaged, about a nucleus' diameter.
    keeps
        Light kept per label (`nuclei3d.core.training.dimming.draw_dimming`).
    dimming_noise, noise
        Standard normal fields (Z, Y, X); the former is changed.
    """
    # the planes one below the other, and each plane as one row: what filters of planes need to work along z
    tall = image.reshape(-1, image.shape[2])
    rows = image.reshape(len(image), -1)
    if appearance.dims and keeps is not None and dimming_noise is not None:
        sigma_z = augment.psf_px * augment.blur_anisotropy / anisotropy
        _dim_nuclei(
            image, labels, keeps, dimming_noise, radius_px, sigma_z, augment.psf_px, augment.dim_noise
        )
    if appearance.attenuation:
        attenuate(rows, appearance.attenuation, *depth, 0.0)
    if appearance.blur_z or appearance.blur_xy:
        _blur(image, rows, appearance.blur_z, appearance.blur_xy)
    if appearance.coarse_z > 1:
        coarsen(rows, appearance.coarse_z, 1.0)
    if appearance.noise and noise is not None:
        add_noise(tall, noise.reshape(tall.shape), appearance.noise)
    if appearance.gain != 1 or appearance.offset != 0 or appearance.gamma != 1:
        brighten(tall, appearance.gain, appearance.offset, appearance.gamma)


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
