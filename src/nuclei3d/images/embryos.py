"""Embryos: folders of frames with labels, and their split into training, validation and test."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config.sections import DataParams, SplitParams
from nuclei3d.console import say
from nuclei3d.errors import InputError, missing
from nuclei3d.images.frames import (
    Frame,
    check_image,
    frame_stem,
    list_volumes,
    natural_key,
    single_frame,
    single_label_frame,
    to_labels,
)
from nuclei3d.images.voxel_size import VoxelSize

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class EmbryoFrame:
    """Where one frame of an embryo lies; `label_path` is None where it is not labelled.

    `frame` is the name of the file without its suffix, `index` its position in the embryo's order of time,
    unlabelled frames counted.
    """

    embryo: str
    frame: str
    image_path: Path
    label_path: Path | None
    index: int


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
    """One frame read into memory: (Z, Y, X), the image in the type of its file; label 0 is background."""

    image: NDArray[Any]
    labels: NDArray[np.uint32]
    voxel_size: VoxelSize


def find_embryos(data: Path) -> list[Embryo]:
    """List the embryos of a data set, ``<embryo>/images/<frame>.tif`` with ``<embryo>/labels/<frame>.tif``.

    Embryos and frames come in natural order (t2 before t10); for frames that is the order of time. Labels
    belong to the image of the same name; a frame without is unlabelled. Only names are looked at, no file is
    opened. InputError is raised if there is no embryo, an embryo has no image, two images have one name, or a
    label has no image.
    """
    data = Path(data)
    if not data.is_dir():
        raise missing(
            data, f"the data folder {data} does not exist; expected DATA/<embryo>/images/<frame>.tif"
        )
    if (data / "images").is_dir():
        raise InputError(f"{data} is itself an embryo (it holds images/); give the folder above it")
    folders = [
        entry for entry in data.iterdir() if not entry.name.startswith(".") and (entry / "images").is_dir()
    ]
    if not folders:
        raise InputError(f"{data} holds no embryo; expected {data}/<embryo>/images/<frame>.tif")
    return [_find_embryo(folder) for folder in sorted(folders, key=lambda folder: natural_key(folder.name))]


def read_labelled(frame: EmbryoFrame, params: DataParams) -> LabelledVolume:
    """Read a frame and its labels and check that they fit.

    Labels that are all 0 are allowed (an empty frame teaches too), but the user is told. InputError is raised
    if there are no labels, the shapes or voxel sizes differ, no voxel size is known, or a file is not what it
    should be (NaN, float or negative labels, 2D, several time points).
    """
    if frame.label_path is None:
        raise InputError(f"{frame.image_path} has no labels; expected a file of that name in labels/")
    given = None if params.voxel_size_um is None else VoxelSize.of(params.voxel_size_um)
    image_frame = single_frame(frame.image_path, channel=params.channel, voxel_size=given)
    label_frame = single_label_frame(frame.label_path)
    _check_fit(image_frame, label_frame, given)
    voxel_size = image_frame.voxel_size or label_frame.voxel_size or image_frame.require_voxel_size()
    image = image_frame.read()
    check_image(image, str(frame.image_path))
    labels = to_labels(label_frame.read(), str(frame.label_path))
    if not labels.any():
        say(f"{frame.label_path} holds no label: the frame counts as one without nuclei")
    return LabelledVolume(image, labels, voxel_size)


def _find_embryo(folder: Path) -> Embryo:
    images = _by_stem(folder / "images")
    if not images:
        raise InputError(f"{folder / 'images'} holds no .tif, .tiff or .zarr; expected one file per frame")
    labels = _by_stem(folder / "labels") if (folder / "labels").is_dir() else {}
    for stem, path in labels.items():
        if stem not in images:
            raise InputError(f"{path} has no image of that name in {folder / 'images'}; rename or remove it")
    frames = (
        EmbryoFrame(folder.name, stem, path, labels.get(stem), index)
        for index, (stem, path) in enumerate(images.items())
    )
    return Embryo(folder.name, tuple(frames))


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in list_volumes(folder):
        other = found.setdefault(frame_stem(path), path)
        if other is not path:
            raise InputError(f"{other} and {path} have the same frame name; rename or remove one of them")
    return found


def _check_fit(image: Frame, labels: Frame, given: VoxelSize | None) -> None:
    if image.shape != labels.shape:
        raise InputError(
            f"{image.path} has the shape {_by(image.shape)} and its labels {labels.path} {_by(labels.shape)} "
            "(z, y, x); expected the same; export the labels on the grid of the image"
        )
    # A value in the parameters settles what the files say.
    if (
        given is None
        and image.voxel_size
        and labels.voxel_size
        and image.voxel_size.differs_from(labels.voxel_size)
    ):
        raise InputError(
            f"{image.path} says voxels of {image.voxel_size}, its labels {labels.path} {labels.voxel_size}; "
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
    by_time = params.by == "time"
    split = _split_by_time(labelled, params) if by_time else _split_by_embryo(embryos, labelled, params)
    _check_leaks(split)
    return split


def _split_by_embryo(embryos: Sequence[Embryo], labelled: Sequence[Embryo], params: SplitParams) -> Split:
    if len(labelled) == 1:
        raise InputError(
            f"'{labelled[0].name}' is the only labelled embryo, and splitting its frames at random would put "
            "neighbours in time on both sides; split by blocks of time: --set data.split.by=time"
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
    lists: dict[str, tuple[str, ...]],
    embryos: Sequence[Embryo],
    labelled: Sequence[Embryo],
) -> None:
    known = [embryo.name for embryo in embryos]
    with_labels = {embryo.name for embryo in labelled}
    for name in chain.from_iterable(lists.values()):
        parts = [part for part, names in lists.items() if name in names]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise InputError(
                f"data.split.{parts[0]} names the embryo '{name}', which the data do not hold; "
                f"{hint}known: {', '.join(known)}"
            )
        if len(parts) > 1:
            raise InputError(
                f"embryo '{name}' is in {' and '.join(parts)} of data.split; leave it in one of them"
            )
        if name not in with_labels:
            raise InputError(
                f"data.split.{parts[0]} names the embryo '{name}', which has no labelled frame; label some "
                "(labels/<frame>.tif) or leave it out"
            )


def _split_by_time(labelled: Sequence[Embryo], params: SplitParams) -> Split:
    for part in PARTS:
        if getattr(params, part):
            raise InputError(
                f"data.split.{part} names embryos, but data.split.by is time, which cuts every embryo into "
                "blocks; empty the lists or set data.split.by=embryo"
            )
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
            f"of {params.gap}; label more frames, set a smaller data.split.gap, or leave the embryo out"
        )
    return train, validation, test


def _before(frames: Sequence[EmbryoFrame], limit: EmbryoFrame, gap: int) -> tuple[EmbryoFrame, ...]:
    """Give the frames that lie before `limit` with more than `gap` steps of time between."""
    return tuple(frame for frame in frames if frame.index < limit.index - gap)


def _check_leaks(split: Split) -> None:
    """Refuse one file in two parts, as a link or copy of a folder under a second name would have it."""
    owner: dict[Path, tuple[str, EmbryoFrame]] = {}
    for part in PARTS:
        for frame in split.of(part):
            file = frame.image_path.resolve()
            other_part, other = owner.setdefault(file, (part, frame))
            if other_part != part:
                raise InputError(
                    f"{other.image_path} ({other_part}) and {frame.image_path} ({part}) are the same file; "
                    "a frame may be in one part only"
                )
