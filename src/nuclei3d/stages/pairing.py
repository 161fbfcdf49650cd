"""Which volumes of several folders stand for the same frame: truth, predictions, images, baselines."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.errors import InputError, missing
from nuclei3d.images.frames import (
    Frame,
    check_image,
    find_frames,
    frame_stem,
    list_volumes,
    natural_key,
    to_labels,
)
from nuclei3d.images.ome_zarr import find_label_array, is_zarr
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.training.slicing import drop_small_labels

# Words that mark a file as labels or as an image and say nothing about which frame it is.
_LABEL_WORDS = re.compile(r"_(cp_masks|masks|mask|labels|label|lbl|segmentation|seg|gt)(?=_t\d+$|$)")
_IMAGE_WORDS = re.compile(r"_(images|image|img|raw)(?=_t\d+$|$)")
_MARKED = re.compile(r"_(cp_masks|masks)$")
# Folders that say what they hold, not which embryo.
_CONTAINERS = frozenset({"labels", "images", "masks", "predictions"})
_TRAILING_TIME = re.compile(r"[_\-. ]*(t|frame|time)?[_\-]?\d+$", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Entry:
    """One frame found under a folder, with the names that it may be known by.

    Folders called `labels`, `images` and the like count for nothing here.

    Attributes
    ----------
    folders
        Names of the folders between the root and the file.
    stem
        Name of the frame without `_masks` and the like.
    home, root
        The innermost folder, and the name of the one that was searched.
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
    def rooted_key(self) -> str:
        """The key with the name of the root before it."""
        return f"{self.root}_{self.key}"

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
    return _find_entries(source, "labels", _LABEL_WORDS)


def find_image_entries(source: Path, channel: str | int | None = None) -> list[Entry]:
    """Find the images at or below a path, passing over what is named as labels."""
    entries = _find_entries(source, "images", _IMAGE_WORDS, channel)
    return [entry for entry in entries if not _LABEL_WORDS.search(frame_stem(entry.frame.path))]


def pair_entries(
    first: Sequence[Entry], second: Sequence[Entry], *, by_name_only: bool = False
) -> dict[Entry, Entry]:
    """Give the entries of a folder, in their order, the one of another that stands for the same frame.

    In turn, what is not yet paired is compared by folders and stem, by these with the name of either root
    before them, and, where at least one side has no folders, by the stem alone. A name that stands for two
    frames on one side pairs nothing. A single frame on each side is a pair whatever the names, unless
    both lie in folders of their own or `by_name_only`.
    """
    if len(first) == len(second) == 1 and not by_name_only and not (first[0].folders and second[0].folders):
        return {first[0]: second[0]}

    ways = [("key", "key"), ("rooted_key", "key"), ("key", "rooted_key")]
    if not all(entry.folders for entry in (*first, *second)):
        ways.append(("stem", "stem"))
    partner: dict[Entry, Entry] = {}
    for first_name, second_name in ways:
        left = _unique(first, first_name, set(partner))
        right = _unique(second, second_name, set(partner.values()))
        partner |= {left[name]: right[name] for name in left.keys() & right.keys()}
    return {entry: partner[entry] for entry in first if entry in partner}


def refuse_doubt(first: Sequence[Entry], second: Sequence[Entry], pairs: Mapping[Entry, Entry]) -> None:
    """Refuse true and predicted volumes, paired by `pair_entries`, that may be of different embryos.

    So it is if a frame without an embryo's folder has the name of frames of several embryos, or a pair lies
    in folders named after different embryos of one data set.
    """
    for one, other in pairs.items():
        if _of_different_embryos(one, other) or _of_different_embryos(other, one):
            raise InputError(
                f"{other.frame.path} and {one.frame.path} are called alike but lie in the folders of "
                f"different embryos, {other.home.name} and {one.home.name}; give those of one embryo"
            )
    paired = {*pairs, *pairs.values()}
    left, right = ([entry for entry in entries if entry not in paired] for entries in (first, second))
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
    sibling = one.home.parent / other.home.name
    return one.home.name != other.home.name and sibling.is_dir() and not sibling.samefile(other.home)


def _unique(entries: Sequence[Entry], name: str, taken: Collection[Entry]) -> dict[str, Entry]:
    """Give the entries that are not taken by their names, of those with a name of their own."""
    named = [(getattr(entry, name), entry) for entry in entries if entry not in taken]
    count = Counter(name for name, _ in named)
    return {name: entry for name, entry in named if count[name] == 1}


