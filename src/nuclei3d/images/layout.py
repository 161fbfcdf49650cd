"""What a stored array holds, and which parts of it are frames (Z, Y, X)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.console import some_of
from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize

# What programs call the pictures that they put beside an image.
_SIDE_IMAGE = re.compile(r"(?<![a-z])(labels?|masks?|macro|slide|preview|overview|thumb(nail)?)(?![a-z])")


class NoVolumeError(InputError):
    """What was found has no depth: a flat image."""


@dataclass(frozen=True)
class Layout:
    """The axes, type (native byte order) and scale of an array in a file.

    `axes` has one letter per axis in stored order: Z, Y, X, T (time), C (channel), S (colour sample); any
    other is an axis of unknown meaning. `voxel_size` is None where the metadata do not give all three edges,
    and `scale_note` then says why, if known. `channels` is empty where the file does not name them,
    `companions` unless this is a multi-file OME-TIFF: then it names all the files that share the array, this
    one included. `time_step_s` is None where no time is stated. `image` is the number of the array among the
    images of the file; `passed_over` describes the others. `chunk` is what is read at once at least, a length
    per axis.
    """

    axes: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    voxel_size: VoxelSize | None = None
    scale_note: str = ""
    channels: tuple[str, ...] = ()
    companions: frozenset[str] = field(default_factory=frozenset)
    time_step_s: float | None = None
    image: int = 0
    passed_over: tuple[str, ...] = ()
    chunk: tuple[int, ...] = ()

    @property
    def planes(self) -> int:
        """Number of planes (y, x)."""
        lengths = zip(self.axes, self.shape, strict=True)
        return math.prod(length for axis, length in lengths if axis not in "YX")

    def describe(self) -> str:
        """Give axes and lengths as text, such as ``T=5, Z=51, Y=124, X=127``."""
        return ", ".join(f"{axis}={length}" for axis, length in zip(self.axes, self.shape, strict=True))


@dataclass(frozen=True)
class ImageInFile:
    """One of the images of a file; `axes` and `shape` as in `Layout`."""

    name: str
    axes: str
    shape: tuple[int, ...]

    @property
    def is_volume(self) -> bool:
        """Whether it has rows, columns and an axis that is z, or may be."""
        long = {axis for axis, n in zip(self.axes.upper(), self.shape, strict=True) if n > 1}
        return {"Y", "X"} <= long and bool(long - set("YXSCT"))

    def __str__(self) -> str:
        return f"{self.name or 'no name'}, {' x '.join(map(str, self.shape))}"


def choose_image(
    images: Sequence[ImageInFile], where: str, wanted: str | int | None
) -> tuple[int, tuple[str, ...]]:
    """Choose one of the images of a file, by number (from 0) or name; describe those passed over.

    Where `wanted` is None, flat images and those called label, macro, preview and the like do not count.
    InputError is raised if several are left, or none is the wanted one.
    """
    listing = [f"{number} ({image})" for number, image in enumerate(images)]
    shown = some_of(listing, 8)
    mend = "choose one with --set data.image=NUMBER"
    if wanted is not None:
        named = [i for i, image in enumerate(images) if image.name.lower() == str(wanted).lower()]
        if len(named) != 1 and str(wanted).isdecimal() and int(wanted) < len(images):
            named = [int(wanted)]
        if len(named) != 1:
            what = "names several images" if named else "is none of its images"
            raise InputError(f"{where}: image '{wanted}' {what}: {shown}; {mend}")
        return named[0], ()
    deep = [i for i, image in enumerate(images) if image.is_volume] or list(range(len(images)))
    left = [i for i in deep if not _SIDE_IMAGE.search(images[i].name.lower())] or deep
    if len(left) > 1 and images[left[0]].is_volume:
        raise InputError(f"{where} holds {len(left)} images: {shown}; {mend}")
    return left[0], tuple(text for i, text in enumerate(listing) if i != left[0])


@dataclass(frozen=True)
class FrameAxes:
    """How one frame lies in a stored array; `time` is its index there, None where there is no axis of time.

    `fixed` is per stored axis the index at which it is held, or None for the three spatial axes; `spatial`
    the positions of z, y and x among the stored axes.
    """

    fixed: tuple[int | None, ...]
    spatial: tuple[int, int, int]
    time: int | None

    def stored_index(self, box: tuple[slice, slice, slice]) -> tuple[int | slice, ...]:
        """Translate a box (z, y, x) into an index of the stored array."""
        index: list[int | slice] = [0 if at is None else at for at in self.fixed]
        for position, part in zip(self.spatial, box, strict=True):
            index[position] = part
        return tuple(index)

    def to_zyx(self, block: NDArray[Any]) -> NDArray[Any]:
        """Turn what `stored_index` cut out into the order (z, y, x)."""
        order = np.argsort(np.argsort(self.spatial))
        return block.transpose(order)


def lay_out_frames(
    layout: Layout, where: str, channel: str | int | None, *, labels: bool = False
) -> list[FrameAxes]:
    """Find the frames in a stored array: one per time point, of one channel (None: there is one only).

    `where` is the name of the file for messages; `labels` have no channels. InputError is raised if the array
    is not 3D (NoVolumeError), an axis has no meaning, or the channel is missing, unknown or ambiguous.
    """
    axes = _name_unknown_axis(layout, where)
    length = dict(zip(axes, layout.shape, strict=True))
    if length.get("Z", 1) == 1 and axes.startswith("SY"):
        # programs that take any 3 or 4 planes for colours wrote them so
        axes = axes.replace("Z", "_").replace("S", "Z")
        length = dict(zip(axes, layout.shape, strict=True))
    flat = [axis for axis in "ZYX" if length.get(axis, 1) == 1]
    if flat:
        raise NoVolumeError(_say_flat(layout, where, length))
    if length.get("S", 1) > 1 and length.get("C", 1) > 1:
        raise InputError(
            f"{where} has colours and channels ({layout.describe()}); save one channel as grey values"
        )
    chosen = _choose_channel(layout, length, where, channel, labels)
    fixed: list[int | None] = [
        None if axis in "ZYX" else chosen if axis in "CS" and length[axis] > 1 else 0 for axis in axes
    ]
    spatial = (axes.index("Z"), axes.index("Y"), axes.index("X"))
    times = length.get("T", 1)
    if times == 1:
        return [FrameAxes(tuple(fixed), spatial, None)]
    at = axes.index("T")
    return [FrameAxes((*fixed[:at], time, *fixed[at + 1 :]), spatial, time) for time in range(times)]


def _name_unknown_axis(layout: Layout, where: str) -> str:
    """Take the one axis without a meaning for z where no other is; singletons do not matter."""
    axes = layout.axes.upper()
    unknown = [place for place, axis in enumerate(axes) if axis not in "TCZYXS" and layout.shape[place] > 1]
    has_depth = any(axis == "Z" and n > 1 for axis, n in zip(axes, layout.shape, strict=True))
    if len(unknown) == 1 and not has_depth:
        place = unknown[0]
        named = axes.replace("Z", "_")
        return named[:place] + "Z" + named[place + 1 :]
    if unknown:
        raise InputError(
            f"{where} has axes of unknown meaning ({layout.describe()}); expected z, y, x and at most time "
            "and channel; save it as OME-TIFF or from Fiji with its axes named"
        )
    return axes


def _say_flat(layout: Layout, where: str, length: dict[str, int]) -> str:
    mend = "give a 3D stack"
    if layout.passed_over:
        mend += f"; the file also holds {', '.join(layout.passed_over)} (--set data.image=NUMBER)"
    if length.get("T", 1) > 1:
        mend = "if its time axis is really z, swap them in Fiji (Image > Properties) and save again"
    elif length.get("C", 1) > 1:
        mend = "if its channels are really z planes, set them so in Fiji (Image > Properties) and save again"
    return f"{where} is no volume ({layout.describe()}); expected three axes (z, y, x) longer than 1; {mend}"


def _choose_channel(
    layout: Layout, length: dict[str, int], where: str, channel: str | int | None, labels: bool
) -> int:
    count = max(length.get("C", 1), length.get("S", 1))
    names = layout.channels
    if not names and length.get("S", 1) > 1:
        names = ("red", "green", "blue", "alpha")[:count]
    listing = ", ".join(
        f"{number} ({names[number]})" if number < len(names) and names[number] else str(number)
        for number in range(count)
    )
    if channel is None:
        if count == 1:
            return 0
        if labels:
            what = "a picture in colours" if length.get("S", 1) > 1 else f"an image of {count} channels"
            raise InputError(
                f"{where} is {what} ({layout.describe()}), not labels, which have one number per nucleus; "
                "save the labels themselves (napari: File > Save Selected Layers; Fiji: the label image, not "
                "its overlay or RGB copy)"
            )
        raise InputError(
            f"{where} has {count} channels: {listing}; choose one with --set data.channel=NUMBER"
        )
    matching = [number for number, name in enumerate(names[:count]) if name.lower() == str(channel).lower()]
    if len(matching) == 1:
        return matching[0]
    if str(channel).lstrip("-").isdecimal() and 0 <= int(channel) < count and not matching:
        return int(channel)
    what = "names several channels" if matching else "is none of its channels"
    raise InputError(
        f"{where}: channel '{channel}' {what}: {listing}; choose one with --set data.channel=NUMBER"
    )
