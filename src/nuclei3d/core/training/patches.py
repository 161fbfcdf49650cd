"""Cutting patches from volumes: position, quarter turns, mirroring and scale in one resampling.

Patches lie on the network's grid, whose voxels are `anisotropy` times as long in z as in x. A random scale
is the same along all axes, and turns are about z only, so that a patch is always one that the microscope
could have taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.config.train import AugmentParams
from nuclei3d.core.training.draws import range_of_middle, turn_matrix
from nuclei3d.core.training.stored_images import FLOW_STEPS
from nuclei3d.core.training.volume_set import VolumeSet
from nuclei3d.volumes.voxel_size import VoxelSize

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