def _find_entries(
    source: Path,
    container: Literal["labels", "images"],
    words: re.Pattern[str],
    channel: str | int | None = None,
) -> list[Entry]:
    if not source.exists():
        raise missing(source, f"{source} does not exist; give a folder of label volumes, or one volume")
    lone = source.is_file() or is_zarr(source)
    paths = [source] if lone else _volumes_below(source)
    if not lone:
        held = [path for path in paths if container in path.relative_to(source).parts[:-1]]
        paths = held or paths
        if container == "labels":
            paths = [path for path in paths if _MARKED.search(frame_stem(path))] or paths
    if not paths:
        raise InputError(f"{source} holds no .tif, .tiff or .zarr volume; give a folder that does")
    root = _without_containers(source.resolve().parent if lone else source.resolve())
    entries = []
    for path in paths:
        folders = () if lone else path.relative_to(source).parts[:-1]
        array = find_label_array(path) if container == "labels" and is_zarr(path) else path
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
    time = "" if frame.time is None else f"_t{frame.time:03d}"
    name = frame.name if frame.path == path else frame_stem(path) + time
    return words.sub("", name) or name


def _volumes_below(folder: Path) -> list[Path]:
    found = []
    for here, folders, _ in os.walk(folder, followlinks=True):
        found += list_volumes(Path(here))
        folders[:] = [name for name in folders if not name.startswith(".") and not is_zarr(Path(here, name))]
    return sorted(found, key=lambda path: natural_key(str(path.relative_to(folder))))


@dataclass(frozen=True)
class VolumePair:
    """A true volume with all that belongs to it.

    Attributes
    ----------
    name
        ``<embryo>/<frame>``, unique.
    voxel_size
        In um if `physical`; else of unit length, because no file says it.
    baselines
        Predictions of other methods by their names.
    min_true_volume_um3
        True labels below are background.
    """

    name: str
    embryo: str
    frame: str
    truth: Entry
    pred: Entry
    image: Entry | None
    voxel_size: VoxelSize
    physical: bool
    baselines: dict[str, Entry] = field(default_factory=dict)
    min_true_volume_um3: float = 0.0

    def read_truth(self) -> NDArray[np.uint32]:
        """Read the true labels that count."""
        labels = self.truth.read_labels()
        kept, _ = drop_small_labels(labels, self.voxel_size, self.min_true_volume_um3)
        return np.asarray(kept, np.uint32)

    def read_prediction(self, method: Entry, shape: tuple[int, ...]) -> NDArray[np.uint32]:
        """Read predicted labels and check that they lie on the grid of the truth."""
        labels = method.read_labels()
        _check_shape(labels.shape, shape, method, self.truth)
        return labels

    def read_image(self) -> NDArray[Any] | None:
        """Read and check the image; None where there is none."""
        if self.image is None:
            return None
        image = self.image.frame.read()
        check_image(image, str(self.image.frame.path))
        _check_shape(image.shape, self.truth.frame.shape, self.image, self.truth)
        return image


@dataclass(frozen=True)
class Pairing:
    """The pairs, embryo by embryo, and the names of what found no partner."""

    pairs: list[VolumePair]
    truths_alone: list[str]
    predictions_alone: list[str]


