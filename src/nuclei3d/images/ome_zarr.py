"""OME-Zarr: volumes in chunks on disk, read and written chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nuclei3d.errors import InputError, missing, reason_of
from nuclei3d.images.layout import ImageInFile, Layout, choose_image
from nuclei3d.images.voxel_size import VoxelSize, micrometres_per, seconds_per, voxel_size_or_reason

if TYPE_CHECKING:
    import zarr

_MARKERS = ("zarr.json", ".zattrs", ".zgroup", ".zarray")
_OLD_AXES = ("t", "c", "z", "y", "x")

# An OME-Zarr may have got its masks inside, which its consolidated metadata list; what those say of the image
# counts by axes and voxel size.
BESIDE_THE_IMAGE = ("labels", ".zmetadata", "zarr.json")


class ZarrArray:
    """The full-resolution array of an OME-Zarr image, or a bare zarr array (z, y, x).

    InputError is raised if the folder is missing or no zarr, its metadata are damaged, or leave open which of
    several images is meant (`image`: number from 0, or name).
    """

    def __init__(self, path: Path, image: str | int | None = None) -> None:
        self.path = path
        self.array, attributes, number, passed_over = _open_array(path, image)
        layout = _read_layout(self.array, attributes, path)
        self.layout = replace(layout, image=number, passed_over=passed_over, chunk=self.array.chunks)

    @property
    def folder(self) -> Path:
        """The folder of the array."""
        return Path(str(self.array.store_path).removeprefix("file://"))

    def read(self, index: tuple[int | slice, ...]) -> NDArray[Any]:
        """Read a part of the array (one integer or slice of step 1 per stored axis) as a copy."""
        try:
            block = np.asarray(self.array[index])
        except MemoryError:
            raise
        except Exception as error:
            raise InputError(
                f"{self.path} is damaged ({reason_of(error)}); copy or export it again"
            ) from error
        return np.ascontiguousarray(block, dtype=self.layout.dtype)


def is_zarr(path: Path) -> bool:
    """Tell whether a folder is a zarr group or array."""
    return path.is_dir() and any((path / marker).exists() for marker in _MARKERS)


def create_zarr(
    path: Path,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    voxel_size: VoxelSize,
    chunks: tuple[int, int, int],
    *,
    labels: bool = False,
    time_step_s: float | None = None,
    version: str = "0.5",
) -> zarr.Array[Any]:
    """Create an OME-Zarr image of one level, filled with 0, to be filled chunk by chunk.

    The array is created at `path` at once; write inside `whole_folder` to have it appear whole. `shape` and
    `chunks` are voxels (z, y, x), the shape with time points before them where there are several; chunks are
    stored one file each. The voxel size goes into the metadata, so that Fiji and napari open it at the right
    scale; `labels` marks the image as labels (``image-label``). `version` is 0.4 or 0.5.
    """
    multiscales = [_one_level("0", "labels" if labels else "image", voxel_size, len(shape), time_step_s)]
    image_label: dict[str, Any] = {"image-label": {"version": version}} if labels else {}
    chunks_txyz = (1, *chunks)[-len(shape) :]
    fitting = tuple(min(chunk, length) for chunk, length in zip(chunks_txyz, shape, strict=True))
    # in OME-Zarr 0.4 chunks lie in a folder for each axis
    layout: dict[str, Any] = {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    if version == "0.5":
        layout = {"dimension_names": tuple("tzyx"[-len(shape) :])}
    try:
        group = _open_new_group(path, version, {"multiscales": multiscales, **image_label})
        return group.create_array(
            "0",
            shape=shape,
            dtype=np.dtype(dtype),
            chunks=fitting,
            fill_value=0,
            **layout,
        )
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; choose a place that can be written"
        ) from error


def create_label_container(
    path: Path, name: str, voxel_size: VoxelSize, ndim: int, time_step_s: float | None
) -> Path:
    """Create an OME-Zarr for labels without their image; give the folder for `create_zarr` to make.

    The labels lie in its ``labels`` group and are, so that every reader finds them, also its image.
    """
    level = _one_level(f"labels/{name}/0", "labels", voxel_size, ndim, time_step_s)
    _open_new_group(path, "0.5", {"multiscales": [level]})
    _open_new_group(path / "labels", "0.5", {"labels": [name]})
    return path / "labels" / name


def image_group(path: Path, image: int) -> Path:
    """Give the folder of an image: the given one, or that of its number in what bioformats2raw wrote."""
    import zarr

    node = zarr.open(store=str(path), mode="r")
    inner = "bioformats2raw.layout" in _ome_attributes(node.attrs.asdict())
    return path / str(image) if inner else path


def ome_version(path: Path) -> str:
    """Give the version in which labels are to be written beside an image: 0.4 in the old zarr, else 0.5."""
    return "0.5" if (path / "zarr.json").is_file() else "0.4"


def enlist_labels(image: Path, name: str) -> None:
    """Name labels, which lie in ``labels/<name>`` of an OME-Zarr image, in the list of its labels."""
    import zarr

    version, folder = ome_version(image), image / "labels"
    attributes: Mapping[str, Any] = {}
    if is_zarr(folder):
        attributes = _ome_attributes(zarr.open_group(str(folder), mode="r").attrs.asdict())
    names = list(attributes.get("labels", ()))
    if name not in names:
        kept = {key: value for key, value in attributes.items() if key not in ("labels", "version")}
        _open_new_group(folder, version, {**kept, "labels": [*names, name]}, mode="a")
    if zarr.open_group(str(image), mode="r").metadata.consolidated_metadata is not None:
        zarr.consolidate_metadata(str(image))


def _open_new_group(path: Path, version: str, ome: dict[str, Any], mode: str = "w") -> zarr.Group:
    import zarr

    new = version == "0.5"
    group = zarr.open_group(store=str(path), mode=mode, zarr_format=3 if new else 2)  # type: ignore[arg-type]
    group.attrs.update({"ome": {"version": "0.5", **ome}} if new else ome)
    return group


def _one_level(
    array: str, name: str, voxel_size: VoxelSize, ndim: int, time_step_s: float | None
) -> dict[str, Any]:
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"]
    scale = list(voxel_size.zyx)
    if ndim == 4:
        unit = {} if time_step_s is None else {"unit": "second"}
        axes.insert(0, {"name": "t", "type": "time", **unit})
        scale.insert(0, time_step_s or 1.0)
    transformations = [{"type": "scale", "scale": scale}]
    return {
        # Not the folder's name: inside whole_folder that is a new one each time.
        "name": name,
        "axes": axes,
        "datasets": [{"path": array, "coordinateTransformations": transformations}],
    }


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


def _open_array(
    path: Path, image: str | int | None = None
) -> tuple[zarr.Array[Any], Mapping[str, Any], int, tuple[str, ...]]:
    """Give the array, its attributes, its number among the images and what the others are."""
    import zarr

    if not path.exists():
        raise missing(path, f"{path} does not exist")
    try:
        node = zarr.open(store=str(path), mode="r")
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as zarr ({reason_of(error)}); give a TIFF or OME-Zarr image"
        ) from error
    if isinstance(node, zarr.Array):
        return node, node.attrs.asdict(), 0, ()
    attributes = _ome_attributes(node.attrs.asdict())
    if "multiscales" not in attributes:
        return _open_series(node, attributes, path, image)
    try:
        dataset = node[str(attributes["multiscales"][0]["datasets"][0]["path"])]
    except (KeyError, IndexError, TypeError, ValueError) as error:  # the last of a path with '..'
        raise InputError(f"{path}: the OME-Zarr metadata name no array that is there ({error})") from error
    if not isinstance(dataset, zarr.Array):
        raise InputError(f"{path}: level 0 of the OME-Zarr image is no array; export it again")
    return dataset, attributes, 0, ()


def _open_series(
    node: zarr.Group, attributes: Mapping[str, Any], path: Path, image: str | int | None
) -> tuple[zarr.Array[Any], Mapping[str, Any], int, tuple[str, ...]]:
    """Step into one of the images that bioformats2raw wrote."""
    count = 0
    while "bioformats2raw.layout" in attributes and str(count) in node:
        count += 1
    if not count:
        what = "a plate" if "plate" in attributes else "no OME-Zarr image (no 'multiscales' in its metadata)"
        raise InputError(f"{path} is {what}; give the folder of one image")
    opened = [_open_array(path / str(number))[:2] for number in range(count)]
    images = []
    for number, (array, inner) in enumerate(opened):
        layout = _read_layout(array, inner, path / str(number))
        images.append(ImageInFile(str(inner["multiscales"][0].get("name", "")), layout.axes, layout.shape))
    chosen, passed_over = choose_image(images, str(path), image)
    return *opened[chosen], chosen, passed_over


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
    place = names.find("T")
    seconds = seconds_per(units[place]) if place >= 0 else None
    return Layout(
        axes=names,
        shape=shape,
        dtype=dtype.newbyteorder("="),
        voxel_size=voxel_size,
        scale_note=note,
        channels=channels if any(channels) else (),
        time_step_s=None if scale is None or seconds is None else scale[place] * seconds,
    )


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
