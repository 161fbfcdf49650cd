"""Writing volumes as OME-TIFF that opens at the right scale, with the same bytes each time."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from nuclei3d.volumes.voxel_size import VoxelSize
from nuclei3d.volumes.whole import whole_file

# Offsets of a classic TIFF have 32 bits; 32 MiB are left for the metadata of many planes.
CLASSIC_TIFF_BYTES = 2**32 - 2**25

# What OME knows; the others are widened without loss, or, beyond 2**53, refused.
_OME_DTYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64")


def write_image(path: Path, image: NDArray[Any], voxel_size: VoxelSize) -> None:
    """Write an image as OME-TIFF, whole or not at all.

    Parameters
    ----------
    path
        File to write, best called ``<name>.ome.tif`` or ``<name>.tif``.
    image
        (Z, Y, X); any integer or float type. bool becomes uint8 and float16 float32.
    voxel_size
        Goes into the OME metadata and, in x and y, into the resolution tags.

    Raises
    ------
    InputError
        If the place cannot be written.
    ValueError
        If the array is not 3D or of a type that TIFF readers do not know.
    """
    if image.ndim != 3:
        raise ValueError(f"expected an image (Z, Y, X), got shape {image.shape}")
    if image.dtype == np.bool_:
        image = image.astype(np.uint8)
    elif image.dtype == np.float16:
        image = image.astype(np.float32)
    if image.dtype.name not in _OME_DTYPES:
        raise ValueError(f"OME-TIFF holds no {image.dtype}; convert the image first")
    # Neighbouring voxels of an image are alike: their differences compress far better.
    _write_ome_tiff(path, image, voxel_size, predictor=True)


def write_labels(path: Path, labels: NDArray[Any], voxel_size: VoxelSize) -> None:
    """Write labels as OME-TIFF, whole or not at all; uint16 where the numbers fit, else uint32.

    Parameters
    ----------
    path
        File to write, best called ``<name>.ome.tif`` or ``<name>.tif``.
    labels
        Integers (Z, Y, X) from 0 to 2**32 - 1.
    voxel_size
        As in `write_image`.

    Raises
    ------
    InputError
        If the place cannot be written.
    ValueError
        If the array is not 3D or holds no valid labels.
    """
    if labels.ndim != 3 or labels.dtype.kind not in "bui":
        raise ValueError(f"expected integer labels (Z, Y, X), got {labels.dtype} of shape {labels.shape}")
    highest = int(labels.max(initial=0))
    if highest > np.iinfo(np.uint32).max or int(labels.min(initial=0)) < 0:
        raise ValueError("labels must lie between 0 and 2**32 - 1")
    dtype = np.uint16 if highest <= np.iinfo(np.uint16).max else np.uint32
    _write_ome_tiff(path, labels.astype(dtype, copy=False), voxel_size, predictor=False)


def _write_ome_tiff(path: Path, volume: NDArray[Any], voxel_size: VoxelSize, *, predictor: bool) -> None:
    centimetre_um = 1e4
    metadata: dict[str, Any] = {
        "axes": "ZYX",
        "Creator": "nuclei3d",
        # tifffile would invent a new one at each run, and with it new bytes and a new md5.
        "UUID": _content_uuid(volume, voxel_size),
    }
    for axis, edge in zip("ZYX", voxel_size.zyx, strict=True):
        metadata[f"PhysicalSize{axis}"] = edge
        metadata[f"PhysicalSize{axis}Unit"] = "µm"
    with whole_file(path) as partial:
        tifffile.imwrite(
            partial,
            volume,
            ome=True,
            bigtiff=volume.nbytes > CLASSIC_TIFF_BYTES,
            photometric="minisblack",
            compression="zlib",
            predictor=predictor,
            resolution=(centimetre_um / voxel_size.x, centimetre_um / voxel_size.y),
            resolutionunit="CENTIMETER",
            software="nuclei3d",
            metadata=metadata,
        )


def _content_uuid(volume: NDArray[Any], voxel_size: VoxelSize) -> str:
    """Name the content: OME readers tell files apart by this number, so it may not be one for all."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((volume.shape, volume.dtype.str, voxel_size.zyx)).encode())
    for plane in volume:
        digest.update(np.ascontiguousarray(plane).data)
    return str(uuid.UUID(bytes=digest.digest(), version=4))