def pair_volumes(
    params: Params,
    truth: Path,
    pred: Path,
    images: Path | None,
    baselines: Mapping[str, Path],
    only: Collection[Path] | None = None,
) -> Pairing:
    """Find which prediction, image and baseline belongs to each true volume, `only` of those files if given.

    Raises
    ------
    InputError
        If a folder holds nothing to read, nothing pairs, it is in doubt what pairs, or a baseline lacks
        volumes that are paired.
    """
    truths, predictions = find_label_entries(truth), find_label_entries(pred)
    if only is not None:
        wanted = {path.resolve() for path in only}
        # an array of labels lies inside the zarr that is named
        places = [{entry.frame.path.resolve(), *entry.frame.path.resolve().parents} for entry in truths]
        truths = [entry for entry, above in zip(truths, places, strict=True) if above & wanted]
    matched = pair_entries(truths, predictions)
    refuse_doubt(truths, predictions, matched)
    if not matched:
        raise InputError(
            f"no volume of {pred} has the name of one of {truth}: found {_examples(predictions)} and "
            f"{_examples(truths)}; a prediction is called like its truth, with or without _masks at its "
            "end, and lies in a folder of the embryo's name or has that name before its own"
        )
    image_of = _find_images(truths, truth, images, params.data.channel)
    others = {name: pair_entries(truths, find_label_entries(path)) for name, path in baselines.items()}
    for name, found in others.items():
        lacking = [entry for entry in matched if entry not in found]
        if lacking:
            raise InputError(
                f"the baseline '{name}' ({baselines[name]}) has no volume for {_examples(lacking)}; "
                "baselines must hold all volumes that are evaluated"
            )
    given = None if params.data.voxel_size_um is None else VoxelSize.of(params.data.voxel_size_um)
    names = Counter(f"{entry.embryo}/{entry.short}" for entry in matched)
    pairs = []
    for entry, prediction in matched.items():
        name = f"{entry.embryo}/{entry.short}"
        name = name if names[name] == 1 else entry.key
        image = image_of.get(entry)
        size = given or first_voxel_size(entry, image, prediction)
        if size is None and params.evaluate.min_true_volume_um3:
            raise InputError(
                f"evaluate.min_true_volume_um3 needs a voxel size, and none of the files of {name} has one; "
                "give --set data.voxel_size_um=[Z,Y,X]"
            )
        pairs.append(
            VolumePair(
                name=name,
                embryo=entry.embryo,
                frame=entry.short,
                truth=entry,
                pred=prediction,
                image=image,
                voxel_size=size or VoxelSize(1, 1, 1),
                physical=size is not None,
                baselines={method: found[entry] for method, found in others.items()},
                min_true_volume_um3=params.evaluate.min_true_volume_um3,
            )
        )
    _say_voxel_sizes(pairs, given)
    order = list(dict.fromkeys(pair.embryo for pair in pairs))
    paired = {*matched, *matched.values()}
    return Pairing(
        sorted(pairs, key=lambda pair: order.index(pair.embryo)),
        [entry.key for entry in truths if entry not in paired],
        [entry.key for entry in predictions if entry not in paired],
    )


def _find_images(
    truths: Sequence[Entry], truth: Path, images: Path | None, channel: str | int | None
) -> dict[Entry, Entry]:
    if images is not None:
        found = pair_entries(truths, find_image_entries(images, channel))
        if not found:
            raise InputError(
                f"no image of {images} has the name of a true volume such as {_examples(truths)}; images are "
                "called like their labels"
            )
        return found
    if not truth.is_dir():
        return {}
    folder = truth.parent if truth.name == "labels" else truth
    label_paths = {entry.frame.path for entry in truths}
    try:
        siblings = [
            entry for entry in find_image_entries(folder, channel) if entry.frame.path not in label_paths
        ]
    except InputError:
        # Nobody named these files as images: what cannot be read among them is not ours to judge.
        return {}
    return pair_entries(truths, siblings, by_name_only=True)


def first_voxel_size(*entries: Entry | None) -> VoxelSize | None:
    """Give the voxel size of the first entry whose file states one."""
    return next((e.frame.voxel_size for e in entries if e is not None and e.frame.voxel_size), None)


def _say_voxel_sizes(pairs: Sequence[VolumePair], given: VoxelSize | None) -> None:
    unknown = [pair for pair in pairs if not pair.physical]
    if unknown:
        say(
            f"{unknown[0].truth.frame.path} does not state its voxel size: distances are in voxels and "
            "contrast is not measured; give it with --set data.voxel_size_um=[z,y,x]"
        )
    for pair in pairs:
        stated, path = first_voxel_size(pair.truth, pair.image), pair.truth.frame.path
        if given is not None and stated is not None and stated.differs_from(given):
            say(f"{path}: the file says voxels of {stated}, the given {given} is used instead")
            return


def _check_shape(found: tuple[int, ...], expected: tuple[int, ...], entry: Entry, truth: Entry) -> None:
    if found != expected:
        raise InputError(
            f"{entry.frame.path} has {' x '.join(map(str, found))} voxels and {truth.frame.path} "
            f"{' x '.join(map(str, expected))}; both must lie on the same grid, so write the prediction at "
            "the resolution of the labels"
        )


def some_of(names: Sequence[str]) -> str:
    """Name the first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _examples(entries: Sequence[Entry]) -> str:
    return some_of([entry.key for entry in entries])
