"""The volume as a network is shown it: at its scale, normalised, with the space where nuclei can be."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.normalization import measure_range
from nuclei3d.core.resampling import resize_linear
from nuclei3d.core.segmentation.foreground import OccupiedSpace, occupied_space
from nuclei3d.core.segmentation.settings import SegmentationSettings
from nuclei3d.volumes.voxel_size import VoxelSize


def show_volume(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    shape: tuple[int, int, int],
    grid_voxel_size: VoxelSize,
    settings: SegmentationSettings,
) -> tuple[NDArray[np.float32], OccupiedSpace]:
    """Bring a volume to a network's grid.

    Parameters
    ----------
    image
        (z, y, x), any real dtype, finite.
    voxel_size
        Of the image.
    shape, grid_voxel_size
        Of the grid.
    settings
        Normalisation, and whether empty space is left out.

    Returns
    -------
    volume : float32 array of that shape
        Normalised.
    occupied : OccupiedSpace
        Where nuclei can be.
    """
    intensity = settings.intensity_range or measure_range(
        image, settings.lower_percentile, settings.upper_percentile, settings.noise_floor
    )
    volume = intensity.apply(resize_linear(image, shape))
    diameter_um = settings.nucleus_diameter_um if settings.skip_empty else None
    return volume, occupied_space(volume, intensity, voxel_size, grid_voxel_size, diameter_um)
