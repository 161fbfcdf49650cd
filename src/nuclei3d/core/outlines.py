"""Outlines of labels in a plane."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def trace_outlines(plane: NDArray[np.integer[Any]]) -> list[tuple[int, NDArray[np.float32]]]:
    """Trace the labels of a plane as polygons.

    Parameters
    ----------
    plane
        Labels (Y, X); 0 is background.

    Returns
    -------
    list of (label, polygon)
        In the order of the labels; a label in several pieces has several polygons. A polygon is (n, 2), x
        before y, in the coordinates of ImageJ: the first pixel covers 0 to 1, its centre is at 0.5. It holds
        the centres of exactly the pixels of its piece and of the holes therein.
    """
    from skimage.measure import find_contours, regionprops

    outlines = []
    for region in regionprops(plane):  # type: ignore[no-untyped-call]
        # level 0.5 runs half way between a pixel inside and one outside; the padding closes it at the border
        padded = np.pad(region.image, 1).astype(np.float32)
        contours = find_contours(padded, 0.5, fully_connected="high")  # type: ignore[no-untyped-call]
        top, left = region.bbox[:2]
        for contour in contours:
            polygon = contour[:-1, ::-1] - 0.5 + (left, top)
            if _signed_area(polygon) > 0:
                outlines.append((int(region.label), polygon.astype(np.float32)))
    return outlines


def _signed_area(polygon: NDArray[np.floating[Any]]) -> float:
    """Give the area: positive around pixels, negative around holes, which are traced the other way."""
    x, y = polygon.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
