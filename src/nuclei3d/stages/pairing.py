"""Which volumes of several folders stand for the same frame: truth, predictions, images, baselines."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.config.sections import DataParams
from nuclei3d.console import some_of, warn
from nuclei3d.errors import InputError, missing
from nuclei3d.images.embryos import block_of
from nuclei3d.images.frames import (
    LABEL_WORDS,
    Frame,
    check_image,
    find_frames,
    frame_stem,
    label_stem,
    list_volumes,
    natural_key,
    say_passed_over,
    to_labels,
)
from nuclei3d.images.layout import NoVolumeError
from nuclei3d.images.names import split_names
from nuclei3d.images.ome_zarr import find_label_array, is_zarr
from nuclei3d.images.unknown import is_known_mask, read_partial_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.track_files import RESULT
from nuclei3d.training.slicing import drop_small_labels

_IMAGE_WORDS = re.compile(r"_(images|image|img|raw)(?=_t\d+$|$)")
_MARKED = re.compile(r"_(cp_masks|masks)$")
_OVERRIDE = "pair by the frames' names alone with --set evaluate.pair_by=frame"
# Folders that say what they hold, not which embryo.
_CONTAINERS = frozenset({"labels", "images", "masks", "predictions"})
_LAST_NUMBER = re.compile(r"(\d+|(?<![^\W_])[a-z])$", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Entry:
    """One frame found under a folder, with the names that it may be known by.

    `folders` are those between the root and the file, but none called `labels`, `images` and the like; `stem`
    is the name of the frame without `_masks` and the like; `home` the innermost folder, and `root` the name
    of the one that was searched. `named` are the names of embryo and frame that the stem tells, beside those
    of its folder (`nuclei3d.images.names.split_names`).
    """

    frame: Frame
    folders: tuple[str, ...]
    stem: str
    home: Path
    root: str
    named: tuple[str, str] = ("", "")

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
        """The embryo: the folder, else what the stem says, else the root."""
        return "/".join(self.folders) or self.named[0] or self.root

    @property
    def short(self) -> str:
        """The frame's name within its embryo."""
        return self.stem if self.folders else self.named[1]

    def read_labels(self) -> NDArray[np.uint32]:
        """Read and check the labels."""
        return to_labels(self.frame.read(), str(self.frame.path))


def find_label_entries(*sources: Path) -> list[Entry]:
    """Find the label volumes at or below paths.

    Where some below a path lie in folders called `labels`, only those count; where some end in `_masks`, only
    those.
    """
    return _name([entry for source in sources for entry in _find_entries(source, "labels")])


def find_image_entries(
    source: Path, channel: str | int | None = None, image: str | int | None = None
) -> list[Entry]:
    """Find the images at or below a path, passing over what is named as labels."""
    entries = _find_entries(source, "images", channel=channel, image=image)
    return _name([entry for entry in entries if not LABEL_WORDS.search(frame_stem(entry.frame.path))])


def _name(entries: Sequence[Entry]) -> list[Entry]:
    """Let the names of entries in a folder say what is embryo and what frame in them."""
    together: defaultdict[Path, list[str]] = defaultdict(list)
    for entry in entries:
        together[entry.home].append(entry.stem)
    named = {home: dict(zip(stems, split_names(stems), strict=True)) for home, stems in together.items()}
    return [replace(entry, named=named[entry.home][entry.stem]) for entry in entries]


def pair_entries(
    first: Sequence[Entry],
    second: Sequence[Entry],
    *,
    by_name_only: bool = False,
    by: Literal["embryo", "frame"] = "embryo",
) -> dict[Entry, Entry]:
    """Give the entries of a folder, in their order, the one of another that stands for the same frame.

    In turn, what is not yet paired is compared by folders and stem, by these with the name of either root
    before them, and, where at least one side has no folders, by the stem alone. A name that stands for two
    frames on one side pairs nothing. Where both have folders, the stem alone pairs what it names once on
    either side, unless the folders are numbered in one way (Emb1, Emb2). A single frame on each side is a
    pair whatever the names, unless both lie in folders of their own or `by_name_only`. By frame, the stem
    alone counts.
    """
    if len(first) == len(second) == 1 and not by_name_only and not (first[0].folders and second[0].folders):
        return {first[0]: second[0]}

    ways = [("key", "key"), ("rooted_key", "key"), ("key", "rooted_key")]
    if by == "frame":
        ways = [("stem", "stem")]
    elif not all(entry.folders for entry in (*first, *second)):
        ways.append(("stem", "stem"))
    partner: dict[Entry, Entry] = {}
    for first_name, second_name in ways:
        left = _unique(first, first_name, set(partner))
        right = _unique(second, second_name, set(partner.values()))
        partner |= {left[name]: right[name] for name in left.keys() & right.keys()}
    if ("stem", "stem") not in ways:
        left, right = _unique(first, "stem", ()), _unique(second, "stem", ())
        for name in left.keys() & right.keys():
            one, other = left[name], right[name]
            if one not in partner and not _numbered_alike("/".join(one.folders), "/".join(other.folders)):
                partner[one] = other
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
                f"different embryos, {other.home.name} and {one.home.name}; give those of one embryo, or, if "
                f"they are the same, {_OVERRIDE}"
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
                    "put both sides into folders of the embryos' names, begin the files with them, or name "
                    "the folder of the one embryo, as --truth DATA/EMBRYO/labels"
                )


