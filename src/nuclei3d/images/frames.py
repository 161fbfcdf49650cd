"""Frames: single volumes (Z, Y, X) in TIFF and OME-Zarr files and in folders of them, read and checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.console import some_of, warn
from nuclei3d.errors import InputError, missing
from nuclei3d.images.formats import FOREIGN_SUFFIXES, ForeignArray, NoReaderError
from nuclei3d.images.layout import FrameAxes, Layout, NoVolumeError, lay_out_frames
from nuclei3d.images.ome_zarr import ZarrArray, find_label_array, is_zarr
from nuclei3d.images.tiff import TiffArray, check_planes
from nuclei3d.images.voxel_size import VoxelSize

# Contradictions of voxel sizes that the user knows of: folder, size stated there, size given.
_reported: set[tuple[Path, VoxelSize, VoxelSize]] = set()
_READ_FORMATS = ".tif, .tiff or .zarr"

_TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".lsm")
_SUFFIXES = (
    *(".ome.tiff", ".ome.tif", ".ome.btf", ".ome.tf8", ".ome.zarr", ".zarr"),
    *_TIFF_SUFFIXES,
    *FOREIGN_SUFFIXES,
)
# What holds images, but none that are read here.
_UNREAD = re.compile(
    r"\.(png|jpe?g|bmp|gif|np[yz]|h5|hdf5|nii|gz|zip|mh[ad]|nrrd|vsi|oi[bfr]|klb|avi|mp4|stk|dv|sld)$",
    re.IGNORECASE,
)

# Words at the end of a name that mark labels or an image and say nothing about which frame it is.
LABEL_WORDS = re.compile(
    r"[_\-. ](cp_masks|masks|mask|labels|label|lbl|segmentation|seg|gt)(?=_t\d+$|$)", re.I
)
# The Cell Tracking Challenge calls the labels of t000: man_seg000, man_track000 or, as a result, mask000.
_CHALLENGE_NAME = re.compile(r"^(man_seg|man_track|mask|seg)_?(?=\d+$)", re.IGNORECASE)


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sort key under which t2 comes before t10."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdecimal() else (-1, part.lower()) for part in parts] + [(-1, text)]


def frame_stem(path: Path) -> str:
    """Give the file name without .tif, .ome.tif, .zarr and the like."""
    lower = path.name.lower()
    for suffix in _SUFFIXES:
        if lower.endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def label_stem(name: str) -> str:
    """Give the name of the frame that labels belong to: `t000_cp_masks` and `man_seg000` are of `t000`."""
    return LABEL_WORDS.sub("", _CHALLENGE_NAME.sub("t", name)) or name


def list_volumes(folder: Path) -> list[Path]:
    """List the volumes directly in a folder (files, zarr folders), in natural order, without hidden ones.

    Dangling links and images in formats that are not read are passed over, and said once.
    """
    paths, unread, dangling = [], [], []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if _is_volume(path):
            paths.append(path)
        elif path.is_symlink() and not path.exists():
            dangling.append(path.name)
        elif _UNREAD.search(path.name) and path.is_file():
            unread.append(path.name)
    for names, reason in ((dangling, "links to what is not there"), (unread, f"no {_READ_FORMATS}")):
        say_passed_over(folder, sorted(names, key=natural_key), reason)
    return sorted(paths, key=lambda path: natural_key(path.name))


def _is_volume(path: Path) -> bool:
    known = (*_TIFF_SUFFIXES, *FOREIGN_SUFFIXES)
    return is_zarr(path) or (path.suffix.lower() in known and path.is_file())


def folder_of_volumes(folder: Path) -> Path | None:
    """Find a folder within one that holds volumes, at most two levels down; None if there is none."""
    within = [
        each
        for level in ("[!.]*/", "[!.]*/[!.]*/")
        for each in sorted(folder.glob(level))
        if not is_zarr(each)
    ]
    within.sort(key=lambda each: each.name != "images")
    return next((each for each in within if any(map(_is_volume, each.glob("[!.]*")))), None)


def say_passed_over(folder: Path, names: Sequence[str], reason: str) -> None:
    """Say once which files of a folder are not used."""
    if names:
        warn(f"{folder}: {len(names)} passed over: {some_of(names)} ({reason})")


def volume_paths(source: Path) -> list[Path]:
    """List the volumes that a path stands for: itself, or those in the folder."""
    if source.is_symlink() and not source.exists():
        raise missing(source, f"{source} is a link to {source.readlink()}, which is not there")
    if not source.exists():
        raise missing(source, f"{source} does not exist")
    if not source.is_dir() or is_zarr(source):
        return [source]
    paths = list_volumes(source)
    if not paths:
        other = folder_of_volumes(source)
        hint = f"did you mean {other}?" if other is not None else "give a folder that does"
        raise InputError(f"{source} holds no {_READ_FORMATS}; {hint}")
    return paths


@dataclass(frozen=True, repr=False)
class Frame:
    """One volume on disk, read when asked.

    A frame is cheap: it holds where the volume lies, not the volume, and can be sent to another process.
    `name` is a stem for the names of outputs, unique within a listing; `voxel_size` was given by the user or
    read from the file; `time` is the index on the time axis of the file, `time_step_s` the time between two.
    These are None where there is none. `image` is the number of the image in its file. A `stranger`'s file
    came with a request: other files that it names are not read.
    """

    path: Path
    name: str
    shape: tuple[int, int, int]
    dtype: np.dtype[np.generic]
    voxel_size: VoxelSize | None
    time: int | None
    axes: FrameAxes
    scale_note: str = ""
    stranger: bool = False
    image: int = 0
    time_step_s: float | None = None
    companions: frozenset[str] = frozenset()
    """Names of all files of a multi-file OME-TIFF, which lie beside each other."""
    chunk: tuple[int, int, int] = (1, 1, 1)
    """What is read at once at least, (z, y, x)."""

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"Frame({self.name!r}, {shape} {self.dtype}, {self.voxel_size or 'no voxel size'})"

    def read(self) -> NDArray[Any]:
        """Read the volume (Z, Y, X) in its own type; other frames of the file are not read."""
        return self.read_block((slice(None), slice(None), slice(None)))

    def read_block(self, box: tuple[slice, slice, slice]) -> NDArray[Any]:
        """Read a box (z, y, x) of the volume, touching only the planes or chunks that hold it."""
        with _open(self.path, self.image, stranger=self.stranger) as array:
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


def _images_among(listing: Sequence[Path]) -> list[Path]:
    """Leave out the masks of a folder, as where it is input and output at once, and labels of its images."""
    stems = {path: frame_stem(path) for path in listing}
    masks = [
        path
        for path, stem in stems.items()
        if stem.endswith("_masks") or (label_stem(stem) != stem and label_stem(stem) in stems.values())
    ]
    if len(masks) == len(listing):
        raise InputError(f"{listing[0].parent}: only masks found; give images")
    say_passed_over(listing[0].parent, [path.name for path in masks], "masks")
    return [path for path in listing if path not in masks]


def find_frames(
    source: Path,
    *,
    channel: str | int | None = None,
    image: str | int | None = None,
    voxel_size: VoxelSize | None = None,
    labels: bool = False,
    stranger: bool = False,
) -> list[Frame]:
    """List the frames of a file or folder: one per file and time point; never none.

    `source` is a TIFF file (plain, ImageJ, OME, LSM), an OME-Zarr folder (0.4, 0.5; level 0 is read), a file
    of another format (`nuclei3d.images.formats`), or a folder of such, taken in natural order (t2 before
    t10). In a folder, hidden files are passed over; so are, and this is said, flat images, dangling links,
    files that are not read and, unless `labels` are wanted, masks, and labels beside their images. `channel`
    and `image` are names or numbers (from 0) where there are several. `voxel_size` wins over what the files
    say; where they say something else, the user is told once. `labels` have no channels. InputError is raised
    if there is nothing to read, or a file is damaged, not 3D, or leaves the channel or image open. Of a
    `stranger`'s file, that of a request, others that it names are not read.
    """
    listing = volume_paths(Path(source))
    if Path(source) not in listing and not labels:
        listing = _images_among(listing)
    frames: list[Frame] = []
    shared: set[Path] = set()
    unusable: dict[Path, InputError] = {}
    for path in listing:
        if path in shared:
            continue
        try:
            with _open(path, image, stranger=stranger) as array:
                layout = array.layout
            # Each file of a multi-file OME-TIFF gives the whole set.
            shared.update(path.with_name(name) for name in layout.companions)
            frames.extend(_frames_of(path, layout, channel, labels=labels, stranger=stranger))
        except (NoVolumeError, NoReaderError) as error:
            unusable[path] = error
            continue
        say_passed_over(path, layout.passed_over, "another is read with --set data.image=NUMBER")
    if not frames:
        raise next(iter(unusable.values()))
    for kind, reason in ((NoVolumeError, "flat images"), (NoReaderError, "no reader is installed")):
        names = [path.name for path, error in unusable.items() if isinstance(error, kind)]
        say_passed_over(Path(source), names, reason)
    seen: dict[str, Path] = {}
    for frame in frames:
        other = seen.setdefault(frame.name, frame.path)
        if other is not frame.path:
            raise InputError(
                f"{other} and {frame.path} would give outputs of the same name; rename one of them"
            )
    return frames if voxel_size is None else _rescale(frames, voxel_size)


def count_times(path: Path) -> int:
    """Count the time points of a file, whatever its channels; errors as those of `find_frames`."""
    with _open(path) as array:
        lengths = zip(array.layout.axes.upper(), array.layout.shape, strict=True)
        return next((length for axis, length in lengths if axis == "T"), 1)


def read_layout(path: Path, image: str | int | None = None) -> Layout:
    """Read what a file says of its array: axes, channels, voxel size; no voxel is read."""
    with _open(path, image) as array:
        return array.layout


def single_frame(path: Path, *, time: int | None = None, **options: Any) -> Frame:
    """Find the one frame of a file, or that at a time; options and errors as those of `find_frames`."""
    frames = find_frames(path, **options)
    if time is not None:
        frames = [frame for frame in frames if frame.time == time]
    if len(frames) != 1:
        raise InputError(
            f"{path} holds {len(frames)} frames where one is wanted; save each in a file of its own"
        )
    return frames[0]


def read_volume(
    path: str | Path,
    *,
    channel: str | int | None = None,
    image: str | int | None = None,
    voxel_size_um: tuple[float, float, float] | None = None,
) -> tuple[NDArray[Any], VoxelSize]:
    """Read the one volume of a file.

    Parameters
    ----------
    path
        TIFF, OME-TIFF, OME-Zarr or, with ``nuclei3d[formats]``, a microscope's own format.
    channel, image
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
    given = VoxelSize.given(voxel_size_um)
    frame = single_frame(Path(path), channel=channel, image=image, voxel_size=given)
    return frame.read(), frame.require_voxel_size()


