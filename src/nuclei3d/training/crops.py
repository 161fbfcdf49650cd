"""Cutting patches from volumes: position, quarter turns, mirroring and scale in one resampling.

Patches lie on the network's grid, whose voxels are `anisotropy` times as long in z as in x. A random scale
is the same along all axes, and turns are about z only, so that a patch is always one that the microscope
could have taken.

What is drawn alike for crops of planes and patches of volumes: their generators, turns and places.

Every crop has generators of its own, keyed by (seed, epoch, number of the crop), so that it is the same
whatever worker cuts it, and a resumed training sees the crops that it would have seen.

Cutting crops from planes: position, quarter turns, mirroring, rotation and scale in one resampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.config.sections import AugmentParams, Rotation
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.training.samples import FLOW_STEPS, VIEWS, PlaneSet, VolumeSet


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


_DRAWS = 12


class PatchPlan(NamedTuple):
    """Where a patch lies in its volume.

    Attributes
    ----------
    volume
        Index of the volume.
    centre_z, centre_y, centre_x
        Middle of the patch in voxels of the volume (voxel i covers i to i + 1).
    flip_z
        1 or -1.
    q00, q01, q10, q11
        Orthogonal matrix from directions (y, x) in the patch to directions in the volume.
    scale_z, scale_y, scale_x
        Voxels of the patch per voxel of the volume, along the volume's axes.
    """

    volume: int
    centre_z: float
    centre_y: float
    centre_x: float
    flip_z: float
    q00: float
    q01: float
    q10: float
    q11: float
    scale_z: float
    scale_y: float
    scale_x: float


@dataclass(frozen=True)
class PatchSampling:
    """Where patches are drawn.

    Attributes
    ----------
    shape
        (z, y, x) of the patches.
    voxel_size
        Of the network's grid, in um.
    nucleus_centred, faint_centred
        Shares that are drawn around a nucleus, and around one of the faintest fifth of all.
    """

    shape: tuple[int, int, int]
    voxel_size: VoxelSize
    nucleus_centred: float = 0.0
    faint_centred: float = 0.0


def draw_patch(
    volumes: VolumeSet, volume: int, rng: np.random.Generator, augment: AugmentParams, sampling: PatchSampling
) -> PatchPlan:
    """Draw where a patch is cut and how it is turned.

    Parameters
    ----------
    volumes, volume
        The volumes, and the index of the one to cut from.
    rng
        Its numbers are used in fixed places, so one setting does not shift the draws of another.
    augment
        Flips, rotation (about z) and rescaling.
    sampling
        Shape, scale, and what patches are drawn around.
    """
    info = volumes.infos[volume]
    draw = rng.random(_DRAWS)
    zoom = 1 - augment.rescale_range / 2 + augment.rescale_range * draw[0]
    scale = [
        zoom * own / wanted for own, wanted in zip(info.voxel_size.zyx, sampling.voxel_size.zyx, strict=True)
    ]
    flip_z = -1.0 if augment.flips and augment.flip_z and draw[2] < 0.5 else 1.0
    flip_y, flip_x = (-1.0 if augment.flips and value < 0.5 else 1.0 for value in draw[3:5])
    extents = [size / factor for size, factor in zip(sampling.shape, scale, strict=True)]
    around = _draw_nucleus(volumes, volume, draw, sampling)
    centre = []
    for axis, (length, extent) in enumerate(zip(info.shape, extents, strict=True)):
        first, last = range_of_middle(length, extent)
        if around is None:
            place = first + draw[7 + axis] * (last - first)
        else:
            # anywhere in the middle half of the patch, as far as the volume's edges allow
            place = min(max(float(around[axis]) + (draw[7 + axis] - 0.5) * extent / 2, first), last)
        centre.append(place)
    return PatchPlan(
        volume,
        centre[0],
        centre[1],
        centre[2],
        flip_z,
        *turn_matrix(augment.rotation, draw[1], flip_y, flip_x),
        scale[0],
        scale[1],
        scale[2],
    )


def _draw_nucleus(
    volumes: VolumeSet, volume: int, draw: NDArray[np.float64], sampling: PatchSampling
) -> NDArray[np.float32] | None:
    """Choose the nucleus that a patch is drawn around; None: anywhere."""
    table = volumes.nuclei[volume]
    chosen = np.arange(len(table.centres))
    if draw[5] < sampling.faint_centred:
        faint = np.flatnonzero(table.contrasts <= volumes.faint_contrast)
        chosen = faint if len(faint) else chosen
    elif draw[5] >= sampling.faint_centred + sampling.nucleus_centred:
        return None
    return table.centres[chosen[int(draw[6] * len(chosen))]] if len(chosen) else None


@njit(cache=True, nogil=True)
def _trilinear(pixels: NDArray[np.uint16], z: float, y: float, x: float) -> float:
    """Interpolate at (z, y, x), voxel centres at integers; held constant beyond the outermost centres."""
    depth, height, width = pixels.shape
    z = min(max(z, 0.0), depth - 1.0)
    y = min(max(y, 0.0), height - 1.0)
    x = min(max(x, 0.0), width - 1.0)
    z0 = min(int(z), max(depth - 2, 0))
    y0 = min(int(y), max(height - 2, 0))
    x0 = min(int(x), max(width - 2, 0))
    z1 = min(z0 + 1, depth - 1)
    y1 = min(y0 + 1, height - 1)
    x1 = min(x0 + 1, width - 1)
    fz = z - z0
    fy = y - y0
    fx = x - x0
    near = (pixels[z0, y0, x0] * (1 - fx) + pixels[z0, y0, x1] * fx) * (1 - fy) + (
        pixels[z0, y1, x0] * (1 - fx) + pixels[z0, y1, x1] * fx
    ) * fy
    far = (pixels[z1, y0, x0] * (1 - fx) + pixels[z1, y0, x1] * fx) * (1 - fy) + (
        pixels[z1, y1, x0] * (1 - fx) + pixels[z1, y1, x1] * fx
    ) * fy
    return float(near * (1 - fz) + far * fz)


@njit(cache=True, nogil=True)
def cut_patch(
    pixels: NDArray[np.uint16],
    labels: NDArray[np.unsignedinteger[Any]],
    flows: NDArray[np.int8],
    gain: float,
    bias: float,
    plan: PatchPlan,
    unit: bool,
    image: NDArray[np.float32],
    patch_labels: NDArray[np.uint32],
    patch_flows: NDArray[np.float32],
) -> None:
    """Cut one patch into `image` (Z, Y, X), `patch_labels` (Z, Y, X) and `patch_flows` (3, Z, Y, X).

    The image is interpolated linearly (averaged over 2 x 2 points in the plane where it shrinks), labels are
    the nearest, flows are interpolated among the voxels of the same nucleus, turned with the patch, and (with
    `unit`) made unit vectors again except where they are short because they turn around at a centre. Outside
    the volume all is 0, as in the padding of a prediction.
    """
    depth, height, width = pixels.shape
    size_z, size_y, size_x = image.shape
    a00 = plan.q00 / plan.scale_y
    a01 = plan.q01 / plan.scale_y
    a10 = plan.q10 / plan.scale_x
    a11 = plan.q11 / plan.scale_x
    shrinking = min(plan.scale_y, plan.scale_x) < 0.95
    image[:] = 0.0
    patch_labels[:] = 0
    patch_flows[:] = 0.0
    for k in range(size_z):
        z = plan.centre_z + plan.flip_z * (k + 0.5 - size_z / 2) / plan.scale_z - 0.5
        if z < -0.5 or z > depth - 0.5:
            continue
        z0 = math.floor(z)
        nearest_z = min(max(math.floor(z + 0.5), 0), depth - 1)
        for i in range(size_y):
            dy = i + 0.5 - size_y / 2
            for j in range(size_x):
                dx = j + 0.5 - size_x / 2
                y = plan.centre_y + a00 * dy + a01 * dx - 0.5
                x = plan.centre_x + a10 * dy + a11 * dx - 0.5
                if y < -0.5 or x < -0.5 or y > height - 0.5 or x > width - 0.5:
                    continue
                if shrinking:
                    value = 0.0
                    for sub_y in (-0.25, 0.25):
                        for sub_x in (-0.25, 0.25):
                            value += _trilinear(
                                pixels,
                                z,
                                y + a00 * sub_y + a01 * sub_x,
                                x + a10 * sub_y + a11 * sub_x,
                            )
                    value *= 0.25
                else:
                    value = _trilinear(pixels, z, y, x)
                image[k, i, j] = value * gain + bias
                row = min(max(math.floor(y + 0.5), 0), height - 1)
                column = min(max(math.floor(x + 0.5), 0), width - 1)
                label = labels[nearest_z, row, column]
                patch_labels[k, i, j] = label
                if label == 0:
                    continue
                y0 = math.floor(y)
                x0 = math.floor(x)
                flow_z = 0.0
                flow_y = 0.0
                flow_x = 0.0
                total = 0.0
                for nz in range(max(z0, 0), min(z0 + 2, depth)):
                    weight_z = 1.0 - abs(z - nz)
                    for ny in range(max(y0, 0), min(y0 + 2, height)):
                        weight_y = weight_z * (1.0 - abs(y - ny))
                        for nx in range(max(x0, 0), min(x0 + 2, width)):
                            if labels[nz, ny, nx] != label:
                                continue
                            weight = weight_y * (1.0 - abs(x - nx))
                            total += weight
                            flow_z += weight * flows[nz, ny, nx, 0]
                            flow_y += weight * flows[nz, ny, nx, 1]
                            flow_x += weight * flows[nz, ny, nx, 2]
                if total <= 0.0:
                    continue
                length = total * FLOW_STEPS
                if unit:
                    size = math.sqrt(flow_z**2 + flow_y**2 + flow_x**2)
                    length = max(size, 0.5 * length)
                patch_flows[0, k, i, j] = plan.flip_z * flow_z / length
                # the inverse of an orthogonal matrix is its transpose
                patch_flows[1, k, i, j] = (plan.q00 * flow_y + plan.q10 * flow_x) / length
                patch_flows[2, k, i, j] = (plan.q01 * flow_y + plan.q11 * flow_x) / length
