"""Embryos: folders of frames with labels, and their split into training, validation and test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d import console
from nuclei3d.config.sections import DataParams
from nuclei3d.errors import InputError
from nuclei3d.images.frames import (
    Frame,
    check_image,
    find_frames,
    frame_stem,
    list_volumes,
    natural_key,
    single_label_frame,
    to_labels,
)
from nuclei3d.images.layout import missing
from nuclei3d.images.splits import Embryo, EmbryoFrame, Split, split_embryos
from nuclei3d.images.voxel_size import VoxelSize

__all__ = [
    "Embryo",
    "EmbryoFrame",
    "LabelledVolume",
    "Split",
    "find_embryos",
    "read_labelled",
    "split_embryos",
]


@dataclass(frozen=True)
class LabelledVolume:
    """One frame with its labels, read into memory.

    Attributes
    ----------
    image
        (Z, Y, X), the type of the file.
    labels
        uint32 (Z, Y, X); 0 is background.
    voxel_size
        In um.
    embryo, frame
        Names.
    """

    image: NDArray[Any]
    labels: NDArray[np.uint32]
    voxel_size: VoxelSize
    embryo: str
    frame: str


def find_embryos(data: Path) -> list[Embryo]:
    """List the embryos of a data set, ``<embryo>/images/<frame>.tif`` with ``<embryo>/labels/<frame>.tif``.

    Embryos and frames come in natural order (t2 before t10); for frames that is the order of time. Labels
    belong to the image of the same name; a frame without is unlabelled. Only names are looked at, no file is
    opened.

    Raises
    ------
    InputError
        If there is no embryo, an embryo has no image, two images have one name, or a label has no image.
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

    Labels that are all 0 are allowed (an empty frame teaches too), but the user is told.

    Raises
    ------
    InputError
        If there are no labels, the shapes or voxel sizes differ, no voxel size is known, or a file is not
        what it should be (NaN, float or negative labels, 2D, several time points).
    """
    if frame.label_path is None:
        raise InputError(f"{frame.image_path} has no labels; expected a file of that name in labels/")
    given = None if params.voxel_size_um is None else VoxelSize.of(params.voxel_size_um)
    image_frame = _one_frame(frame.image_path, params, given)
    label_frame = single_label_frame(frame.label_path)
    _check_fit(image_frame, label_frame, given)
    voxel_size = image_frame.voxel_size or label_frame.voxel_size or image_frame.require_voxel_size()
    image = image_frame.read()
    check_image(image, str(frame.image_path))
    labels = to_labels(label_frame.read(), str(frame.label_path))
    if not labels.any():
        console.say(f"{frame.label_path} holds no label: the frame counts as one without nuclei")
    return LabelledVolume(image, labels, voxel_size, frame.embryo, frame.frame)


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


def _one_frame(path: Path, params: DataParams, given: VoxelSize | None) -> Frame:
    frames = find_frames(path, channel=params.channel, voxel_size=given)
    if len(frames) > 1:
        raise InputError(f"{path} holds {len(frames)} time points; save each as a file of its own in images/")
    return frames[0]


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
