"""What is drawn alike for crops of planes and patches of volumes: their generators, turns and places.

Every crop has generators of its own, keyed by (seed, epoch, number of the crop), so that it is the same
whatever worker cuts it, and a resumed training sees the crops that it would have seen.
"""

from __future__ import annotations

import math

import numpy as np

from nuclei3d.config.train import Rotation


class Stream:
    """Numbers of the independent random streams of one crop."""

    GEOMETRY = 0
    APPEARANCE = 1
    DIMMING = 2
    DIMMING_NOISE = 3
    NOISE = 4


def crop_generator(seed: int, epoch: int, index: int, stream: int) -> np.random.Generator:
    """Make the generator of one stream of one crop (counter-based: no stream overlaps another)."""
    counter = np.array([0, 0, index, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=counter))


def turn_matrix(
    rotation: Rotation, draw: float, flip_y: float, flip_x: float
) -> tuple[float, float, float, float]:
    """Give the matrix (q00, q01, q10, q11) of flips (1 or -1) and a rotation, drawn from 0 to 1.

    It takes directions (y, x) in the crop to directions in the image that it is cut from.
    """
    if rotation == "quarter":
        cos, sin = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[int(draw * 4)]
    elif rotation == "free":
        cos, sin = math.cos(2 * math.pi * draw), math.sin(2 * math.pi * draw)
    else:
        cos, sin = 1.0, 0.0
    return cos * flip_y, -sin * flip_x, sin * flip_y, cos * flip_x


def range_of_middle(length: int, extent: float) -> tuple[float, float]:
    """Bound the middle so that a smaller crop stays inside the image, and a smaller image inside the crop."""
    first, last = sorted((extent / 2, length - extent / 2))
    return first, last
