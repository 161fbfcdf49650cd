"""Cutting a labelled volume into planes of three views: the recipe's training data.

A volume is brought to cubic voxels, then every n-th xy, xz and yz plane is taken if it shows enough nuclei.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.errors import InputError
from nuclei3d.grid import isotropic_shape, resize_linear, resize_nearest
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.views import VIEW_AXIS, VIEWS, View


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
    """Bring image (linearly) and labels (nearest neighbour), both (Z, Y, X), to cubic voxels.

    These are `downsample_xy` times wider than the input's in x.
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
    """Remove nuclei cut so tangentially that less than `min_area_px` is left, and renumber the others to
    1..n.

    Gives the plane, and the original label of each nucleus, entry 0 being 0.
    """
    values, inverse, areas = np.unique(labels, return_inverse=True, return_counts=True)
    keep = (values != 0) & (areas >= min_area_px)
    new = np.zeros(len(values), dtype=np.uint16)
    new[keep] = np.arange(1, keep.sum() + 1)
    label_of = np.concatenate([[0], values[keep]]).astype(np.uint32)
    return new[inverse].reshape(labels.shape), label_of


def cut_planes(
    volume: IsotropicVolume,
    steps: Mapping[View, int],
    *,
    min_nuclei: int,
    min_area_px: int,
    sparse_share: float = 0.0,
) -> Iterator[Plane]:
    """Cut planes from the three views, of each every so many as `steps` says (0: none).

    A plane with fewer than `min_nuclei` nuclei of at least `min_area_px` pixels is left out, unless it
    belongs to the share `sparse_share` of these, taken evenly through the view.
    """
    for view in VIEWS:
        axis = VIEW_AXIS[view]
        passed_over = 0
        step = steps.get(view, 0)
        # from half a step on
        for index in range(step // 2, volume.labels.shape[axis], step) if step > 0 else ():
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
    """Make labels below a volume background, such as the debris of hand labelling; the others keep their
    numbers.

    Gives the labels (z, y, x), the very same if none goes, and how many went.
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
