"""Which predicted volume belongs to which true one, in any two folders of label volumes."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nuclei3d.errors import InputError
from nuclei3d.volumes.checks import to_labels
from nuclei3d.volumes.frames import Frame, find_frames
from nuclei3d.volumes.listing import frame_stem, list_volumes, natural_key
from nuclei3d.volumes.missing import missing
from nuclei3d.volumes.zarr_store import find_label_array, is_zarr

# Words that mark a file as labels or as an image and say nothing about which frame it is.
_LABEL_WORDS = re.compile(r"_(cp_masks|masks|mask|labels|label|lbl|segmentation|seg|gt)(?=_t\d+$|$)")
_IMAGE_WORDS = re.compile(r"_(images|image|img|raw)(?=_t\d+$|$)")
_MARKED = re.compile(r"_(cp_masks|masks)$")
# Folders that say what they hold, not which embryo.
_CONTAINERS = frozenset({"labels", "images", "masks", "predictions"})
_TRAILING_TIME = re.compile(r"[_\-. ]*(t|frame|time)?[_\-]?\d+$", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One frame found under a folder, with the names that it may be known by.

    Attributes
    ----------
    folders
        Names of the folders between the root and the file, without `labels`, `images` and the like.
    stem
        Name of the frame without `_masks` and the like.
    home
        The folder of the embryo as far as folders tell: the innermost one, not called `labels` or the like.
    root
        Name of the folder that was searched.
    """

    frame: Frame
    folders: tuple[str, ...]
    stem: str
    home: Path
    root: str

    @property
    def key(self) -> str:
        """Folders and stem in one word: `Emb11/t001` and `Emb11_t001` have the same."""
        return "_".join((*self.folders, self.stem))

    @property
    def embryo(self) -> str:
        """The embryo: the folder, else what is left of the stem without its number, else the root."""
        return "/".join(self.folders) or _TRAILING_TIME.sub("", self.stem) or self.root

    @property
    def short(self) -> str:
        """The frame's name within its embryo."""
        if self.folders or _TRAILING_TIME.sub("", self.stem) == "":
            return self.stem
        return self.stem[len(self.embryo) :].lstrip("_-. ") or self.stem

    def read_labels(self) -> NDArray[np.uint32]:
        """Read and check the labels."""
        return to_labels(self.frame.read(), str(self.frame.path))


def find_label_entries(source: Path) -> list[Entry]:
    """Find the label volumes at or below a path.

    Where some lie in folders called `labels`, only those count; where some end in `_masks`, only those.
    """
    return _find_entries(source, "labels", _LABEL_WORDS, marked=_MARKED)


def find_image_entries(source: Path, channel: str | int | None = None) -> list[Entry]:
    """Find the images at or below a path, passing over what is named as labels."""
    entries = _find_entries(source, "images", _IMAGE_WORDS, marked=None, channel=channel)
    return [entry for entry in entries if not _LABEL_WORDS.search(frame_stem(entry.frame.path))]


def pair_entries(
    first: Sequence[Entry], second: Sequence[Entry], *, by_name_only: bool = False
) -> list[tuple[Entry, Entry]]:
    """Pair the entries of two folders that stand for the same frame, in the order of the first.

    In turn, what is not yet paired is compared by folders and stem, by these with the name of either root
    before them, and, where at least one side has no folders, by the stem alone. A name that stands for two
    frames on one side pairs nothing. A single frame on each side is a pair whatever the names, unless
    both lie in folders of their own or `by_name_only`.
    """
    if len(first) == len(second) == 1 and not by_name_only and not (first[0].folders and second[0].folders):
        return [(first[0], second[0])]

    def by_key(entry: Entry) -> str:
        return entry.key

    def rooted(entry: Entry) -> str:
        return f"{entry.root}_{entry.key}"

    def by_stem(entry: Entry) -> str:
        return entry.stem

    ways: list[tuple[Callable[[Entry], str], Callable[[Entry], str]]] = [
        (by_key, by_key),
        (rooted, by_key),
        (by_key, rooted),
    ]
    if not all(entry.folders for entry in (*first, *second)):
        ways.append((by_stem, by_stem))
    partner: dict[int, int] = {}
    for first_name, second_name in ways:
        taken = set(partner.values())
        left = _unique(first_name, ((i, e) for i, e in enumerate(first) if i not in partner))
        right = _unique(second_name, ((j, e) for j, e in enumerate(second) if j not in taken))
        partner.update({left[name]: right[name] for name in left.keys() & right.keys()})
    return [(first[i], second[partner[i]]) for i in sorted(partner)]


