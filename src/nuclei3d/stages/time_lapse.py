"""A time-lapse comes back as it came: the masks of its frames in one file, beside those of each frame."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.console import warn
from nuclei3d.digests import digest_of
from nuclei3d.errors import InputError
from nuclei3d.images.frames import Frame, frame_stem, single_label_frame
from nuclei3d.images.ome_zarr import (
    create_label_container,
    create_zarr,
    enlist_labels,
    image_group,
    is_zarr,
    ome_version,
)
from nuclei3d.images.tiff import write_label_series
from nuclei3d.outputs import whole_folder, write_text
from nuclei3d.stages.predicted import RECORD_FOLDER, lay_aside

LABEL_NAME = "nuclei3d"
"""Our entry in the ``labels`` group of an OME-Zarr; labels of other names are never touched."""
_CHUNK = (64, 256, 256)


def series_path(source: Path, out: Path) -> Path:
    """Say where the masks of a file of several time points go."""
    return out / f"{frame_stem(source)}_masks.ome.{'zarr' if is_zarr(source) else 'tif'}"


def write_series(
    frames: Sequence[Frame],
    masks: Sequence[Path],
    fingerprints: Sequence[str],
    out: Path,
    *,
    into_input: bool,
) -> list[Path]:
    """Write the masks of all time points of one file as one file, unless these same ones are there.

    Others that somebody changed, or that are not known to be written so, are laid aside.

    Of each frame of one input, in the order of time, `masks` has the file and `fingerprints` what says
    whether it changed. `out` gets ``<stem>_masks.ome.tif`` (T, Z, Y, X), or for OME-Zarr
    ``<stem>_masks.ome.zarr`` with the masks in its ``labels`` group; a single frame gets none. With
    `into_input` they also go into the ``labels`` group of the OME-Zarr that was read. Gives what lies there
    now; InputError is raised if a place cannot be written.
    """
    source, several = frames[0].path, len(frames) > 1
    if not (several or into_input):
        return []
    stacked = [single_label_frame(path) for path in masks]
    made_from = hashlib.sha256(repr(fingerprints).encode()).hexdigest()
    writers: dict[Path, Callable[[], None]] = {}
    if several:
        path = series_path(source, out)
        writers[path] = partial(_write, path, stacked, frames[0])
    if into_input and is_zarr(source):
        image = image_group(source, frames[0].image)
        place = image / "labels" / LABEL_NAME
        writers[place] = partial(_write_into, image, place, stacked, frames[0], several)
    for path, write in writers.items():
        name = path.name if path.parent == out else f"{source.name}_{path.name}"
        record = out / RECORD_FOLDER / f"{name}.txt"
        text = record.read_text(encoding="utf-8") if record.is_file() else ""
        before, _, noted = text.partition(" ")
        if path.exists():
            found = digest_of(path)
            if found != noted:
                why = "was changed since it was written" if noted else "is there, not known to be predicted,"
                warn(f"{path} {why} and is written again; the one before: {lay_aside(path, found, out)}")
            elif before == made_from:
                continue
        write()
        write_text(record, f"{made_from} {digest_of(path)}")
    return list(writers)


def _write(path: Path, masks: Sequence[Frame], first: Frame) -> None:
    dtype, shape = _stacked_dtype(masks), (len(masks), *first.shape)
    voxel_size, step = first.require_voxel_size(), first.time_step_s
    if path.suffix != ".zarr":
        write_label_series(path, lambda: _planes(masks), shape, dtype, voxel_size, step)
        return
    if path.is_file():
        raise InputError(f"cannot write {path}: a file has that name; remove it")
    with whole_folder(path) as folder:
        place = create_label_container(folder, LABEL_NAME, voxel_size, len(shape), step)
        array = create_zarr(place, shape, dtype, voxel_size, _CHUNK, labels=True, time_step_s=step)
        for time, frame in enumerate(masks):
            for part, slab in _slabs(frame):
                array[time, part] = slab


def _write_into(image: Path, place: Path, masks: Sequence[Frame], first: Frame, several: bool) -> None:
    shape = (len(masks), *first.shape) if several else first.shape
    with whole_folder(place) as folder:
        array = create_zarr(
            folder,
            shape,
            _stacked_dtype(masks),
            first.require_voxel_size(),
            _CHUNK,
            labels=True,
            time_step_s=first.time_step_s,
            version=ome_version(image),
        )
        for time, frame in enumerate(masks):
            for part, slab in _slabs(frame):
                array[(time, part) if several else part] = slab
    enlist_labels(image, LABEL_NAME)


def _stacked_dtype(masks: Sequence[Frame]) -> np.dtype[Any]:
    return np.result_type(*(frame.dtype for frame in masks))


def _slabs(frame: Frame) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Read a frame in pieces as deep as a chunk."""
    depth, height, width = frame.shape
    for start in range(0, depth, _CHUNK[0]):
        part = slice(start, min(start + _CHUNK[0], depth))
        yield part, frame.read_block((part, slice(0, height), slice(0, width)))


def _planes(masks: Sequence[Frame]) -> Iterator[NDArray[Any]]:
    for frame in masks:
        for _, slab in _slabs(frame):
            yield from slab
