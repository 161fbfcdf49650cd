"""OME-Zarr: volumes in chunks on disk, read and written chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nuclei3d.errors import InputError, missing
from nuclei3d.images.layout import Layout
from nuclei3d.images.voxel_size import VoxelSize, micrometres_per, voxel_size_or_reason

if TYPE_CHECKING:
    import zarr

_MARKERS = ("zarr.json", ".zattrs", ".zgroup", ".zarray")
_OLD_AXES = ("t", "c", "z", "y", "x")


class ZarrArray:
    """The full-resolution array of an OME-Zarr image, or a bare zarr array (z, y, x).

    InputError is raised if the folder is missing or no zarr, or its metadata are not those of one image.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.array, attributes = _open_array(path)
        self.layout = _read_layout(self.array, attributes, path)

    def read(self, index: tuple[int | slice, ...]) -> NDArray[Any]:
        """Read a part of the array (one integer or slice of step 1 per stored axis) as a copy."""
        try:
            block = np.asarray(self.array[index])
        except MemoryError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self.path} is damaged ({reason}); copy or export it again") from error
        return np.ascontiguousarray(block, dtype=self.layout.dtype)


def is_zarr(path: Path) -> bool:
    """Tell whether a folder is a zarr group or array."""
    return path.is_dir() and any((path / marker).exists() for marker in _MARKERS)


def create_zarr(
    path: Path,
    shape: tuple[int, int, int],
    dtype: DTypeLike,
    voxel_size: VoxelSize,
    chunks: tuple[int, int, int],
    *,
    labels: bool = False,
) -> zarr.Array[Any]:
    """Create an OME-Zarr 0.5 image of one level, filled with 0, to be filled chunk by chunk.

    The array is created at `path` at once; write inside `whole_folder` to have it appear whole. `shape` and
    `chunks` are voxels (z, y, x); chunks are stored one file each. The voxel size goes into the metadata, so
    that Fiji and napari open it at the right scale; `labels` marks the image as labels (``image-label``).
    """
    import zarr

    ome: dict[str, Any] = {
        "version": "0.5",
        "multiscales": [
            {
                # Not the folder's name: inside whole_folder that is a new one each time.
                "name": "labels" if labels else "image",
                "axes": [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"],
                "datasets": [
                    {
                        "path": "0",
                        "coordinateTransformations": [{"type": "scale", "scale": list(voxel_size.zyx)}],
                    }
                ],
            }
        ],
    }
    if labels:
        ome["image-label"] = {"version": "0.5"}
    fitting = tuple(min(chunk, length) for chunk, length in zip(chunks, shape, strict=True))
    try:
        group = zarr.open_group(store=str(path), mode="w", zarr_format=3, attributes={"ome": ome})
        return group.create_array(
            "0",
            shape=shape,
            dtype=np.dtype(dtype),
            chunks=fitting,
            fill_value=0,
            dimension_names=("z", "y", "x"),
        )
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; choose a place that can be written"
        ) from error


def find_label_array(path: Path) -> Path:
    """Find the labels of an OME-Zarr image: itself, or the one image of its ``labels`` group."""
    group = path / "labels"
    if not is_zarr(group):
        return path
    names = sorted(entry.name for entry in group.iterdir() if is_zarr(entry))
    if not names:
        return path
    if len(names) > 1:
        raise InputError(
            f"{path} holds several label images: {', '.join(names)}; name one, as {group / names[0]}"
        )
    return group / names[0]


def _open_array(path: Path) -> tuple[zarr.Array[Any], Mapping[str, Any]]:
    import zarr

    if not path.exists():
        raise missing(path, f"{path} does not exist")
    try:
        node = zarr.open(store=str(path), mode="r")
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path} cannot be read as zarr ({reason}); give a TIFF or OME-Zarr image"
        ) from error
    if isinstance(node, zarr.Array):
        return node, node.attrs.asdict()
    attributes = _ome_attributes(node.attrs.asdict())
    if "multiscales" not in attributes:
        return _open_single_series(node, attributes, path)
    try:
        dataset = node[str(attributes["multiscales"][0]["datasets"][0]["path"])]
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: the OME-Zarr metadata name no array that is there ({error})") from error
    if not isinstance(dataset, zarr.Array):
        raise InputError(f"{path}: level 0 of the OME-Zarr image is no array; export it again")
    return dataset, attributes