def refuse_doubt(
    first: Sequence[Entry], second: Sequence[Entry], pairs: Sequence[tuple[Entry, Entry]]
) -> None:
    """Refuse two folders of labels whose frames may be those of different embryos.

    Parameters
    ----------
    first, second
        The true and the predicted volumes.
    pairs
        From `pair_entries`.

    Raises
    ------
    InputError
        If a frame without an embryo's folder has the name of frames of several embryos, or a pair lies in
        folders named after different embryos of one data set.
    """
    for one, other in pairs:
        if _of_different_embryos(one, other) or _of_different_embryos(other, one):
            raise InputError(
                f"{other.frame.path} and {one.frame.path} are called alike but lie in the folders of "
                f"different embryos, {other.home.name} and {one.home.name}; give those of one embryo"
            )
    paired = {id(entry) for pair in pairs for entry in pair}
    left, right = ([e for e in entries if id(e) not in paired] for entries in (first, second))
    for lone, others in ((left, right), (right, left)):
        for entry in lone:
            alike = [other for other in others if other.stem == entry.stem]
            alike = [other for other in alike if not (other.folders and entry.folders)]
            if len(alike) > 1:
                raise InputError(
                    f"{entry.frame.path} may belong to {alike[0].frame.path} or to {alike[1].frame.path}; "
                    "put both sides into folders of the embryos' names, or begin the files with them"
                )


def _of_different_embryos(one: Entry, other: Entry) -> bool:
    """Say whether beside the folder of one entry there is another folder of the name of the other's."""
    beside = one.home.parent / other.home.name
    return one.home.name != other.home.name and beside.is_dir() and not beside.samefile(other.home)


def _unique(name_of: Callable[[Entry], str], entries: Iterable[tuple[int, Entry]]) -> dict[str, int]:
    places: dict[str, list[int]] = defaultdict(list)
    for place, entry in entries:
        places[name_of(entry)].append(place)
    return {name: found[0] for name, found in places.items() if len(found) == 1}


def _find_entries(
    source: Path,
    container: str,
    words: re.Pattern[str],
    marked: re.Pattern[str] | None,
    channel: str | int | None = None,
) -> list[Entry]:
    if not source.exists():
        raise missing(source, f"{source} does not exist; give a folder of label volumes, or one volume")
    lone = source.is_file() or is_zarr(source)
    paths = [source] if lone else _volumes_below(source)
    if not lone:
        held = [path for path in paths if container in path.relative_to(source).parts[:-1]]
        paths = held or paths
        if marked is not None:
            paths = [path for path in paths if marked.search(frame_stem(path))] or paths
    if not paths:
        raise InputError(f"{source} holds no .tif, .tiff or .zarr volume; give a folder that does")
    root = _without_containers(source.resolve().parent if lone else source.resolve())
    entries = []
    for path in paths:
        folders = () if lone else path.relative_to(source).parts[:-1]
        array = find_label_array(path) if marked is not None and is_zarr(path) else path
        entries += [
            Entry(
                frame=frame,
                folders=tuple(folder for folder in folders if folder not in _CONTAINERS),
                stem=_stem(frame, path, words),
                home=_without_containers(path.parent.absolute()),
                root=root.name,
            )
            for frame in find_frames(array, channel=channel)
        ]
    return entries


def _without_containers(folder: Path) -> Path:
    while folder.name in _CONTAINERS:
        folder = folder.parent
    return folder


def _stem(frame: Frame, path: Path, words: re.Pattern[str]) -> str:
    # The frame's own name says its time; inside a zarr it may be named after an inner array.
    name = frame.name if frame.path == path else frame_stem(path) + _time_suffix(frame)
    return words.sub("", name) or name


def _time_suffix(frame: Frame) -> str:
    return "" if frame.time is None else f"_t{frame.time:03d}"


def _volumes_below(folder: Path) -> list[Path]:
    found = []
    for here, folders, _ in os.walk(folder, followlinks=True):
        found += list_volumes(Path(here))
        folders[:] = [name for name in folders if not name.startswith(".") and not is_zarr(Path(here, name))]
    return sorted(found, key=lambda path: natural_key(str(path.relative_to(folder))))
