"""The two grids of a prediction: the view grid, on which flows are followed, and the image's own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.resampling import isotropic_shape, resize_nearest
from nuclei3d.core.segmentation.settings import SegmentationSettings
from nuclei3d.errors import InputError
from nuclei3d.volumes.voxel_size import VoxelSize

_LEAST_PIXELS = 8
_LEAST_DIAMETER_VOXELS = 3.0
_MOST_UNEQUAL = 3.0
"""Ratio of the edges in y and x beyond which the order of the three was mistaken."""


def view_grid(
    shape: tuple[int, ...], voxel_size: VoxelSize, settings: SegmentationSettings
) -> tuple[tuple[int, int, int], VoxelSize, int]:
    """Choose the view grid.

    Returns
    -------
    shape : tuple of int
        x and y at the network's scale; z as in the image, or at the network's scale if that is coarser.
    voxel_size : VoxelSize
        Of that grid.
    stretched_depth : int
        Number of voxels along z at the network's scale.
    """
    depth, height, width = isotropic_shape(shape, voxel_size, settings.network_voxel_um)
    grid = (min(shape[0], depth), height, width)
    edges = [size * old / new for size, old, new in zip(voxel_size.zyx, shape, grid, strict=True)]
    return grid, VoxelSize.of(edges), max(depth, grid[0])


def check_scale(shape: tuple[int, ...], voxel_size: VoxelSize, settings: SegmentationSettings) -> None:
    """Check that a volume has planes to look at once it is at the network's scale.

    Raises
    ------
    InputError
        If the volume is not 3D or one plane thin, its voxels are far from square in the plane, or the
        diameter makes planes vanish.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"a volume (z, y, x) was expected, got an array of shape {tuple(shape)}")
    if shape[0] < 2 and settings.mode != "stitch":
        raise InputError(
            f"the volume has a single plane (shape {tuple(shape)}); mode '{settings.mode}' needs several: "
            "use --mode stitch for planes"
        )
    if max(voxel_size.y, voxel_size.x) > _MOST_UNEQUAL * min(voxel_size.y, voxel_size.x):
        raise InputError(
            f"voxels of {voxel_size} are not square in the plane; the order is z, y, x: check the voxel size "
            "(data.voxel_size_um)"
        )
    _, height, width = isotropic_shape(shape, voxel_size, settings.network_voxel_um)
    across = settings.nucleus_diameter_um / voxel_size.x
    where = (
        f"a nucleus diameter of {settings.nucleus_diameter_um:g} um is {across:.3g} voxels at voxels of "
        f"{voxel_size}"
    )
    mend = "check the voxel size (data.voxel_size_um) and the diameter (predict.diameter_um)"
    if min(height, width) < _LEAST_PIXELS:
        raise InputError(
            f"{where}: planes of {shape[1]} x {shape[2]} would shrink to {height} x {width}; {mend}"
        )
    if across < _LEAST_DIAMETER_VOXELS:
        raise InputError(f"{where}, too few to see a nucleus; {mend}")


def to_image_grid(
    labels: NDArray[np.uint32], scores: NDArray[np.float32], shape: tuple[int, ...]
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Bring labels to the image's grid by nearest neighbour; a label that vanishes leaves no gap."""
    if labels.shape == tuple(shape):
        return labels, scores
    resized = np.asarray(resize_nearest(labels, shape), dtype=np.uint32)
    present = np.zeros(len(scores), np.bool_)
    present[np.unique(resized)] = True
    present[0] = True
    if not present.all():
        table = np.cumsum(present, dtype=np.uint32) - np.uint32(1)
        table[~present] = 0
        resized = table[resized]
    return resized, scores[present]
