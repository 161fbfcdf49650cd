"""Cutting crops from samples: position, turns, mirroring and scale in one resampling.

Every crop has generators of its own, keyed by (seed, epoch, number of the crop), so that it is the same
whatever worker cuts it, and a resumed training sees the crops that it would have seen. A random scale is the
same along all axes, and crops of volumes are turned about z only, so that each is one that the microscope
could have taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.config.sections import AugmentParams, Rotation, TrainParams
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.unet3d import VolumeSpec
from nuclei3d.training.samples import FLOW_STEPS, UNKNOWN_FLOW, SampleInfo, SampleSet

_DRAWS = 12
_DRAWS_OF_A_PLANE = [0, 1, 8, 2, 3, 6, 7, 9, 4, 5]
"""Which of the numbers drawn for a plane stand for (scale, turn, flips z y x, choice, nucleus, place z y x);
in those drawn for a volume they follow each other."""


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


@dataclass(frozen=True)
class CropGrid:
    """The grid of the crops, which is the network's, and what they are drawn around.

    Crops have the `shape` (z, y, x), those of planes (1, P, P); nuclei measure `diameter_px` in their pixels.
    `voxel_size` is the grid's in um, None for planes; of these `scale` has the crop pixels per pixel of the
    plane, the same for all. `nucleus_centred` and `faint_centred` are the shares of the crops that are drawn
    around a nucleus (of a plane: a pixel), or one of the faintest. `unit_flows` says whether flows are unit
    vectors (heat) or have a length of their own (tanh).
    """

    shape: tuple[int, int, int]
    diameter_px: float
    voxel_size: VoxelSize | None = None
    scale: float = 1.0
    nucleus_centred: float = 0.0
    faint_centred: float = 0.0
    unit_flows: bool = True

    @classmethod
    def of_planes(cls, params: TrainParams, planes_diameter_px: float) -> CropGrid:
        """Give the grid of a 2D network; nuclei measure `planes_diameter_px` on the planes."""
        return cls(
            shape=(1, params.crop_px, params.crop_px),
            diameter_px=params.diameter_px,
            scale=params.diameter_px / planes_diameter_px,
            nucleus_centred=params.sampling.nucleus_centred,
        )

    @classmethod
    def of_volumes(cls, params: TrainParams, spec: VolumeSpec, nucleus_diameter_um: float) -> CropGrid:
        """Give the grid of a 3D network: nuclei measure params.diameter_px in x and y."""
        edge = nucleus_diameter_um / params.diameter_px
        return cls(
            shape=spec.patch,
            diameter_px=params.diameter_px,
            voxel_size=VoxelSize(spec.anisotropy * edge, edge, edge),
            nucleus_centred=params.full3d.nucleus_centred,
            faint_centred=params.full3d.faint_centred,
            unit_flows=spec.targets == "heat",
        )

    @property
    def axes(self) -> int:
        """Number of spatial axes that the network sees."""
        return 2 if self.voxel_size is None else 3

    @property
    def anisotropy(self) -> float:
        """Edge of the grid in z over that in x; 1 for planes, whose pixels are square in every view."""
        return 1.0 if self.voxel_size is None else self.voxel_size.anisotropy

    def scales(self, info: SampleInfo, zoom: float) -> tuple[float, float, float]:
        """Voxels of the crop per voxel of a sample, along (z, y, x)."""
        if self.voxel_size is None:
            return 1.0, self.scale * zoom, self.scale * zoom
        z, y, x = (
            zoom * own / wanted for own, wanted in zip(info.voxel_size.zyx, self.voxel_size.zyx, strict=True)
        )
        return z, y, x


class CropPlan(NamedTuple):
    """Where a crop lies in its sample.

    Its middle is in voxels of the sample (voxel i covers i to i + 1); `flip_z` is 1 or -1, q the orthogonal
    matrix from directions (y, x) in the crop to directions in the sample, and the scales are voxels of the
    crop per voxel of the sample, along the sample's axes.
    """

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

    def crop_axis(self, axis: int) -> int:
        """Give the axis of the crop along which an axis of the sample (mostly) runs."""
        turned = abs(self.q01) > abs(self.q00)
        return 3 - axis if axis and turned else axis


def draw_crop(
    samples: SampleSet, sample: int, rng: np.random.Generator, augment: AugmentParams, grid: CropGrid
) -> CropPlan:
    """Draw where a crop is cut from a sample and how it is turned.

    The numbers of `rng` are used in fixed places, so that one setting does not shift the draws of another.
    """
    info = samples.infos[sample]
    draw = rng.random(_DRAWS)
    if info.is_plane:
        draw = draw[_DRAWS_OF_A_PLANE]
    scales = grid.scales(info, 1 - augment.rescale_range / 2 + augment.rescale_range * draw[0])
    flip_z, flip_y, flip_x = (
        -1.0 if augment.flips and (augment.flip_z or axis != info.z_axis) and draw[2 + axis] < 0.5 else 1.0
        for axis in range(3)
    )
    around = _draw_target(samples, sample, draw[5], draw[6], grid)
    centre = []
    for axis in range(3):
        extent = grid.shape[axis] / scales[axis]
        # a smaller crop stays inside the sample, and a smaller sample inside the crop
        first, last = sorted((extent / 2, info.shape[axis] - extent / 2))
        share = float(draw[7 + axis])
        if around is None:
            place = first + share * (last - first)
        elif info.is_plane:
            share = min(max((around[axis] - first) / max(last - first, 1e-9), 0.0), 1.0)
            place = first + share * (last - first)
        else:
            # anywhere in the middle half of the crop
            place = min(max(around[axis] + (share - 0.5) * extent / 2, first), last)
        centre.append(place)
    return CropPlan(
        centre[0],
        centre[1],
        centre[2],
        flip_z,
        *_turn_matrix(
            augment.side_rotation if info.z_axis else augment.rotation, float(draw[1]), flip_y, flip_x
        ),
        *scales,
    )


def _draw_target(
    samples: SampleSet, sample: int, choice: float, number: float, grid: CropGrid
) -> tuple[float, ...] | None:
    """Draw the point (z, y, x) that a crop is cut around; None: anywhere."""
    if choice >= grid.faint_centred + grid.nucleus_centred or not samples.infos[sample].nuclei:
        return None
    table = samples.nuclei[sample]
    chosen = np.arange(len(table.centres))
    if choice < grid.faint_centred:
        faint = np.flatnonzero(table.contrasts <= samples.faint_contrast)
        chosen = faint if len(faint) else chosen
    if len(chosen):
        return tuple(float(at) for at in table.centres[chosen[int(number * len(chosen))]])
    labels = samples.read(sample).labels
    inside = np.flatnonzero(labels)
    if not len(inside):
        return None
    place = np.unravel_index(int(inside[int(number * len(inside))]), labels.shape)
    return tuple(float(at) + 0.5 for at in place)


def _turn_matrix(
    rotation: Rotation, draw: float, flip_y: float, flip_x: float
) -> tuple[float, float, float, float]:
    """Give (q00, q01, q10, q11) of flips (1 or -1) and a rotation, drawn from 0 to 1."""
    if rotation == "quarter":
        cos, sin = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[int(draw * 4)]
    elif rotation == "free":
        cos, sin = math.cos(2 * math.pi * draw), math.sin(2 * math.pi * draw)
    else:
        cos, sin = 1.0, 0.0
    return cos * flip_y, -sin * flip_x, sin * flip_y, cos * flip_x


@njit(cache=True, nogil=True)
def interpolate(pixels: NDArray[Any], y: float, x: float) -> float:
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
    # unsigned: numba then does not look for indices below 0
    top, bottom, left, right = np.uintp(y0), np.uintp(y1), np.uintp(x0), np.uintp(x1)
    upper = pixels[top, left] * (1 - fx) + pixels[top, right] * fx
    lower = pixels[bottom, left] * (1 - fx) + pixels[bottom, right] * fx
    return float(upper * (1 - fy) + lower * fy)


@njit(cache=True, nogil=True)
def cut_crop(
    pixels: NDArray[np.uint16],
    labels: NDArray[np.unsignedinteger[Any]],
    flows: NDArray[np.int8],
    gain: float,
    bias: float,
    plan: CropPlan,
    unit: bool,
    image: NDArray[np.float32],
    crop_labels: NDArray[np.int32],
    crop_flows: NDArray[np.float32],
) -> None:
    """Cut a crop into `image` and `crop_labels` (Z, Y, X) and `crop_flows` (components, Z, Y, X).

    The image is interpolated linearly (averaged over 2 x 2 points in y and x where it shrinks), labels are
    the nearest, flows are interpolated among the voxels of the same nucleus, turned with the crop, and (with
    `unit`) made unit vectors again except where they are short because they turn around at a centre. Outside
    the sample all is 0, as in the padding of a prediction; labels are -1 where nobody looked.
    """
    depth, height, width = pixels.shape
    size_z, size_y, size_x = image.shape
    solid = flows.shape[3] == 3
    component_y = np.uintp(1 if solid else 0)
    component_x = np.uintp(2 if solid else 1)
    a00 = plan.q00 / plan.scale_y
    a01 = plan.q01 / plan.scale_y
    a10 = plan.q10 / plan.scale_x
    a11 = plan.q11 / plan.scale_x
    shrinking = min(plan.scale_y, plan.scale_x) < 0.95
    for k in range(size_z):
        z = plan.centre_z + plan.flip_z * (k + 0.5 - size_z / 2) / plan.scale_z - 0.5
        if z < -0.5 or z > depth - 0.5:
            image[k] = 0.0
            crop_labels[k] = 0
            crop_flows[:, k] = 0.0
            continue
        within = min(max(z, 0.0), depth - 1.0)
        near_z = min(int(within), max(depth - 2, 0))
        near = pixels[near_z]
        far = pixels[min(near_z + 1, depth - 1)]
        share = within - near_z
        nearest_z = min(max(math.floor(z + 0.5), 0), depth - 1)
        first_z = max(math.floor(z), 0)
        end_z = min(math.floor(z) + 2, depth)
        for i in range(size_y):
            dy = i + 0.5 - size_y / 2
            for j in range(size_x):
                dx = j + 0.5 - size_x / 2
                image[k, i, j] = 0.0
                crop_labels[k, i, j] = 0
                if solid:
                    crop_flows[0, k, i, j] = 0.0
                crop_flows[component_y, k, i, j] = 0.0
                crop_flows[component_x, k, i, j] = 0.0
                y = plan.centre_y + a00 * dy + a01 * dx - 0.5
                x = plan.centre_x + a10 * dy + a11 * dx - 0.5
                if y < -0.5 or x < -0.5 or y > height - 0.5 or x > width - 0.5:
                    continue
                if shrinking:
                    value = 0.0
                    for sub_y in (-0.25, 0.25):
                        for sub_x in (-0.25, 0.25):
                            at_y = y + a00 * sub_y + a01 * sub_x
                            at_x = x + a10 * sub_y + a11 * sub_x
                            part = interpolate(near, at_y, at_x)
                            if share != 0.0:
                                part = part * (1 - share) + interpolate(far, at_y, at_x) * share
                            value += part
                    value *= 0.25
                else:
                    value = interpolate(near, y, x)
                    if share != 0.0:
                        value = value * (1 - share) + interpolate(far, y, x) * share
                image[k, i, j] = value * gain + bias
                row = min(max(math.floor(y + 0.5), 0), height - 1)
                column = min(max(math.floor(x + 0.5), 0), width - 1)
                label = labels[nearest_z, np.uintp(row), np.uintp(column)]
                crop_labels[k, i, j] = label
                if label == 0:
                    if flows[nearest_z, np.uintp(row), np.uintp(column), component_y] == UNKNOWN_FLOW:
                        crop_labels[k, i, j] = -1
                    continue
                y0 = math.floor(y)
                x0 = math.floor(x)
                flow_z = 0.0
                flow_y = 0.0
                flow_x = 0.0
                total = 0.0
                for nz in range(first_z, end_z):
                    weight_z = 1.0 - abs(z - nz)
                    for ny in (y0, y0 + 1):
                        if ny < 0 or ny >= height:
                            continue
                        weight_y = weight_z * (1.0 - abs(y - ny))
                        for nx in (x0, x0 + 1):
                            if nx < 0 or nx >= width:
                                continue
                            in_z, in_y, in_x = np.uintp(nz), np.uintp(ny), np.uintp(nx)
                            if labels[in_z, in_y, in_x] != label:
                                continue
                            weight = weight_y * (1.0 - abs(x - nx))
                            total += weight
                            if solid:
                                flow_z += weight * flows[in_z, in_y, in_x, 0]
                            flow_y += weight * flows[in_z, in_y, in_x, component_y]
                            flow_x += weight * flows[in_z, in_y, in_x, component_x]
                if total <= 0.0:
                    continue
                length = total * FLOW_STEPS
                if not solid:
                    # in this order, planes have the same last bits as ever
                    flow_y /= length
                    flow_x /= length
                    length = max(math.hypot(flow_y, flow_x), 0.5)
                elif unit:
                    length = max(math.sqrt(flow_z**2 + flow_y**2 + flow_x**2), 0.5 * length)
                if solid:
                    crop_flows[0, k, i, j] = plan.flip_z * flow_z / length
                # the inverse of an orthogonal matrix is its transpose
                crop_flows[component_y, k, i, j] = (plan.q00 * flow_y + plan.q10 * flow_x) / length
                crop_flows[component_x, k, i, j] = (plan.q01 * flow_y + plan.q11 * flow_x) / length
