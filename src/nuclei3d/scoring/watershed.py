"""The baseline without learning: Otsu's threshold and a watershed on the distance transform."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter, label, maximum_filter

from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import measure_range

#: Name of this baseline: what a model must beat to be worth anything.
OTSU = "Otsu + watershed"


def otsu_watershed(
    image: NDArray[np.number[Any]], voxel_size: VoxelSize, nucleus_diameter_um: float
) -> NDArray[np.uint32]:
    """Segment nuclei in a volume (Z, Y, X) by a global threshold, then cut touching ones where they narrow.

    The image is clipped to its 1st and 99.8th percentile and its square root taken, which evens out shot
    noise and keeps single mitoses from setting the threshold; this makes the baseline a strong one. Every
    length scales with the nucleus: smoothing with a sigma of 1/20 of the diameter, of the distance map 1/10,
    seeds at least 0.3 of the diameter apart, objects below 1/10 of the volume of a nucleus dropped.
    """
    from skimage.filters import threshold_otsu
    from skimage.segmentation import watershed

    if image.ndim != 3:
        raise InputError(f"the watershed wants a volume (Z, Y, X), got shape {image.shape}")
    if image.size == 0:
        return np.zeros(image.shape, dtype=np.uint32)
    image, outside = measure_range(image).clean(image)
    low, high = np.percentile(image.astype(np.float32), (1, 99.8))
    # Rounding to single precision may leave the darkest voxels a hair below the percentile.
    above = np.clip(image.astype(np.float32), low, high) - np.float32(low)
    steady = np.sqrt(np.maximum(above, 0))
    smooth = gaussian_filter(steady, _voxels(nucleus_diameter_um / 20, voxel_size))
    if smooth.min() == smooth.max():
        return np.zeros(image.shape, dtype=np.uint32)
    foreground = smooth > threshold_otsu(smooth)  # type: ignore[no-untyped-call]
    if outside is not None:
        foreground &= ~outside
    distance = distance_transform_edt(foreground, sampling=voxel_size.zyx).astype(np.float32)
    distance = gaussian_filter(distance, _voxels(nucleus_diameter_um / 10, voxel_size))
    window = [2 * round(0.3 * nucleus_diameter_um / edge) + 1 for edge in voxel_size.zyx]
    peaks = foreground & (distance == maximum_filter(distance, window))
    # Plateaus (neighbouring voxels of equal distance) are one seed.
    seeds, _ = label(peaks, structure=np.ones((3, 3, 3)))
    pieces = watershed(-distance, seeds, mask=foreground)  # type: ignore[no-untyped-call]
    smallest = np.pi / 6 * nucleus_diameter_um**3 / 10 / voxel_size.volume_um3
    kept = np.bincount(pieces.reshape(-1)) >= smallest
    kept[0] = False
    labels: NDArray[np.uint32] = np.where(kept, np.cumsum(kept), 0).astype(np.uint32)[pieces]
    return labels


def _voxels(length_um: float, voxel_size: VoxelSize) -> tuple[float, ...]:
    return tuple(length_um / edge for edge in voxel_size.zyx)
