"""Cutting a labelled volume into planes of three views: the recipe's training data.

A volume is brought to cubic voxels, then every n-th xy, xz and yz plane is taken if it shows enough nuclei.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nuclei3d.errors import InputError
from nuclei3d.grid import isotropic_shape, resize_linear, resize_nearest
from nuclei3d.images.voxel_size import VoxelSize

View = Literal["xy", "xz", "yz"]
VIEW_AXIS: Mapping[View, int] = {"xy": 0, "xz": 1, "yz": 2}
"""The axis of (z, y, x) along which the planes of a view are counted."""


@dataclass(frozen=True)
class IsotropicVolume:
    """An image and its labels on cubic voxels of `voxel_um` micrometres, both (Z, Y, X)."""

    image: NDArray[np.generic]
    labels: NDArray[np.uint32]
    voxel_um: float


@dataclass(frozen=True)
class Plane:
    """One plane: the image, its labels without slivers, and where it was cut.

    `image` and `labels` have the shape (Z, X) for xz, (Z, Y) for yz, (Y, X) for xy.
    """

    view: View
    index: int
    image: NDArray[np.generic]
    labels: NDArray[np.uint16]
    label_of: NDArray[np.uint32]
    """The volume's label behind each of the plane's labels 1..n (entry 0 is 0)."""

    @property
    def nuclei(self) -> int:
        """Number of nuclei that the plane shows."""
        return len(self.label_of) - 1


def to_isotropic(
    image: NDArray[np.generic], labels: NDArray[np.integer[Any]], voxel_size: VoxelSize, downsample_xy: float
) -> IsotropicVolume:
    """Downsample in x and y, then resample z to cubic voxels.

    Parameters
    ----------
    image, labels
        (Z, Y, X). The image is interpolated linearly, labels by nearest neighbour.
    voxel_size
        Of the input.
    downsample_xy
        How many times wider the cubic voxels are than the input's in x.
    """
    voxel_um = voxel_size.x * downsample_xy
    shape = isotropic_shape(image.shape, voxel_size, voxel_um)
    if min(shape) < 2:
        raise InputError(
            f"prepare.downsample_xy = {downsample_xy:g} shrinks a volume of shape {image.shape} to {shape}; "
            "give a smaller number"
        )
    resized = resize_linear(image, shape)
    if np.issubdtype(image.dtype, np.unsignedinteger) and image.dtype.itemsize <= 2:
        resized = np.rint(resized).astype(np.uint16)
    return IsotropicVolume(resized, resize_nearest(labels, shape).astype(np.uint32, copy=False), voxel_um)


def drop_slivers(
    labels: NDArray[np.integer[Any]], min_area_px: int
) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    """Remove nuclei cut so tangentially that less than `min_area_px` is left, and renumber the others.

    Returns
    -------
    labels
        The plane with labels 1..n.
    label_of
        The original label of each, entry 0 being 0.
    """
    values, inverse, areas = np.unique(labels, return_inverse=True, return_counts=True)
    keep = (values != 0) & (areas >= min_area_px)
    new = np.zeros(len(values), dtype=np.uint16)
    new[keep] = np.arange(1, keep.sum() + 1)
    label_of = np.concatenate([[0], values[keep]]).astype(np.uint32)
    return new[inverse].reshape(labels.shape), label_of


def plane_indices(length: int, step: int) -> range:
    """Give the indices of the planes looked at: every `step`-th from half a step on; none if `step` is 0."""
    return range(step // 2, length, step) if step > 0 else range(0)


def cut_planes(
    volume: IsotropicVolume,
    steps: Mapping[View, int],
    *,
    min_nuclei: int,
    min_area_px: int,
    sparse_share: float = 0.0,
) -> Iterator[Plane]:
    """Cut planes from the three views.

    Parameters
    ----------
    volume
        Image and labels on cubic voxels.
    steps
        For each view, every how many planes one is taken (0: none).
    min_nuclei
        A plane with fewer nuclei is left out,
    min_area_px
        where a nucleus counts if it covers at least this many pixels of the plane,
    sparse_share
        unless it belongs to this share of the left out planes, taken evenly through the view.
    """
    for view, axis in VIEW_AXIS.items():
        passed_over = 0
        for index in plane_indices(volume.labels.shape[axis], steps.get(view, 0)):
            labels, label_of = drop_slivers(np.take(volume.labels, index, axis=axis), min_area_px)
            if len(label_of) - 1 < min_nuclei:
                # even spacing without a generator: take one each time the share passes an integer
                passed_over += 1
                if int(passed_over * sparse_share) == int((passed_over - 1) * sparse_share):
                    continue
            yield Plane(view, index, np.take(volume.image, index, axis=axis), labels, label_of)


def drop_small_labels(
    labels: NDArray[np.integer[Any]], voxel_size: VoxelSize, min_volume_um3: float
) -> tuple[NDArray[np.integer[Any]], int]:
    """Make labels below a volume background, such as the debris of hand labelling.

    Parameters
    ----------
    labels
        (z, y, x), 0 for background; left as it is.
    voxel_size
        Of the labels.
    min_volume_um3
        Least volume that is kept; 0 keeps all.

    Returns
    -------
    labels : array of the same shape and dtype
        Without the small ones; the others keep their numbers.
    dropped : int
        How many labels went.
    """
    small = [
        label for label, volume in nucleus_volumes_um3(labels, voxel_size).items() if volume < min_volume_um3
    ]
    if not small:
        return labels, 0
    return np.where(np.isin(labels, small), 0, labels).astype(labels.dtype), len(small)


def nucleus_volumes_um3(labels: NDArray[np.integer[Any]], voxel_size: VoxelSize) -> dict[int, float]:
    """Measure the volume of each label in cubic micrometres."""
    values, counts = np.unique(labels, return_counts=True)
    return {
        int(value): float(count) * voxel_size.volume_um3
        for value, count in zip(values, counts, strict=True)
        if value != 0
    }


def sphere_diameter_um(volume_um3: float) -> float:
    """Diameter of the sphere of equal volume."""
    return float((6.0 * volume_um3 / np.pi) ** (1.0 / 3.0))