def _numbered_alike(one: str, other: str) -> bool:
    """Say whether two names differ in a last number or letter alone, as those of embryos do."""
    return one != other and _LAST_NUMBER.sub("", one) == _LAST_NUMBER.sub("", other)


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
    channel: str | int | None = None,
    image: str | int | None = None,
) -> list[Entry]:
    if not source.exists():
        raise missing(source, f"{source} does not exist; give a folder of label volumes, or one volume")
    lone = source.is_file() or is_zarr(source)
    paths = [source] if lone else _volumes_below(source)
    if not lone:
        held = [path for path in paths if container in path.relative_to(source).parts[:-1]]
        paths = held or paths
        if container == "labels":
            paths = [path for path in paths if not is_known_mask(path)]
            paths = [path for path in paths if _MARKED.search(frame_stem(path))] or paths
    if not paths:
        raise InputError(f"{source} holds no .tif, .tiff or .zarr volume; give a folder that does")
    root = _without_containers(source.resolve().parent if lone else source.resolve())
    labels = container == "labels"
    entries: list[Entry] = []
    flat: list[NoVolumeError] = []
    for path in paths:
        folders = () if lone else path.relative_to(source).parts[:-1]
        array = find_label_array(path) if labels and is_zarr(path) else path
        try:
            frames = find_frames(array, channel=channel, image=image, labels=labels)
        except NoVolumeError as error:
            flat.append(error)
            say_passed_over(path.parent, [path.name] if not lone else [], "a flat image")
            continue
        entries += [
            Entry(
                frame=frame,
                folders=tuple(folder for folder in folders if folder not in _CONTAINERS),
                stem=_stem(frame, path, labels),
                home=_without_containers(path.parent.absolute()),
                root=root.name,
            )
            for frame in frames
        ]
    if not entries:
        raise flat[0]
    # a time-lapse may lie as one file beside its frames: these are the same
    lone_keys = {entry.key for entry in entries if entry.frame.time is None}
    return [entry for entry in entries if entry.frame.time is None or entry.key not in lone_keys]


def _without_containers(folder: Path) -> Path:
    while folder.name in _CONTAINERS:
        folder = folder.parent
    return folder


def _stem(frame: Frame, path: Path, labels: bool) -> str:
    # The frame's own name says its time; inside a zarr it may be named after an inner array.
    time = "" if frame.time is None else f"_t{frame.time:03d}"
    name = frame.name if frame.path == path else frame_stem(path) + time
    return label_stem(name) if labels else _IMAGE_WORDS.sub("", name) or name


def _volumes_below(folder: Path) -> list[Path]:
    found = []
    seen: set[Path] = set()
    for here, folders, _ in os.walk(folder, followlinks=True):
        real = Path(here).resolve()
        if real in seen or real in folder.resolve().parents:
            folders.clear()
            continue
        seen.add(real)
        volumes = list_volumes(Path(here))
        found += volumes
        folders[:] = [
            name
            for name in folders
            if not (name.startswith(".") or is_zarr(Path(here, name)))
            # tracks among the masks that they link hold these a second time
            and not (volumes and Path(here, name, RESULT).is_file())
        ]
    return sorted(found, key=lambda path: natural_key(str(path.relative_to(folder))))


