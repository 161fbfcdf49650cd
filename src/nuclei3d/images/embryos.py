"""Embryos: folders of frames with labels, and their split into training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from nuclei3d.config.sections import DataParams, SplitParams
from nuclei3d.console import say, warn
from nuclei3d.errors import InputError, closest, missing
from nuclei3d.grid import compact_labels
from nuclei3d.images.frames import (
    LABEL_WORDS,
    Frame,
    check_image,
    count_times,
    folder_of_volumes,
    frame_stem,
    label_stem,
    list_volumes,
    natural_key,
    say_passed_over,
    single_frame,
    single_label_frame,
    time_names,
)
from nuclei3d.images.ome_zarr import find_label_array, is_zarr
from nuclei3d.images.unknown import is_known_mask, read_partial_labels
from nuclei3d.images.voxel_size import VoxelSize

PARTS = ("train", "validation", "test")
#: What scores are worth where blocks of the same image train and test.
ONE_IMAGE = (
    "training and test are blocks of the same image (data.split.by=space): the score says how well the rest "
    "of this image would be segmented, NOT how the model does on another embryo; label one more to know"
)


@dataclass(frozen=True)
class EmbryoFrame:
    """Where one frame of an embryo lies; `label_path` is None where it is not labelled.

    `frame` is the name of the file without its suffix, with its time in a file of several, `index` its
    position in the embryo's order of time, unlabelled frames counted. `image_time` and `label_time` are times
    within the files, None in those of one. `share` is the part of it that counts, from 0 to 1 along the
    longer of y and x (`block_of`); None: all of it.
    """

    embryo: str
    frame: str
    image_path: Path
    label_path: Path | None
    index: int
    image_time: int | None = None
    label_time: int | None = None
    share: tuple[float, float] | None = None


@dataclass(frozen=True)
class Embryo:
    """One embryo: its name and its frames in the order of time."""

    name: str
    frames: tuple[EmbryoFrame, ...]

    @property
    def labelled(self) -> tuple[EmbryoFrame, ...]:
        """The frames that have labels."""
        return tuple(frame for frame in self.frames if frame.label_path is not None)


@dataclass(frozen=True)
class Split:
    """Labelled frames, parted so that no frame tells about its neighbour in another part."""

    train: tuple[EmbryoFrame, ...]
    validation: tuple[EmbryoFrame, ...]
    test: tuple[EmbryoFrame, ...]

    def of(self, part: str) -> tuple[EmbryoFrame, ...]:
        """Give the frames of the part "train", "validation" or "test"."""
        if part not in PARTS:
            raise ValueError(f"a split has the parts {', '.join(PARTS)}, not '{part}'")
        frames: tuple[EmbryoFrame, ...] = getattr(self, part)
        return frames


@dataclass(frozen=True)
class LabelledVolume:
    """One frame read into memory: (Z, Y, X), the image in the type of its file; label 0 is background.

    `unknown` is where nobody looked and labels are 0; None: the frame is labelled all over.
    """

    image: NDArray[Any]
    labels: NDArray[np.uint32]
    voxel_size: VoxelSize
    unknown: NDArray[np.bool_] | None = None


def find_embryos(data: Path) -> list[Embryo]:
    """List the embryos of a data set, ``<embryo>/images/<frame>.tif`` with ``<embryo>/labels/<frame>.tif``.

    Embryos and frames come in natural order (t2 before t10); for frames that is the order of time. Labels
    belong to the image of the same name, with or without ``_masks``, ``_cp_masks`` and the like at its
    end; ``man_seg000`` belongs to ``t000``. A file of several time points gives a frame each; where their
    number is that of the images, it belongs to these in their order. A frame without labels is unlabelled,
    as is an empty time point of a file of labels. InputError is raised if there is no embryo, an embryo has
    no image, two images have one name, or a label has no image.
    """
    data = Path(data)
    if not data.is_dir():
        raise missing(
            data,
            f"the data folder {data} {'is a file' if data.exists() else 'does not exist'}; expected "
            "DATA/<embryo>/images/<frame>.tif",
        )
    if (data / "images").is_dir():
        raise InputError(f"{data} is itself an embryo (it holds images/); give the folder above it")
    folders = [
        entry for entry in data.iterdir() if not entry.name.startswith(".") and (entry / "images").is_dir()
    ]
    if not folders:
        other = folder_of_volumes(data)
        found = "" if other is None else f"; {other} holds volumes: move them into {other / 'images'}"
        raise InputError(f"{data} holds no embryo; expected {data}/<embryo>/images/<frame>.tif{found}")
    links = [entry.name for entry in data.iterdir() if entry.is_symlink() and not entry.exists()]
    say_passed_over(data, sorted(links, key=natural_key), "links to what is not there")
    return [find_embryo(folder) for folder in sorted(folders, key=lambda folder: natural_key(folder.name))]


def read_labelled(frame: EmbryoFrame, params: DataParams) -> LabelledVolume:
    """Read a frame and its labels and check that they fit.

    Labels that are all 0 are allowed (an empty frame teaches too), but the user is told. InputError is raised
    if there are no labels, the shapes or voxel sizes differ, no voxel size is known, or a file is not what it
    should be (NaN, float or negative labels, 2D, several time points).
    """
    if frame.label_path is None:
        raise InputError(f"{frame.image_path} has no labels; expected a file of that name in labels/")
    image_frame, given = _image_frame(frame, params)
    label_frame = single_label_frame(frame.label_path, frame.label_time)
    check_fit(image_frame, label_frame.path, label_frame.shape, label_frame.voxel_size, given)
    voxel_size = image_frame.voxel_size or label_frame.voxel_size or image_frame.require_voxel_size()
    image = image_frame.read()
    check_image(image, str(frame.image_path))
    shift_um = params.label_shift_of(frame.embryo)
    labels, unknown = read_partial_labels(label_frame, params.unknown_label, shift_um, voxel_size)
    labels = compact_labels(labels)
    if frame.share is not None:
        block = block_of(labels, frame.share, str(frame.label_path))
        image, labels = image[block], labels[block]
        unknown = None if unknown is None else unknown[block]
    if not labels.any():
        warn(f"{frame.label_path} holds no label: the frame counts as one without nuclei")
    return LabelledVolume(image, labels, voxel_size, unknown)


def check_shifts(embryos: Sequence[Embryo], params: DataParams) -> None:
    """Raise InputError if labels are to be moved of an embryo that is not there."""
    known = [embryo.name for embryo in embryos]
    for name in params.label_shift_um if isinstance(params.label_shift_um, dict) else ():
        if name not in known:
            raise InputError(_unknown_name("data.label_shift_um", name, known))


def _unknown_name(where: str, name: str, known: Sequence[str]) -> str:
    close = closest(name, known)
    hint = f"did you mean '{close}'? " if close is not None else ""
    return f"{where} names the embryo '{name}', which the data do not hold; {hint}known: {', '.join(known)}"


def block_of(labels: NDArray[np.uint32], share: tuple[float, float], where: str) -> tuple[slice, ...]:
    """Give the box of a part of a labelled volume (z, y, x), along the longer of y and x.

    Between two parts lies a gap as wide as the widest nucleus, so that none is in both. InputError is raised
    if nothing is left.
    """
    axis = 1 if labels.shape[1] > labels.shape[2] else 2
    boxes = (box for box in find_objects(labels) if box is not None)
    gap = max((box[axis].stop - box[axis].start for box in boxes), default=0)
    length = labels.shape[axis]
    first, last = (round(end * length) for end in share)
    first += (gap + 1) // 2 if first > 0 else 0
    last -= (gap + 1) // 2 if last < length else 0
    if last - first < 2:
        raise InputError(
            f"{where}: a block from {share[0]:.2f} to {share[1]:.2f} of {length} voxels is narrower than the "
            f"gap of {gap}, the widest nucleus; raise data.split.validation_fraction and test_fraction, or "
            "label a larger stack or a second embryo"
        )
    block = [slice(None)] * 3
    block[axis] = slice(first, last)
    return tuple(block)


def voxel_size_of(frame: EmbryoFrame, params: DataParams) -> VoxelSize:
    """Find the voxel size of a labelled frame without reading it; errors as `read_labelled`."""
    image, _ = _image_frame(frame, params)
    labels = None if frame.label_path is None else single_label_frame(frame.label_path, frame.label_time)
    return image.voxel_size or (labels and labels.voxel_size) or image.require_voxel_size()


def _image_frame(frame: EmbryoFrame, params: DataParams) -> tuple[Frame, VoxelSize | None]:
    given = VoxelSize.given(params.voxel_size_um)
    options = {"channel": params.channel, "image": params.image, "voxel_size": given}
    return single_frame(frame.image_path, time=frame.image_time, **options), given


def find_embryo(folder: Path) -> Embryo:
    """Find the frames of one embryo's folder; errors as those of `find_embryos`."""
    images = _find_stored(folder / "images")
    beside = [name for name in images if LABEL_WORDS.search(name) and label_stem(name) in images]
    for name in beside:
        del images[name]
    say_passed_over(
        folder / "images", beside, f"they are named as labels, whose place is {folder / 'labels'}"
    )
    if not images:
        raise InputError(f"{folder / 'images'} holds no .tif, .tiff or .zarr; expected one file per frame")
    labels = _find_stored(folder / "labels") if (folder / "labels").is_dir() else {}
    labels = {name: stored for name, stored in labels.items() if not is_known_mask(stored[0])}
    label_of = _match_labels(folder, images, labels)
    frames = (
        EmbryoFrame(folder.name, name, path, label_path, index, time, label_time)
        for index, (name, (path, time)) in enumerate(images.items())
        for label_path, label_time in [label_of.get(name, (None, None))]
    )
    embryo = Embryo(folder.name, tuple(frames))
    if 0 < len(embryo.labelled) < len(embryo.frames):
        warn(f"{folder}: {len(embryo.labelled)} of {len(embryo.frames)} frames are labelled")
    return embryo


