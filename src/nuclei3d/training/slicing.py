"""Cutting a labelled volume into what a network is trained on: planes of three views, or the whole of it.

For the recipe's planes, a volume is brought to cubic voxels, then every n-th xy, xz and yz plane is taken if
it shows enough nuclei.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.errors import InputError
from nuclei3d.grid import isotropic_shape, resize_linear, resize_nearest
from nuclei3d.images.embryos import LabelledVolume
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.training.samples import SampleView
from nuclei3d.views import VIEW_AXIS, VIEWS, View


@dataclass(frozen=True)
class Cut:
    """A sample as it is cut from a frame; a plane has depth 1, whose rows are z in the views xz and yz.

    `image` and `labels` are (Z, Y, X), labels 1..n; `label_of` has the frame's label behind each of 0..n.
    """

    view: SampleView
    index: int
    image: NDArray[np.generic]
    labels: NDArray[np.unsignedinteger[Any]]
    label_of: NDArray[np.integer[Any]]
    voxel_size: VoxelSize

    @property
    def nuclei(self) -> int:
        """Number of nuclei that the sample shows."""
        return len(self.label_of) - 1


def downsample(volume: LabelledVolume, factor: float, *, isotropic: bool) -> LabelledVolume:
    """Bring image (linearly) and labels (nearest neighbour) to voxels `factor` times wider in x and y.

    Voxels become cubes, as wide as they then are in x; where `isotropic` is false, z keeps its planes unless
    they lie closer.
    """
    old = volume.image.shape
    edge = volume.voxel_size.x * factor
    shape = isotropic_shape(old, volume.voxel_size, edge)
    if not isotropic:
        shape = (min(old[0], shape[0]), *shape[1:])
    if min(shape) < 2:
        raise InputError(
            f"prepare.downsample_xy = {factor:g} shrinks a volume of shape {old} to {shape}; "
            "give a smaller number"
        )
    image = resize_linear(volume.image, shape)
    if np.issubdtype(volume.image.dtype, np.unsignedinteger) and volume.image.dtype.itemsize <= 2:
        image = np.rint(image).astype(np.uint16)
    labels = resize_nearest(volume.labels, shape).astype(np.uint32, copy=False)
    sizes = zip(volume.voxel_size.zyx, old, shape, strict=True)
    edges = [edge] * 3 if isotropic else [size * before / after for size, before, after in sizes]
    return LabelledVolume(image, labels, VoxelSize.of(edges))


def cut_volume(volume: LabelledVolume) -> Cut:
    """Take a whole volume; gaps in its labels go."""
    label_of = np.union1d([0], volume.labels)
    number_of = np.zeros(int(label_of[-1]) + 1, np.uint32)
    number_of[label_of] = np.arange(len(label_of))
    return Cut("volume", 0, volume.image, number_of[volume.labels], label_of, volume.voxel_size)


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
    volume: LabelledVolume,
    steps: Mapping[View, int],
    *,
    min_nuclei: int,
    min_area_px: int,
    sparse_share: float = 0.0,
) -> Iterator[Cut]:
    """Cut planes of cubic voxels from the three views, of each every so many as `steps` says (0: none).

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
            image = np.take(volume.image, index, axis=axis)
            yield Cut(view, index, image[None], labels[None], label_of, volume.voxel_size)


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