def single_label_frame(path: Path, time: int | None = None) -> Frame:
    """Find the one label volume of a file or OME-Zarr folder, or that at a time."""
    return single_frame(find_label_array(path) if is_zarr(path) else path, time=time, labels=True)


def read_labels(path: Path) -> NDArray[np.uint32]:
    """Read a label volume: uint32 (Z, Y, X); 0 is background.

    `path` is a TIFF file, or an OME-Zarr label image or image with one entry in its ``labels`` group.
    """
    return to_labels(single_label_frame(path).read(), str(path))


def to_labels(labels: NDArray[Any], where: str) -> NDArray[np.uint32]:
    """Check labels (Z, Y, X), whole numbers from 0 to 2**32 - 1 of any type, and turn them into uint32."""
    if labels.dtype.kind == "f":
        odd = labels[~np.isfinite(labels) | (labels != np.rint(labels))]
        if odd.size:
            raise InputError(
                f"{where} holds {labels.dtype} values such as {odd[0]:.6g} where labels are wanted, expected "
                "whole numbers, one per nucleus; give the label image as it was before it was interpolated, "
                "filtered or scaled"
            )
        most = 2.0 ** (np.finfo(labels.dtype).nmant + 1)
        if labels.size and labels.max() > most:
            raise InputError(
                f"{where} holds labels above {most:.0f} as {labels.dtype}, which tells only smaller "
                "numbers apart: some nuclei may be one in it; save the labels as integers"
            )
    elif labels.dtype.kind not in "bui":
        raise InputError(f"{where} holds {labels.dtype} values where labels are wanted, expected integers")
    if labels.size:
        if labels.dtype.kind in "if" and labels.min() < 0:
            raise InputError(
                f"{where} holds the negative label {labels.min():g}; labels count from 1, 0 is background"
            )
        if labels.dtype.itemsize >= 4 and labels.max() > np.iinfo(np.uint32).max:
            raise InputError(
                f"{where} holds the label {labels.max():g}, expected at most 2**32 - 1; renumber the labels"
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


def _open(
    path: Path, image: str | int | None = None, *, stranger: bool = False
) -> AbstractContextManager[TiffArray | ZarrArray | ForeignArray]:
    if is_zarr(path):
        return nullcontext(ZarrArray(path, image))
    if path.suffix.lower() in FOREIGN_SUFFIXES and not stranger:
        return ForeignArray(path, image)
    return TiffArray(path, image, stranger=stranger)


def _frames_of(
    path: Path, layout: Layout, channel: str | int | None, *, labels: bool, stranger: bool
) -> Iterable[Frame]:
    if stranger:
        check_planes(layout.planes)
    found = lay_out_frames(layout, str(path), channel, labels=labels)
    for axes, name in zip(found, time_names(frame_stem(path), len(found)), strict=True):
        z, y, x = (layout.shape[place] for place in axes.spatial)
        depth, height, width = (layout.chunk[place] for place in axes.spatial)
        yield Frame(
            path=path,
            name=name,
            shape=(z, y, x),
            dtype=layout.dtype,
            voxel_size=layout.voxel_size,
            time=axes.time,
            axes=axes,
            scale_note=layout.scale_note,
            stranger=stranger,
            image=layout.image,
            time_step_s=layout.time_step_s,
            companions=layout.companions,
            chunk=(depth, height, width),
        )


def time_names(stem: str, count: int) -> list[str]:
    """Name the time points of a file, from ``<stem>_t000`` on; one alone is called like the file."""
    digits = max(3, len(str(count - 1)))
    return [stem] if count == 1 else [f"{stem}_t{time:0{digits}d}" for time in range(count)]


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
            warn(
                f"{frame.path} says voxels of {stated}; the given {given} is used instead, here and in its "
                "folder"
            )
    return [replace(frame, voxel_size=given, scale_note="") for frame in frames]
