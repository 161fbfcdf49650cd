"""What is measured of each nucleus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize


@dataclass(frozen=True)
class Nucleus:
    """One segmented nucleus.

    Attributes
    ----------
    label : int
        Its number in the label volume.
    z_um, y_um, x_um : float
        Centroid in um; the centre of the first voxel of the volume is at 0.
    volume_um3 : float
    mean_intensity : float
        In units of the input image.
    score : float
        0..1, see `masks.score_labels`.
    """

    label: int
    z_um: float
    y_um: float
    x_um: float
    volume_um3: float
    mean_intensity: float
    score: float


@njit(cache=True, nogil=True)
def _sum_up(labels: NDArray[np.uint32], image: NDArray[Any], sums: NDArray[np.float64]) -> None:
    """Add voxels, z, y, x and intensity of every label to the rows of `sums` (highest label + 1, 5)."""
    depth, height, width = labels.shape
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                label = labels[z, y, x]
                if label != 0:
                    row = sums[label]
                    row[0] += 1.0
                    row[1] += z
                    row[2] += y
                    row[3] += x
                    row[4] += image[z, y, x]


def measure_nuclei(
    labels: NDArray[np.uint32],
    image: NDArray[Any],
    voxel_size: VoxelSize,
    scores: NDArray[np.floating[Any]],
) -> list[Nucleus]:
    """Measure every nucleus of a label volume in one pass.

    Parameters
    ----------
    labels : integer array, shape (Z, Y, X)
        0 is background; numbers may have gaps.
    image : real array, shape (Z, Y, X)
    voxel_size : VoxelSize
    scores : float array, shape (highest label + 1,)
        Score by label.

    Returns
    -------
    list of Nucleus
        In the order of their labels; labels without voxels are left out.

    Raises
    ------
    InputError
        If shapes do not fit or a label has no score.
    """
    if labels.ndim != 3 or labels.shape != image.shape:
        raise InputError(
            f"nuclei: labels {labels.shape} and image {image.shape} must be volumes of one shape"
        )
    count = int(labels.max(initial=0)) + 1
    if len(scores) < count:
        raise InputError(f"nuclei: {len(scores)} scores for labels up to {count - 1}")
    values = image if image.dtype.kind in "iuf" and image.dtype.itemsize > 1 else image.astype(np.float32)
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    sums = np.zeros((count, 5))
    native = values.dtype.newbyteorder("=")
    _sum_up(np.ascontiguousarray(labels, dtype=np.uint32), np.ascontiguousarray(values, dtype=native), sums)
    nuclei = []
    for label in np.flatnonzero(sums[:, 0]):
        voxels, z, y, x, intensity = sums[label]
        nuclei.append(
            Nucleus(
                label=int(label),
                z_um=float(z / voxels * voxel_size.z),
                y_um=float(y / voxels * voxel_size.y),
                x_um=float(x / voxels * voxel_size.x),
                volume_um3=float(voxels * voxel_size.volume_um3),
                mean_intensity=float(intensity / voxels),
                score=float(scores[label]),
            )
        )
    return nuclei
