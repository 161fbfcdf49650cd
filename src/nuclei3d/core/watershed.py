"""The baseline without learning: Otsu's threshold and a watershed on the distance transform."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter, label, maximum_filter

from nuclei3d.errors import InputError
from nuclei3d.volumes.voxel_size import VoxelSize


def otsu_watershed(
    image: NDArray[np.number[Any]], voxel_size: VoxelSize, nucleus_diameter_um: float
) -> NDArray[np.uint32]:
    """Segment nuclei by a global threshold, then cut touching ones where the foreground narrows.

    Every length scales with the nucleus, so nothing is tuned to a data set: smoothing with a sigma of
    1/20 of the diameter, distance maxima at least 0.45 of the diameter apart as seeds, objects below 1/10 of
    the volume of a nucleus dropped.

    Parameters
    ----------
    image
        Volume (Z, Y, X) of any numeric type.
    nucleus_diameter_um
        Typical diameter of a nucleus.

    Returns
    -------
    labels
        Same shape, 1..n without gaps.
    """
    from skimage.filters import threshold_otsu
    from skimage.segmentation import watershed

    if image.ndim != 3:
        raise InputError(f"the watershed wants a volume (Z, Y, X), got shape {image.shape}")
    empty = np.zeros(image.shape, dtype=np.uint32)
    smooth = gaussian_filter(image.astype(np.float32), _voxels(nucleus_diameter_um / 20, voxel_size))
    if smooth.size == 0 or smooth.min() == smooth.max():
        return empty
    foreground = smooth > float(threshold_otsu(smooth))
    distance = distance_transform_edt(foreground, sampling=voxel_size.zyx).astype(np.float32)
    distance = gaussian_filter(distance, _voxels(nucleus_diameter_um / 20, voxel_size))
    window = [2 * round(0.45 * nucleus_diameter_um / edge) + 1 for edge in voxel_size.zyx]
    peaks = foreground & (distance == maximum_filter(distance, window))
    # Plateaus (neighbouring voxels of equal distance) are one seed.
    seeds, _ = label(peaks, structure=np.ones((3, 3, 3)))
    pieces = watershed(-distance, seeds, mask=foreground)
    smallest = np.pi / 6 * nucleus_diameter_um**3 / 10 / voxel_size.volume_um3
    return _without_small(pieces, smallest)


def _voxels(length_um: float, voxel_size: VoxelSize) -> tuple[float, ...]:
    return tuple(length_um / edge for edge in voxel_size.zyx)


def _without_small(labels: NDArray[np.integer[Any]], smallest: float) -> NDArray[np.uint32]:
    sizes = np.bincount(labels.reshape(-1))
    kept = sizes >= smallest
    kept[0] = False
    lookup = np.where(kept, np.cumsum(kept), 0).astype(np.uint32)
    result: NDArray[np.uint32] = lookup[labels]
    return result
