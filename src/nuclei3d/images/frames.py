"""Frames: single volumes (Z, Y, X) in TIFF and OME-Zarr files and in folders of them, read and checked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.console import say
from nuclei3d.errors import InputError, missing
from nuclei3d.images.layout import FrameAxes, Layout, lay_out_frames
from nuclei3d.images.ome_zarr import ZarrArray, find_label_array, is_zarr
from nuclei3d.images.tiff import TiffArray
from nuclei3d.images.voxel_size import VoxelSize

# Contradictions of voxel sizes that the user knows of: folder, size stated there, size given.
_reported: set[tuple[Path, VoxelSize, VoxelSize]] = set()

_SUFFIXES = (".ome.tiff", ".ome.tif", ".tiff", ".tif", ".ome.zarr", ".zarr")
_TIFF_SUFFIXES = (".tif", ".tiff")


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sort key under which t2 comes before t10."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in parts] + [(-1, text)]


def frame_stem(path: Path) -> str:
    """Give the file name without .tif, .ome.tif, .zarr and the like."""
    lower = path.name.lower()
    for suffix in _SUFFIXES:
        if lower.endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def list_volumes(folder: Path) -> list[Path]:
    """List the TIFF files and zarr folders directly in a folder, in natural order, without hidden ones."""
    paths = [
        path
        for path in folder.iterdir()
        if not path.name.startswith(".")
        and (is_zarr(path) or (path.suffix.lower() in _TIFF_SUFFIXES and path.is_file()))
    ]
    return sorted(paths, key=lambda path: natural_key(path.name))


def volume_paths(source: Path) -> list[Path]:
    """List the volumes that a path stands for: itself, or those in the folder."""
    if not source.exists():
        raise missing(source, f"{source} does not exist")
    if not source.is_dir() or is_zarr(source):
        return [source]
    paths = list_volumes(source)
    if not paths:
        hint = f"; did you mean {source / 'images'}?" if (source / "images").is_dir() else ""
        raise InputError(f"{source} holds no .tif, .tiff or .zarr{hint or '; give a folder that does'}")
    return paths


@dataclass(frozen=True, repr=False)
class Frame:
    """One volume on disk, read when asked.

    A frame is cheap: it holds where the volume lies, not the volume, and can be sent to another process.
    `name` is a stem for the names of outputs, unique within a listing; `voxel_size` was given by the user or
    read from the file; `time` is the index on the time axis of the file. These are None where there is none.
    """

    path: Path
    name: str
    shape: tuple[int, int, int]
    dtype: np.dtype[np.generic]
    voxel_size: VoxelSize | None
    time: int | None
    axes: FrameAxes
    scale_note: str = ""

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"Frame({self.name!r}, {shape} {self.dtype}, {self.voxel_size or 'no voxel size'})"

    def read(self) -> NDArray[Any]:
        """Read the volume (Z, Y, X) in its own type; other frames of the file are not read."""
        return self.read_block((slice(None), slice(None), slice(None)))

    def read_block(self, box: tuple[slice, slice, slice]) -> NDArray[Any]:
        """Read a box (z, y, x) of the volume, touching only the planes or chunks that hold it."""
        with _open(self.path) as array:
            block = array.read(self.axes.stored_index(box))
        return np.ascontiguousarray(self.axes.to_zyx(block))

    def require_voxel_size(self) -> VoxelSize:
        """Give the voxel size; an InputError says how to give it if neither the file nor the user does."""
        if self.voxel_size is not None:
            return self.voxel_size
        note = f" ({self.scale_note})" if self.scale_note else ""
        raise InputError(
            f"{self.path} does not state its voxel size{note}; give it in um in the order z, y, x: "
            "--set data.voxel_size_um=[2.0,0.35,0.35], or save the file with its scale (Fiji: Image > "
            "Properties)"
        )


def find_frames(
    source: Path, *, channel: str | int | None = None, voxel_size: VoxelSize | None = None
) -> list[Frame]:
    """List the frames of a file or folder: one per file and time point; never none.

    `source` is a TIFF file (plain, ImageJ, OME), an OME-Zarr folder (0.4, 0.5; level 0 is read), or a folder
    of such, taken in natural order (t2 before t10); hidden files are passed over. `channel` is a name or
    number (from 0) where there are several. `voxel_size` wins over what the files say; where they say
    something else, the user is told once. InputError is raised if there is nothing to read, or a file is
    damaged, not 3D, or leaves the channel open.
    """
    listing = volume_paths(Path(source))
    frames: list[Frame] = []
    shared: set[Path] = set()
    for path in listing:
        if path in shared:
            continue
        with _open(path) as array:
            layout = array.layout
        # Each file of a multi-file OME-TIFF gives the whole set.
        shared.update(path.with_name(name) for name in layout.companions)
        frames.extend(_frames_of(path, layout, channel))
    seen: dict[str, Path] = {}
    for frame in frames:
        other = seen.setdefault(frame.name, frame.path)
        if other is not frame.path:
            raise InputError(
                f"{other} and {frame.path} would give outputs of the same name; rename one of them"
            )
    return frames if voxel_size is None else _rescale(frames, voxel_size)


def single_frame(
    path: Path, *, channel: str | int | None = None, voxel_size: VoxelSize | None = None
) -> Frame:
    """Find the one frame of a file; errors as `find_frames`, and if it holds several time points."""
    frames = find_frames(path, channel=channel, voxel_size=voxel_size)
    if len(frames) > 1:
        raise InputError(
            f"{path} holds {len(frames)} frames where one is wanted; save each in a file of its own"
        )
    return frames[0]


def read_volume(
    path: str | Path,
    *,
    channel: str | int | None = None,
    voxel_size_um: tuple[float, float, float] | None = None,
) -> tuple[NDArray[Any], VoxelSize]:
    """Read the one volume of a file.

    Parameters
    ----------
    path
        TIFF, OME-TIFF or OME-Zarr.
    channel
        Name or number, where there are several.
    voxel_size_um
        Edges (z, y, x); wins over what the file states.

    Returns
    -------
    image : array (z, y, x)
    voxel_size : VoxelSize
        As `Segmenter.segment` takes it; its numbers are ``voxel_size.zyx``.

    Raises
    ------
    InputError
        If there is no such file, it holds no single volume, or its voxel size is unknown.

    Examples
    --------
    >>> from nuclei3d import read_volume
    >>> image, voxel_size = read_volume("embryo.tif", voxel_size_um=(2.0, 0.174, 0.174))
    """
    given = VoxelSize.of(voxel_size_um) if voxel_size_um is not None else None
    frame = single_frame(Path(path), channel=channel, voxel_size=given)
    return frame.read(), frame.require_voxel_size()


def single_label_frame(path: Path) -> Frame:
    """Find the one label volume of a file or OME-Zarr folder."""
    return single_frame(find_label_array(path) if is_zarr(path) else path)


def read_labels(path: Path) -> NDArray[np.uint32]:
    """Read a label volume: uint32 (Z, Y, X); 0 is background.

    `path` is a TIFF file, or an OME-Zarr label image or image with one entry in its ``labels`` group.
    """
    return to_labels(single_label_frame(path).read(), str(path))


def to_labels(labels: NDArray[Any], where: str) -> NDArray[np.uint32]:
    """Check labels (Z, Y, X), integers from 0 to 2**32 - 1, and turn them into uint32."""
    if labels.dtype.kind not in "bui":
        raise InputError(
            f"{where} holds {labels.dtype} values where labels are wanted, expected integers; save it as "
            "16-bit (Fiji: Image > Type > 16-bit, without scaling)"
        )
    if labels.size:
        if labels.dtype.kind == "i" and labels.min() < 0:
            raise InputError(
                f"{where} holds the negative label {labels.min()}; labels count from 1, 0 is background"
            )
        if labels.dtype.itemsize > 4 and labels.max() > np.iinfo(np.uint32).max:
            raise InputError(
                f"{where} holds the label {labels.max()}, expected at most 2**32 - 1; renumber the labels"
            )
    return labels.astype(np.uint32, copy=False)


def check_image(image: NDArray[Any], where: str, *, part: bool = False) -> None:
    """Raise InputError if an array is no volume (Z, Y, X), each axis longer than 1, of real numbers.

    NaN and infinite ones are fill around it; a `part` of a larger volume may be fill altogether. `where` is
    the name of the file for messages.
    """
    if image.ndim != 3 or min(image.shape) < 2:
        shape = " x ".join(map(str, image.shape))
        raise InputError(f"{where} is no volume (shape {shape}); expected three axes (z, y, x) longer than 1")
    if image.dtype.kind not in "buif":
        raise InputError(f"{where} holds {image.dtype} values; expected integers or floats")
    if image.dtype.kind == "f" and not part and not any(np.isfinite(plane).any() for plane in image):
        raise InputError(f"{where} holds no finite number; NaN may stand around an image, not for all of it")


def _open(path: Path) -> AbstractContextManager[TiffArray | ZarrArray]:
    return nullcontext(ZarrArray(path)) if is_zarr(path) else TiffArray(path)


def _frames_of(path: Path, layout: Layout, channel: str | int | None) -> Iterable[Frame]:
    stem = frame_stem(path)
    found = lay_out_frames(layout, str(path), channel)
    digits = max(3, len(str(len(found) - 1)))
    for axes in found:
        z, y, x = (layout.shape[place] for place in axes.spatial)
        yield Frame(
            path=path,
            name=stem if axes.time is None else f"{stem}_t{axes.time:0{digits}d}",
            shape=(z, y, x),
            dtype=layout.dtype,
            voxel_size=layout.voxel_size,
            time=axes.time,
            axes=axes,
            scale_note=layout.scale_note,
        )


def _rescale(frames: list[Frame], given: VoxelSize) -> list[Frame]:
    """Put the given voxel size in the place of the files', and say so where they differ."""
    for frame in frames:
        stated = frame.voxel_size
        # of a folder the first such file only: stages read a folder file by file
        if (
            stated is not None
            and stated.differs_from(given)
            and (frame.path.parent, stated, given) not in _reported
        ):
            _reported.add((frame.path.parent, stated, given))
            say(
                f"{frame.path} says voxels of {stated}; the given {given} is used instead, here and in its "
                "folder"
            )
    return [replace(frame, voxel_size=given, scale_note="") for frame in frames]
