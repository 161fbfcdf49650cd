"""Checks that an array is an image or label volume as the rest of the program expects."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.errors import InputError


def to_labels(labels: NDArray[Any], where: str) -> NDArray[np.uint32]:
    """Check labels (Z, Y, X) and turn them into uint32.

    Raises
    ------
    InputError
        If they are no integers, or some are negative or above 2**32 - 1.
    """
    if labels.dtype.kind not in "bui":
        raise InputError(
            f"{where} holds {labels.dtype} values where labels are wanted, expected integers; save it as "
            "16-bit (Fiji: Image > Type > 16-bit, without scaling)"
        )
    if labels.size:
        if labels.dtype.kind == "i" and labels.min() < 0:
            raise InputError(
                f"{where} holds the negative label {labels.min()}; labels count from 1, 0 is background"
            )
        if labels.dtype.itemsize > 4 and labels.max() > np.iinfo(np.uint32).max:
            raise InputError(
                f"{where} holds the label {labels.max()}, expected at most 2**32 - 1; renumber the labels"
            )
    return labels.astype(np.uint32, copy=False)


def check_image(image: NDArray[Any], where: str) -> None:
    """Check that an array is a volume of finite numbers.

    Parameters
    ----------
    image
        Expected (Z, Y, X), each axis longer than 1, integers or floats.
    where
        Name of the file for messages.

    Raises
    ------
    InputError
        If it is not.
    """
    if image.ndim != 3 or min(image.shape) < 2:
        shape = " x ".join(map(str, image.shape))
        raise InputError(f"{where} is no volume (shape {shape}); expected three axes (z, y, x) longer than 1")
    if image.dtype.kind not in "buif":
        raise InputError(f"{where} holds {image.dtype} values; expected integers or floats")
    if image.dtype.kind != "f":
        return
    for z, plane in enumerate(image):
        bad = image[z].size - int(np.count_nonzero(np.isfinite(plane)))
        if bad:
            raise InputError(
                f"{where} holds NaN or infinite values ({bad} in plane {z}); replace them, for example by 0"
            )
