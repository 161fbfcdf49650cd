"""The data set of a 3D network: every labelled frame as a volume with its 3D flows, ready to be mapped."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.core.label_boxes import compact_labels
from nuclei3d.core.resampling import isotropic_shape, resize_linear, resize_nearest
from nuclei3d.core.targets.flow_targets import flows_3d, tanh_flows_3d
from nuclei3d.core.training.stored_images import quantise_flows, quantise_image
from nuclei3d.core.training.volume_set import compact_type, measure_flow_power
from nuclei3d.errors import InputError
from nuclei3d.stages.prepared_frames import PreparedFrame, measure_frame
from nuclei3d.stages.training_volumes import SUFFIXES
from nuclei3d.volumes.embryos import EmbryoFrame, LabelledVolume
from nuclei3d.volumes.voxel_size import VoxelSize

NUCLEI_COLUMNS = ("file", "label", "z", "y", "x", "volume_um3", "contrast")


@dataclass(frozen=True)
class VolumeRecord:
    """One row of manifest.csv: where a volume came from, what is in it, and how it is stored."""

    part: str
    file: str
    embryo: str
    frame: str
    nuclei: int
    min_contrast: float
    norm_low: float
    norm_high: float
    depth: int
    height: int
    width: int
    voxel_z_um: float
    voxel_y_um: float
    voxel_x_um: float
    step: float
    offset: float
    flow_power_z: float
    flow_power_y: float
    flow_power_x: float
    md5: str


@dataclass(frozen=True)
class PreparedVolume(PreparedFrame[VolumeRecord]):
    """What one frame gave; `nuclei` are its rows of the table of nuclei."""

    nuclei: tuple[tuple[Any, ...], ...]


def store_frame(task: tuple[str, EmbryoFrame], params: Params, folder: Path) -> PreparedVolume:
    """Write one frame into ``folder/<part>``: image, labels and flows as .npy, which training maps.

    x and y are downsampled as for planes, z keeps its planes. The image is uint16, labels are 1..n, flows
    int8 (Z, Y, X, 3) in units of 1/127.
    """
    part, frame = task
    measured = measure_frame(frame, params)
    image, labels, voxel_size = _to_grid(measured.volume, params.prepare.downsample_xy)
    numbers = np.unique(labels)
    numbers = numbers[numbers > 0]
    labels = compact_labels(labels)
    if params.prepare.targets == "tanh":
        flows = tanh_flows_3d(labels)
    else:
        flows = flows_3d(labels, voxel_size, threads=None if params.prepare.workers == 1 else 1)
    pixels, step, offset = quantise_image(image)
    stem = f"{frame.embryo}_{frame.frame}"
    arrays = (pixels, compact_type(labels), quantise_flows(flows))
    depth, height, width = labels.shape
    power = measure_flow_power(flows, labels)
    record = VolumeRecord(
        part=part,
        file=f"{part}/{stem}",
        embryo=frame.embryo,
        frame=frame.frame,
        nuclei=len(numbers),
        min_contrast=measured.faintest(numbers),
        norm_low=measured.intensity.low,
        norm_high=measured.intensity.high,
        depth=depth,
        height=height,
        width=width,
        voxel_z_um=voxel_size.z,
        voxel_y_um=voxel_size.y,
        voxel_x_um=voxel_size.x,
        step=step,
        offset=offset,
        flow_power_z=power[0],
        flow_power_y=power[1],
        flow_power_x=power[2],
        md5=_write_arrays(folder / part, stem, arrays),
    )
    nuclei = _nuclei(record.file, labels, voxel_size, measured.contrasts[numbers])
    return PreparedVolume((record,), voxel_size.x, *measured.figures(), tuple(nuclei))


def _to_grid(
    volume: LabelledVolume, downsample_xy: float
) -> tuple[NDArray[np.generic], NDArray[np.integer[Any]], VoxelSize]:
    """Downsample x and y; z keeps its planes unless they lie closer than x and y then do."""
    edge = volume.voxel_size.x * downsample_xy
    depth, height, width = isotropic_shape(volume.image.shape, volume.voxel_size, edge)
    shape = (min(volume.image.shape[0], depth), height, width)
    if min(shape) < 2:
        raise InputError(
            f"prepare.downsample_xy = {downsample_xy:g} shrinks a volume of shape {volume.image.shape} to "
            f"{shape}; give a smaller number"
        )
    edges = [
        size * old / new
        for size, old, new in zip(volume.voxel_size.zyx, volume.image.shape, shape, strict=True)
    ]
    image: NDArray[np.generic] = resize_linear(volume.image, shape)
    if np.issubdtype(volume.image.dtype, np.unsignedinteger) and volume.image.dtype.itemsize <= 2:
        image = np.rint(image).astype(np.uint16)
    labels = resize_nearest(volume.labels, shape).astype(np.uint32, copy=False)
    return image, labels, VoxelSize.of(edges)


def _write_arrays(folder: Path, stem: str, arrays: Sequence[NDArray[np.generic]]) -> str:
    """Write image, labels and flows; return the md5 of the three."""
    digest = hashlib.md5(usedforsecurity=False)
    for suffix, array in zip(SUFFIXES, arrays, strict=True):
        path = folder / f"{stem}{suffix}.npy"
        np.save(path, np.ascontiguousarray(array), allow_pickle=False)
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _nuclei(
    file: str, labels: NDArray[np.integer[Any]], voxel_size: VoxelSize, contrasts: NDArray[np.float64]
) -> list[tuple[Any, ...]]:
    count = len(contrasts) + 1
    flat = labels.ravel()
    voxels = np.bincount(flat, minlength=count)[1:]
    centres = []
    for axis, size in enumerate(labels.shape):
        along = [1, 1, 1]
        along[axis] = size
        place = np.broadcast_to((np.arange(size) + 0.5).reshape(along), labels.shape)
        centres.append(np.bincount(flat, weights=place.ravel(), minlength=count)[1:] / voxels)
    return [
        (
            file,
            label,
            *(f"{centre[label - 1]:.6g}" for centre in centres),
            f"{voxels[label - 1] * voxel_size.volume_um3:.6g}",
            f"{contrasts[label - 1]:.6g}" if np.isfinite(contrasts[label - 1]) else "",
        )
        for label in range(1, count)
    ]


def write_nuclei(path: Path, results: Sequence[PreparedVolume]) -> None:
    """Write the table of all nuclei: positions in voxels of the stored volume, volume and contrast."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(NUCLEI_COLUMNS)
        writer.writerows(row for result in results for row in result.nuclei)
