"""Showing a network a part of a volume such that it says of it what it says of the whole.

A network that halves a plane three times pools pixels in squares of eight, counted from the corner of what it
is shown. Shown a part that starts two pixels off that lattice, it pools other pixels together: its logits
differ from those of the whole by .06 to .25 (root mean square, two networks), everywhere and however wide the
margin, against .003 to .03 for a part on the lattice, where the rest is Cellpose's style vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

POOLING = 8
"""Pixels along an axis that Cellpose's CNN pools into one."""

_NEAR = 0.15
"""Pixels off the lattice that do not matter."""

_LEAST_REACH = 4
"""Voxels before a part among which the nearest to the lattice is chosen, however large they are."""


def grow_to_lattice(
    part: slice, size: int, pixels: float | Sequence[float] = 1.0, pooling: int = POOLING
) -> slice:
    """Grow a part of an axis to one that starts on the network's lattice, and is sampled as the whole.

    Parameters
    ----------
    part
        First and last but one voxel.
    size
        Of the whole axis.
    pixels
        Pixels of the network per voxel, along this axis; of several networks, if several are to see it.
    pooling
        Pixels that the network pools into one.

    Returns
    -------
    slice
        Holds `part`. Its start lies within 0.15 pixels of the lattice, or as near as two squares allow; if
        its stop is not that of the axis, it is nearly a whole number of pixels long. For several networks
        the one that is worst off counts.
    """
    start, stop = int(part.start), int(part.stop)
    scales = np.atleast_1d(np.asarray(pixels, np.float64))
    if start > 0:
        reach = max(int(np.ceil(2 * pooling / scales.min())), _LEAST_REACH)
        starts = np.arange(start, max(start - reach, 0) - 1, -1)
        start = _first_near(starts, np.outer(scales, starts) / pooling, _NEAR / pooling)
    if stop < size:
        stops = np.arange(stop, min(stop + POOLING, size) + 1)
        stop = _first_near(stops, np.outer(scales, stops - start), _NEAR)
    return slice(start, stop)


def _first_near(candidates: NDArray[np.int_], values: NDArray[np.float64], tolerance: float) -> int:
    """Give the first candidate whose values (a row per network) are nearly whole, or else the nearest."""
    off = np.abs(values - np.rint(values)).max(axis=0)
    near = np.flatnonzero(off <= tolerance)
    return int(candidates[near[0] if len(near) else int(np.argmin(off))])