@dataclass(frozen=True)
class VolumePair:
    """A true volume with all that belongs to it.

    `name` is ``<embryo>/<frame>``, unique; `voxel_size` is in um if `physical`, else of unit length, because
    no file says it; `baselines` are predictions of other methods by their names. True labels below
    `min_true_volume_um3` are background, `unknown_label` is the number of what nobody looked at,
    `label_shift_um` how far true labels are moved (z, y, x), and `share` the part that counts
    (`nuclei3d.images.embryos.block_of`); None: not at all, all of it.
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
    unknown_label: int | None = None
    label_shift_um: Sequence[float] | None = None
    share: tuple[float, float] | None = None

    def read_whole_truth(self) -> tuple[NDArray[np.uint32], NDArray[np.bool_] | None]:
        """Read all true labels, and say where nobody looked (None: nowhere)."""
        return read_partial_labels(self.truth.frame, self.unknown_label, self.label_shift_um, self.voxel_size)

    def read_truth(self) -> tuple[NDArray[np.uint32], NDArray[np.bool_] | None]:
        """Read the true labels that count, and say where nobody looked (None: nowhere)."""
        labels, unknown = self.read_whole_truth()
        if self.share is not None:
            block = block_of(labels, self.share, str(self.truth.frame.path))
            outside = np.ones(labels.shape, bool)
            outside[block] = False
            unknown = outside if unknown is None else unknown | outside
            labels = np.where(unknown, np.uint32(0), labels)
        kept, _ = drop_small_labels(labels, self.voxel_size, self.min_true_volume_um3)
        return np.asarray(kept, np.uint32), unknown

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
    only: Mapping[tuple[Path, int | None], tuple[float, float] | None] | None = None,
) -> Pairing:
    """Find which prediction, image and baseline belongs to each true volume.

    If given, `only` of those files, at those times in them (None: of one), and of each the part that counts
    (`VolumePair.share`). InputError is raised if a folder holds nothing to read, nothing pairs, it is in
    doubt what pairs, or a baseline lacks volumes that are paired.
    """
    truths, predictions = find_label_entries(truth), find_label_entries(pred)
    shares: dict[Entry, tuple[float, float] | None] = {}
    if only is not None:
        wanted = {(path.resolve(), time): share for (path, time), share in only.items()}
        # an array of labels lies inside the zarr that is named
        named = [
            (entry, [key for path in (file, *file.parents) if (key := (path, entry.frame.time)) in wanted])
            for entry in truths
            for file in [entry.frame.path.resolve()]
        ]
        truths = [entry for entry, keys in named if keys]
        shares = {entry: wanted[key] for entry, keys in named for key in keys}
    by = params.evaluate.pair_by
    matched = pair_entries(truths, predictions, by=by)
    if by == "embryo":
        refuse_doubt(truths, predictions, matched)
    if not matched:
        raise InputError(
            f"no volume of {pred} has the name of one of {truth}: found {_examples(predictions)} and "
            f"{_examples(truths)}; a prediction is called like its truth, with or without _masks at its "
            "end, and lies in a folder of the embryo's name or has that name before its own; else name the "
            f"folder of the one embryo, as --truth DATA/EMBRYO/labels, or {_OVERRIDE}"
        )
    image_of = _find_images(truths, truth, images, params.data)
    others = {name: pair_entries(truths, find_label_entries(path), by=by) for name, path in baselines.items()}
    for name, found in others.items():
        lacking = [entry for entry in matched if entry not in found]
        if lacking:
            raise InputError(
                f"the baseline '{name}' ({baselines[name]}) has no volume for {_examples(lacking)}; "
                "baselines must hold all volumes that are evaluated"
            )
    given = VoxelSize.given(params.data.voxel_size_um)
    names = Counter(f"{entry.embryo}/{entry.short}" for entry in matched)
    pairs = []
    for entry, prediction in matched.items():
        name = f"{entry.embryo}/{entry.short}"
        name = name if names[name] == 1 else entry.key
        image = image_of.get(entry)
        size = given or first_voxel_size(entry, image, prediction)
        shift_um = params.data.label_shift_of(entry.embryo)
        needs = ["evaluate.min_true_volume_um3"] if params.evaluate.min_true_volume_um3 else []
        needs += ["data.label_shift_um"] if shift_um else []
        if size is None and needs:
            raise InputError(
                f"{needs[0]} needs a voxel size, and none of the files of {name} has one; "
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
                unknown_label=params.data.unknown_label,
                label_shift_um=shift_um,
                share=shares.get(entry),
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
    truths: Sequence[Entry], truth: Path, images: Path | None, data: DataParams
) -> dict[Entry, Entry]:
    if images is not None:
        found = pair_entries(truths, find_image_entries(images, data.channel, data.image))
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
        entries = find_image_entries(folder, data.channel, data.image)
        siblings = [entry for entry in entries if entry.frame.path not in label_paths]
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
        warn(
            f"{unknown[0].truth.frame.path} does not state its voxel size: distances are in voxels and "
            "contrast is not measured; give it with --set data.voxel_size_um=[z,y,x]"
        )
    for pair in pairs:
        stated, path = first_voxel_size(pair.truth, pair.image), pair.truth.frame.path
        if given is not None and stated is not None and stated.differs_from(given):
            warn(f"{path}: the file says voxels of {stated}, the given {given} is used instead")
            return


def _check_shape(found: tuple[int, ...], expected: tuple[int, ...], entry: Entry, truth: Entry) -> None:
    if found != expected:
        raise InputError(
            f"{entry.frame.path} has {' x '.join(map(str, found))} voxels and {truth.frame.path} "
            f"{' x '.join(map(str, expected))}; both must lie on the same grid, so write the prediction at "
            "the resolution of the labels"
        )


def _examples(entries: Sequence[Entry]) -> str:
    return some_of([entry.key for entry in entries])