Stored = dict[str, tuple[Path, int | None]]
"""Files and times in them (None: there is one only) by the name of the frame."""


def _find_stored(folder: Path) -> Stored:
    found: Stored = {}
    for path in list_volumes(folder):
        count = _count_times(path)
        for time, name in enumerate(time_names(frame_stem(path), count)):
            other, _ = found.setdefault(name, (path, None if count == 1 else time))
            if other is not path:
                raise InputError(f"{other} and {path} have the same frame name; rename or remove one of them")
    return found


def _count_times(path: Path) -> int:
    try:
        return count_times(find_label_array(path) if is_zarr(path) and path.parent.name == "labels" else path)
    except InputError:
        # said when it is read; nobody may want to
        return 1


def _match_labels(folder: Path, images: Stored, labels: Stored) -> Stored:
    matched = {name: stored for name, stored in labels.items() if name in images}
    left = {name: stored for name, stored in labels.items() if name not in images}
    for name, stored in left.items():
        key = label_stem(name)
        if key in matched:
            raise InputError(
                f"{matched[key][0]} and {stored[0]} have the same frame name; rename or remove one of them"
            )
        if key not in images:
            break
        matched[key] = stored
    else:
        return {name: stored for name, stored in matched.items() if not _is_unlabelled(stored)}
    if len(labels) == len(images) and (_in_one_file(labels) or _in_one_file(images)):
        ordered = dict(zip(images, labels.values(), strict=True))
        return {name: stored for name, stored in ordered.items() if not _is_unlabelled(stored)}
    path, time = stored
    if time is None:
        raise InputError(f"{path} has no image of that name in {folder / 'images'}; rename or remove it")
    raise InputError(
        f"{path} has {len(labels)} time points, {folder / 'images'} {len(images)} frames: call it like the "
        "images' file, or give labels of as many time points"
    )


