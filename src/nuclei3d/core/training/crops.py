"""Cutting crops from planes: position, quarter turns, mirroring, rotation and scale in one resampling."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.config.train import AugmentParams
from nuclei3d.core.training.draws import range_of_middle, turn_matrix
from nuclei3d.core.training.planes import VIEWS, PlaneSet
from nuclei3d.core.training.stored_images import FLOW_STEPS


class CropPlan(NamedTuple):
    """Where a crop lies in its plane.

    Attributes
    ----------
    plane
        Index of the plane.
    centre_y, centre_x
        Middle of the crop in the plane, in plane pixels (pixel i covers i to i + 1).
    q00, q01, q10, q11
        Orthogonal matrix from directions (y, x) in the crop to directions in the plane.
    scale
        Crop pixels per plane pixel.
    """

    plane: int
    centre_y: float
    centre_x: float
    q00: float
    q01: float
    q10: float
    q11: float
    scale: float

    @property
    def turned(self) -> bool:
        """Whether the plane's rows have become (mostly) columns of the crop."""
        return abs(self.q01) > abs(self.q00)


def draw_crop(
    planes: PlaneSet,
    plane: int,
    rng: np.random.Generator,
    augment: AugmentParams,
    crop_px: int,
    scale: float,
    nucleus_centred: float = 0.0,
) -> CropPlan:
    """Draw where a crop is cut and how it is turned.

    Parameters
    ----------
    planes, plane
        The planes, and the index of the one to cut from.
    rng
        Its numbers are used in fixed places, so one setting does not shift the draws of another.
    augment
        Flips, rotations and rescaling.
    crop_px
        Edge of the crop.
    scale
        Crop pixels per plane pixel before random rescaling: the network's diameter over that of the planes.
    nucleus_centred
        Probability that the crop's middle is a pixel of a nucleus (as far as the plane's edges allow).
    """
    info = planes.infos[plane]
    draw = rng.random(8)
    scale *= 1 - augment.rescale_range / 2 + augment.rescale_range * draw[0]
    rotation = augment.rotation if info.view == VIEWS[0] else augment.side_rotation
    # the rows of an xz or yz plane are z
    flips_rows = augment.flips and (augment.flip_z or info.view == VIEWS[0])
    flip_y = -1.0 if flips_rows and draw[2] < 0.5 else 1.0
    flip_x = -1.0 if augment.flips and draw[3] < 0.5 else 1.0
    share_y, share_x = float(draw[4]), float(draw[5])
    if draw[6] < nucleus_centred and info.nuclei:
        inside = np.flatnonzero(planes.read(plane).labels)
        if len(inside):
            row, column = divmod(int(inside[int(draw[7] * len(inside))]), info.width)
            share_y = _share_of(row + 0.5, info.height, crop_px / scale)
            share_x = _share_of(column + 0.5, info.width, crop_px / scale)
    return CropPlan(
        plane,
        _centre(share_y, info.height, crop_px / scale),
        _centre(share_x, info.width, crop_px / scale),
        *turn_matrix(rotation, draw[1], flip_y, flip_x),
        scale,
    )


def _centre(share: float, length: int, extent: float) -> float:
    first, last = range_of_middle(length, extent)
    return first + share * (last - first)


def _share_of(position: float, length: int, extent: float) -> float:
    first, last = range_of_middle(length, extent)
    return min(max((position - first) / max(last - first, 1e-9), 0.0), 1.0)


@njit(cache=True, nogil=True)
def _bilinear(pixels: NDArray[np.uint16], y: float, x: float) -> float:
    """Interpolate at (y, x), pixel centres at integers; held constant beyond the outermost centres."""
    height, width = pixels.shape
    y = min(max(y, 0.0), height - 1.0)
    x = min(max(x, 0.0), width - 1.0)
    y0 = min(int(y), max(height - 2, 0))
    x0 = min(int(x), max(width - 2, 0))
    y1 = min(y0 + 1, height - 1)
    x1 = min(x0 + 1, width - 1)
    fy = y - y0
    fx = x - x0
    upper = pixels[y0, x0] * (1 - fx) + pixels[y0, x1] * fx
    lower = pixels[y1, x0] * (1 - fx) + pixels[y1, x1] * fx
    return float(upper * (1 - fy) + lower * fy)


@njit(cache=True, nogil=True)
def cut_crop(
    pixels: NDArray[np.uint16],
    labels: NDArray[np.uint16],
    flows: NDArray[np.int8],
    gain: float,
    bias: float,
    plan: CropPlan,
    image: NDArray[np.float32],
    crop_labels: NDArray[np.uint16],
    crop_flows: NDArray[np.float32],
) -> None:
    """Cut one crop into `image` (P, P), `crop_labels` (P, P) and `crop_flows` (2, P, P).

    The image is interpolated linearly (averaged over 2 x 2 points where it shrinks), labels are the nearest,
    flows are interpolated among the pixels of the same nucleus, turned with the crop, and made unit
    vectors again except where they are short because they turn around at a centre. Outside the plane all is
    0, as in the padding of a prediction.
    """
    height, width = pixels.shape
    size = image.shape[0]
    a00 = plan.q00 / plan.scale
    a01 = plan.q01 / plan.scale
    a10 = plan.q10 / plan.scale
    a11 = plan.q11 / plan.scale
    shrinking = plan.scale < 0.95
    for i in range(size):
        dy = i + 0.5 - size / 2
        for j in range(size):
            dx = j + 0.5 - size / 2
            y = plan.centre_y + a00 * dy + a01 * dx - 0.5
            x = plan.centre_x + a10 * dy + a11 * dx - 0.5
            crop_flows[0, i, j] = 0.0
            crop_flows[1, i, j] = 0.0
            crop_labels[i, j] = 0
            image[i, j] = 0.0
            if y < -0.5 or x < -0.5 or y > height - 0.5 or x > width - 0.5:
                continue
            if shrinking:
                value = 0.0
                for sub_y in (-0.25, 0.25):
                    for sub_x in (-0.25, 0.25):
                        value += _bilinear(
                            pixels,
                            y + a00 * sub_y + a01 * sub_x,
                            x + a10 * sub_y + a11 * sub_x,
                        )
                value *= 0.25
            else:
                value = _bilinear(pixels, y, x)
            image[i, j] = value * gain + bias
            row = min(max(math.floor(y + 0.5), 0), height - 1)
            column = min(max(math.floor(x + 0.5), 0), width - 1)
            label = labels[row, column]
            crop_labels[i, j] = label
            if label == 0:
                continue
            y0 = math.floor(y)
            x0 = math.floor(x)
            flow_y = 0.0
            flow_x = 0.0
            total = 0.0
            for ny in (y0, y0 + 1):
                if ny < 0 or ny >= height:
                    continue
                weight_y = 1.0 - abs(y - ny)
                for nx in (x0, x0 + 1):
                    if nx < 0 or nx >= width:
                        continue
                    if labels[ny, nx] != label:
                        continue
                    weight = weight_y * (1.0 - abs(x - nx))
                    total += weight
                    flow_y += weight * flows[ny, nx, 0]
                    flow_x += weight * flows[ny, nx, 1]
            if total <= 0.0:
                continue
            flow_y /= total * FLOW_STEPS
            flow_x /= total * FLOW_STEPS
            length = max(math.hypot(flow_y, flow_x), 0.5)
            # the inverse of an orthogonal matrix is its transpose
            crop_flows[0, i, j] = (plan.q00 * flow_y + plan.q10 * flow_x) / length
            crop_flows[1, i, j] = (plan.q01 * flow_y + plan.q11 * flow_x) / length
