"""Changing how a patch of a volume looks: what `crop_appearance` does to crops of planes, in 3D.

A nucleus is dimmed in all its planes alike, light falls along z, and the blur is wider along z than across.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.config.train import AugmentParams
from nuclei3d.core.training.appearance import Appearance, Fields, attenuate, finish
from nuclei3d.core.training.dimming import dim_by, lost_light
from nuclei3d.core.training.filters import blur, coarsen

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
