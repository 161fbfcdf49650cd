"""Changing how a crop of a plane looks: planes xz and yz have z along their rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config.train import AugmentParams
from nuclei3d.core.training.appearance import Appearance, Fields, attenuate, finish
from nuclei3d.core.training.crops import CropPlan
from nuclei3d.core.training.dimming import dim_nuclei
from nuclei3d.core.training.filters import Image, blur, coarsen
from nuclei3d.core.training.planes import PlaneInfo


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
