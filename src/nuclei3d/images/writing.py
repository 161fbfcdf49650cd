"""Writing volumes as OME-TIFF that opens at the right scale everywhere, with the same bytes each time."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.outputs import whole_file

# Offsets of a classic TIFF have 32 bits; 32 MiB are left for the metadata of many planes.
CLASSIC_TIFF_BYTES = 2**32 - 2**25

# What OME knows; the others are widened without loss, or, beyond 2**53, refused.
_OME_DTYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64")


def write_image(path: Path, image: NDArray[Any], voxel_size: VoxelSize) -> None:
    """Write an image (Z, Y, X) as OME-TIFF, whole or not at all.

    `path` is best called ``<name>.ome.tif`` or ``<name>.tif``. bool becomes uint8 and float16 float32. The
    voxel size goes into the OME metadata, into ImageJ's and into the resolution tags. Raises ValueError if
    the array is not 3D or of a type that TIFF readers do not know.
    """
    if image.ndim != 3:
        raise ValueError(f"expected an image (Z, Y, X), got shape {image.shape}")
    if image.dtype == np.bool_:
        image = image.astype(np.uint8)
    elif image.dtype == np.float16:
        image = image.astype(np.float32)
    if image.dtype.name not in _OME_DTYPES:
        raise ValueError(f"OME-TIFF holds no {image.dtype}; convert the image first")
    _write_ome_tiff(path, image, voxel_size)


def write_labels(path: Path, labels: NDArray[Any], voxel_size: VoxelSize) -> None:
    """Write labels as `write_image` does an image; uint16 where the numbers fit, else uint32."""
    if labels.ndim != 3 or labels.dtype.kind not in "bui":
        raise ValueError(f"expected integer labels (Z, Y, X), got {labels.dtype} of shape {labels.shape}")
    highest = int(labels.max(initial=0))
    if highest > np.iinfo(np.uint32).max or int(labels.min(initial=0)) < 0:
        raise ValueError("labels must lie between 0 and 2**32 - 1")
    dtype = np.uint16 if highest <= np.iinfo(np.uint16).max else np.uint32
    _write_ome_tiff(path, labels.astype(dtype, copy=False), voxel_size)


def _write_ome_tiff(path: Path, volume: NDArray[Any], voxel_size: VoxelSize) -> None:
    """Write planes compressed by zlib, without a predictor, as ImageJ misreads predicted 16-bit planes.

    The first page carries two descriptions, as tifffile's own files do: OME-XML, which Bio-Formats and
    tifffile read, and after it ImageJ's, as ImageJ's own TIFF reader (File > Open in Fiji) knows no OME-XML
    and would show planes 1 um apart. Readers that expect one description take the first.
    """
    options: dict[str, Any] = {
        "photometric": "minisblack",
        "compression": "zlib",
        # ImageJ counts pixels per unit of its description, whatever the tag ResolutionUnit says.
        "resolution": (1 / voxel_size.x, 1 / voxel_size.y),
        "resolutionunit": "NONE",
        "software": "nuclei3d",
        "description": _ome_xml(volume, voxel_size).encode("utf-8"),
        # Makes room for the second description.
        "metadata": {"axes": "ZYX"},
    }
    big = volume.nbytes > CLASSIC_TIFF_BYTES
    with whole_file(path) as partial, tifffile.TiffWriter(partial, bigtiff=big, shaped=True) as writer:
        writer.write(volume, **options)
        writer.overwrite_description(_imagej_description(volume.shape[0], voxel_size))


def _ome_xml(volume: NDArray[Any], voxel_size: VoxelSize) -> str:
    sizes: dict[str, Any] = {}
    for axis, edge in zip("ZYX", voxel_size.zyx, strict=True):
        sizes[f"PhysicalSize{axis}"] = edge
        sizes[f"PhysicalSize{axis}Unit"] = "µm"
    # tifffile would invent a new UUID at each run, and with it new bytes and a new md5.
    document = tifffile.OmeXml(UUID=_content_uuid(volume, voxel_size), Creator="nuclei3d")
    depth, height, width = volume.shape
    document.addimage(volume.dtype, volume.shape, (depth, 1, 1, height, width, 1), axes="ZYX", **sizes)
    return document.tostring(declaration=True)


def _imagej_description(depth: int, voxel_size: VoxelSize) -> str:
    # The version is that of the format, as tifffile writes it too.
    return (
        f"ImageJ=1.11a\nimages={depth}\nslices={depth}\nunit=micron\nspacing={voxel_size.z!r}\nloop=false\n"
    )


def _content_uuid(volume: NDArray[Any], voxel_size: VoxelSize) -> str:
    """Name the content: OME readers tell files apart by this number, so it may not be one for all."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((volume.shape, volume.dtype.str, voxel_size.zyx)).encode())
    for plane in volume:
        digest.update(np.ascontiguousarray(plane).data)
    return str(uuid.UUID(bytes=digest.digest(), version=4))