def _in_one_file(stored: Stored) -> bool:
    return len({path for path, _ in stored.values()}) == 1


def _is_unlabelled(stored: tuple[Path, int | None]) -> bool:
    """Tell whether a time point of several has no label at all: nobody has labelled it yet."""
    path, time = stored
    if time is None:
        return False
    frame = single_label_frame(path, time)
    depth, height, width = frame.shape
    # from the middle, where nuclei are
    planes = sorted(range(depth), key=lambda z: abs(z - depth // 2))
    return not any(frame.read_block((slice(z, z + 1), slice(height), slice(width))).any() for z in planes)


def check_fit(
    image: Frame, path: Path, shape: tuple[int, ...], voxel_size: VoxelSize | None, given: VoxelSize | None
) -> None:
    """Raise InputError if labels in `path` have another shape than their image, or another voxel size.

    A `given` voxel size settles what the files say.
    """
    if image.shape != shape:
        raise InputError(
            f"{image.path} has the shape {_by(image.shape)} and its labels {path} {_by(shape)} "
            "(z, y, x); expected the same; export the labels on the grid of the image"
        )
    if given is None and image.voxel_size and voxel_size and image.voxel_size.differs_from(voxel_size):
        raise InputError(
            f"{image.path} says voxels of {image.voxel_size}, its labels {path} {voxel_size}; "
            "mend the file that is wrong or give the size: --set data.voxel_size_um=[z,y,x]"
        )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def split_embryos(embryos: Sequence[Embryo], params: SplitParams) -> Split:
    """Split labelled frames by embryo, or by contiguous blocks of time, as `SplitParams` says.

    By embryo, where only `train` is named, nothing is held out, and the user is told. By time, more than
    `gap` steps of time lie between two parts.

    Training is never empty; validation is empty only where nothing but `train` is named; the test is empty
    only where lists by embryo leave it so. InputError is raised if a name is unknown or in two parts, an
    embryo has no labels, one embryo is to be split by embryo, or an embryo has too few frames for blocks with
    gaps.
    """
    labelled = [embryo for embryo in embryos if embryo.labelled]
    if not labelled:
        raise InputError(
            "no embryo has labelled frames; put label volumes into DATA/<embryo>/labels/<frame>.tif"
        )
    if params.by == "embryo":
        split = _split_by_embryo(embryos, labelled, params)
    else:
        _refuse_lists(params)
        split = _split_by_time(labelled, params) if params.by == "time" else _split_by_space(labelled, params)
    _check_leaks(split)
    return split


def _split_by_embryo(embryos: Sequence[Embryo], labelled: Sequence[Embryo], params: SplitParams) -> Split:
    if len(labelled) == 1:
        raise InputError(
            f"'{labelled[0].name}' is the only labelled embryo, and splitting its frames at random would put "
            "neighbours in time on both sides; split by blocks of time: --set data.split.by=time (a single "
            "stack: by=space)"
        )
    lists = {part: tuple(dict.fromkeys(getattr(params, part))) for part in PARTS}
    if not any(lists.values()):
        lists = _default_lists(labelled)
    _check_names(lists, embryos, labelled)
    if not lists["train"]:
        named = {*lists["validation"], *lists["test"]}
        lists["train"] = tuple(embryo.name for embryo in labelled if embryo.name not in named)
    if lists["train"] and not lists["validation"] and not lists["test"]:
        say(
            f"Split by embryo: {len(lists['train'])} train, none validates, none tests (data.split); choose "
            "epochs and thresholds beforehand, on embryos that are held out"
        )
    elif empty := [part for part in ("train", "validation") if not lists[part]]:
        raise InputError(f"no embryo is left for {empty[0]}; name at least one in data.split.{empty[0]}")
    frames = {embryo.name: embryo.labelled for embryo in labelled}
    parts = {part: tuple(frame for name in names for frame in frames[name]) for part, names in lists.items()}
    return Split(**parts)


def _default_lists(labelled: Sequence[Embryo]) -> dict[str, tuple[str, ...]]:
    names = tuple(embryo.name for embryo in labelled)
    if len(names) < 3:
        raise InputError(
            f"only {len(names)} embryos have labels ({', '.join(names)}), three parts need three; name them "
            "in data.split.train and data.split.validation (test may stay empty), or --set data.split.by=time"
        )
    say(
        f"Split by embryo, as data.split names none: {names[-1]} tests, {names[-2]} validates, "
        f"the other {len(names) - 2} train"
    )
    return {"train": names[:-2], "validation": names[-2:-1], "test": names[-1:]}


def _check_names(
    lists: dict[str, tuple[str, ...]], embryos: Sequence[Embryo], labelled: Sequence[Embryo]
) -> None:
    known = [embryo.name for embryo in embryos]
    with_labels = {embryo.name for embryo in labelled}
    for name in chain.from_iterable(lists.values()):
        parts = [part for part, names in lists.items() if name in names]
        if name not in known:
            raise InputError(_unknown_name(f"data.split.{parts[0]}", name, known))
        if len(parts) > 1:
            raise InputError(
                f"embryo '{name}' is in {' and '.join(parts)} of data.split; leave it in one of them"
            )
        if name not in with_labels:
            raise InputError(
                f"data.split.{parts[0]} names the embryo '{name}', which has no labelled frame; label some "
                "(labels/<frame>.tif) or leave it out"
            )


def _refuse_lists(params: SplitParams) -> None:
    for part in PARTS:
        if getattr(params, part):
            raise InputError(
                f"data.split.{part} names embryos, but data.split.by is {params.by}, which cuts every embryo "
                "into blocks; empty the lists or set data.split.by=embryo"
            )


def _split_by_space(labelled: Sequence[Embryo], params: SplitParams) -> Split:
    warn(ONE_IMAGE)
    ends = (0.0, 1 - params.validation_fraction - params.test_fraction, 1 - params.test_fraction, 1.0)
    frames = [frame for embryo in labelled for frame in embryo.labelled]
    return Split(*(tuple(replace(frame, share=share) for frame in frames) for share in pairwise(ends)))


def _split_by_time(labelled: Sequence[Embryo], params: SplitParams) -> Split:
    blocks = [_time_blocks(embryo, params) for embryo in labelled]
    return Split(*(tuple(chain.from_iterable(part)) for part in zip(*blocks, strict=True)))


def _time_blocks(
    embryo: Embryo, params: SplitParams
) -> tuple[tuple[EmbryoFrame, ...], tuple[EmbryoFrame, ...], tuple[EmbryoFrame, ...]]:
    frames = embryo.labelled
    n_test = max(1, round(len(frames) * params.test_fraction))
    n_validation = max(1, round(len(frames) * params.validation_fraction))
    test = frames[-n_test:]
    validation = _before(frames, test[0], params.gap)[-n_validation:]
    train = _before(frames, validation[0], params.gap) if validation else ()
    if not train:
        raise InputError(
            f"embryo '{embryo.name}' has {len(frames)} labelled frames, too few for blocks of time with gaps "
            f"of {params.gap}; label more frames, set a smaller data.split.gap, leave the embryo out, or cut "
            "frames into blocks: --set data.split.by=space"
        )
    return train, validation, test


def _before(frames: Sequence[EmbryoFrame], limit: EmbryoFrame, gap: int) -> tuple[EmbryoFrame, ...]:
    """Give the frames that lie before `limit` with more than `gap` steps of time between."""
    return tuple(frame for frame in frames if frame.index < limit.index - gap)


def _check_leaks(split: Split) -> None:
    """Refuse one file in two parts, as a link or copy of a folder under a second name would have it."""
    owner: dict[tuple[Path, Any, Any], tuple[str, EmbryoFrame]] = {}
    for part in PARTS:
        for frame in split.of(part):
            file = frame.image_path.resolve(), frame.image_time, frame.share
            other_part, other = owner.setdefault(file, (part, frame))
            if other_part != part:
                raise InputError(
                    f"{other.image_path} ({other_part}) and {frame.image_path} ({part}) are the same file; "
                    "a frame may be in one part only"
                )