def _open_single_series(
    node: zarr.Group, attributes: Mapping[str, Any], path: Path
) -> tuple[zarr.Array[Any], Mapping[str, Any]]:
    """Step into the first series where bioformats2raw wrote one image only."""
    if "bioformats2raw.layout" in attributes and "0" in node:
        if "1" in node:
            raise InputError(f"{path} holds several images; name one, as {path / '0'}")
        return _open_array(path / "0")
    what = "a plate" if "plate" in attributes else "no OME-Zarr image (no 'multiscales' in its metadata)"
    raise InputError(f"{path} is {what}; give the folder of one image")


def _ome_attributes(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the OME part: at the top in 0.4 and before, under "ome" from 0.5 on."""
    nested = attributes.get("ome")
    return nested if isinstance(nested, Mapping) else attributes


def _read_layout(array: zarr.Array[Any], attributes: Mapping[str, Any], path: Path) -> Layout:
    dtype = np.dtype(array.dtype)
    if dtype.kind not in "biuf":
        raise InputError(f"{path} holds {dtype}, expected numbers")
    shape = tuple(int(length) for length in array.shape)
    if "multiscales" not in attributes:
        return Layout(_bare_axes(array, attributes, path), shape, dtype.newbyteorder("="))
    try:
        multiscale = attributes["multiscales"][0]
        names, units = _named_axes(multiscale.get("axes", _OLD_AXES[-len(shape) :]))
        scale = _total_scale(multiscale, len(shape))
        channels = tuple(
            str(channel.get("label", "")) for channel in attributes.get("omero", {}).get("channels", ())
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: the OME-Zarr metadata are damaged ({error!r}); export it again") from error
    if len(names) != len(shape):
        raise InputError(
            f"{path}: {len(names)} axes are named for an array of {len(shape)} axes; export it again"
        )
    edges: list[float | None] = []
    for axis in "ZYX":
        place = names.find(axis)
        micrometres = micrometres_per(units[place]) if place >= 0 else None
        edges.append(None if scale is None or micrometres is None else scale[place] * micrometres)
    voxel_size, note = voxel_size_or_reason(*edges)
    if scale is not None and voxel_size is None and not note:
        note = "its axes have no unit of length"
    return Layout(names, shape, dtype.newbyteorder("="), voxel_size, note, channels if any(channels) else ())


def _bare_axes(array: zarr.Array[Any], attributes: Mapping[str, Any], path: Path) -> str:
    """Name the axes of an array without OME metadata: as it or xarray names them, else z, y, x."""
    names = getattr(array.metadata, "dimension_names", None) or attributes.get("_ARRAY_DIMENSIONS")
    if names and all(names):
        letters, _ = _named_axes([str(name) for name in names])
        return letters
    if len(array.shape) > 3:
        raise InputError(f"{path} has {len(array.shape)} axes without names; export it as OME-Zarr, or as 3D")
    return "ZYX"[-len(array.shape) :]


def _named_axes(axes: Sequence[Any]) -> tuple[str, list[str]]:
    """Give one letter and one unit per axis; from 0.4 on axes are mappings, before they were texts."""
    letters = []
    units = []
    for axis in axes:
        name = str(axis["name"] if isinstance(axis, Mapping) else axis)
        letter = name[:1].upper()
        letters.append(letter if name.lower() in ("t", "c", "z", "y", "x", "time", "channel") else "Q")
        units.append(str(axis.get("unit") or "") if isinstance(axis, Mapping) else "")
    return "".join(letters), units


def _total_scale(multiscale: Mapping[str, Any], ndim: int) -> list[float] | None:
    """Multiply the scale of level 0 with the one that holds for all levels."""
    transformations = [
        *multiscale["datasets"][0].get("coordinateTransformations", ()),
        *multiscale.get("coordinateTransformations", ()),
    ]
    scales = [entry["scale"] for entry in transformations if entry.get("type") == "scale"]
    if not scales:
        return None
    total = [1.0] * ndim
    for scale in scales:
        total = [a * float(b) for a, b in zip(total, scale, strict=True)]
    return total
