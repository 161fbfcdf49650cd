"""import: corrected labels of any program into a data set, checked against their images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.console import say, warn
from nuclei3d.errors import InputError
from nuclei3d.grid import compact_labels
from nuclei3d.images.embryos import EmbryoFrame, LabelledVolume, check_fit, find_embryo
from nuclei3d.images.foreign_labels import FOREIGN_LABELS, read_rois, read_seg
from nuclei3d.images.frames import (
    Frame,
    check_image,
    count_times,
    frame_stem,
    label_stem,
    list_volumes,
    single_label_frame,
    to_labels,
)
from nuclei3d.images.ome_zarr import is_zarr
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.unknown import KNOWN_MARK, find_known_mask, is_known_mask, read_partial_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.outputs import require_writable, whole_file
from nuclei3d.scoring.matching import match, overlap_table
from nuclei3d.stages.check import FrameCheck, check_volume, common_offset, describe_faults, describe_offsets
from nuclei3d.stages.pairing import Entry, find_image_entries, find_label_entries

#: Intersection over union from which on two outlines are the same nucleus.
_SAME_NUCLEUS = 0.5


class Changes(NamedTuple):
    """Nuclei that are there now and were not, and the other way round; reshaped; the same voxel by voxel."""

    added: int
    removed: int
    changed: int
    unchanged: int


@dataclass(frozen=True)
class NewLabels:
    """Labels (Z, Y, X) to store for an image; they do not count where `unknown` (None: all is known)."""

    source: Path
    image: Frame
    frame: str
    labels: NDArray[np.uint32]
    unknown: NDArray[np.bool_] | None = None
    voxel_size: VoxelSize | None = None


@dataclass(frozen=True)
class ImportedFrame:
    """What was stored for one frame; `written` is false where the same labels were there before."""

    frame: str
    source: Path
    labels: Path
    nuclei: int
    known_share: float
    changes: Changes
    written: bool


@dataclass(frozen=True)
class ImportResult:
    """All frames that were imported into an embryo, and what is odd about them."""

    embryo: Path
    frames: tuple[ImportedFrame, ...]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        frames = [{**asdict(frame), "changes": frame.changes._asdict()} for frame in self.frames]
        return {**asdict(self), "frames": frames}


def import_labels(
    params: Params,
    inputs: Sequence[Path],
    data: Path,
    embryo: str,
    images: Path | None = None,
    *,
    overwrite: bool = False,
) -> ImportResult:
    """Take labels into ``<data>/<embryo>/labels``, all or none of them.

    `inputs` are label volumes (TIFF, OME-Zarr, folders of them), Cellpose's ``_seg.npy``, ImageJ's regions.
    Data set and embryo may be new; `images` are copied to ``<data>/<embryo>/images`` unless one of that name
    is there. With `overwrite` labels are replaced that are there and differ. The section ``prepare`` says
    what is a crumb.
    """
    if Path(embryo).name != embryo or embryo.startswith(".") or not embryo.isprintable():
        raise InputError(f"{embryo!r} is no name for an embryo's folder; give one such as mouse_1 (--embryo)")
    if (data / "images").is_dir():
        raise InputError(f"{data} is itself an embryo (it holds images/); give the folder above it")
    folder = data / embryo
    require_writable(folder)
    return store_labels(params, folder, _read_all(inputs, folder, images, params), overwrite=overwrite)


def store_labels(
    params: Params, folder: Path, new: Iterable[NewLabels], *, overwrite: bool = False
) -> ImportResult:
    """Write labels, masks of what is known and images that are missing into an embryo's folder, all or none.

    Labels go where those of the frame are, else to ``labels/<frame>.tif``. Raises InputError if labels do not
    fit their image, are no labels, or would replace others that differ.
    """
    there = list_frames(folder)
    frames: dict[str, ImportedFrame] = {}
    checks: list[FrameCheck] = []
    gone: list[Path] = []
    differing: list[ImportedFrame] = []
    told: list[str] = []
    with ExitStack() as files:
        for each in new:
            if each.frame in frames:
                raise InputError(
                    f"{frames[each.frame].source} and {each.source} are both labels of {each.frame}; give one"
                )
            check, frame = _compare(each, folder, there.get(each.frame), params)
            checks.append(check)
            frames[each.frame] = frame
            if (frame.written or each.frame not in there) and (note := _note_of_size(each, params)):
                told.append(note)
            if frame.written:
                if frame.labels.exists():
                    differing.append(frame)
                size = _voxel_size(each, params)
                write_labels(files.enter_context(whole_file(frame.labels)), each.labels, size)
                mask = find_known_mask(frame.labels) if frame.labels.exists() else None
                if each.unknown is not None:
                    target = mask or frame.labels.with_name(f"{frame_stem(frame.labels)}{KNOWN_MARK}.tif")
                    write_image(files.enter_context(whole_file(target)), ~each.unknown, size)
                elif mask is not None:
                    gone.append(mask)
            if each.frame not in there:
                target = _copy_image(each, folder, params, files)
                told.append(f"{target}: copied from {each.image.path}")
        if differing and not overwrite:
            first, more = differing[0], len(differing) - 1
            raise InputError(
                f"{first.labels} is there already and differs: {_in_words(first)}"
                + (f" (and {more} more)" if more else "")
                + "; --overwrite replaces it"
            )
    for path in gone:
        path.unlink()
    for line in dict.fromkeys(told):
        say(line)
    if not frames:
        raise InputError("no labels among the files: nothing to import")
    offset = common_offset(checks)
    warnings = [
        *describe_faults((check.place, fault) for check in checks for fault in check.faults),
        *describe_offsets({} if offset is None else {folder.name: offset}, checks, params.data),
        *(
            f"{frame.source} holds no label: a frame without nuclei"
            for frame in frames.values()
            if not frame.nuclei
        ),
    ]
    for frame in frames.values():
        done = "" if frame.written else " (nothing to write)"
        say(f"{frame.labels}: {_in_words(frame)}{done}")
    for warning in warnings:
        warn(warning)
    return ImportResult(folder, tuple(frames.values()), tuple(warnings))


def list_frames(folder: Path) -> dict[str, EmbryoFrame]:
    """Give the frames of an embryo's folder, which need not be there, by their names."""
    if not (folder / "images").is_dir() or not list_volumes(folder / "images"):
        return {}
    return {frame.frame: frame for frame in find_embryo(folder).frames}


def _in_words(frame: ImportedFrame) -> str:
    added, removed, changed, unchanged = frame.changes
    words = (
        f"{frame.nuclei} nuclei, {added} added, {removed} removed, {changed} changed, {unchanged} as before"
    )
    return words if frame.known_share == 1 else f"{words}; {frame.known_share:.1%} of the volume is known"


def _compare(
    new: NewLabels, folder: Path, there: EmbryoFrame | None, params: Params
) -> tuple[FrameCheck, ImportedFrame]:
    given = VoxelSize.given(params.data.voxel_size_um)
    check_fit(new.image, new.source, new.labels.shape, new.voxel_size, given)
    image = new.image.read()
    check_image(image, str(new.image.path))
    labels = new.labels if new.unknown is None else np.where(new.unknown, np.uint32(0), new.labels)
    compact = compact_labels(labels)
    volume = LabelledVolume(image, compact, _voxel_size(new, params), new.unknown)
    check = check_volume(folder.name, new.frame, volume, params)
    for fault in check.faults:
        if fault.kind == "intensities":
            raise InputError(f"{new.source}: {fault.words}")
    nuclei = len(np.unique(labels[labels > 0]))
    old, old_unknown = np.zeros_like(compact), None
    target = label_target(folder, new.frame, there)
    if target.exists():
        old, old_unknown = read_partial_labels(single_label_frame(target), params.data.unknown_label)
    if old.shape != labels.shape:
        # they were of no use
        changes = Changes(nuclei, len(np.unique(old[old > 0])), 0, 0)
        same = False
    else:
        changes = compare_labels(compact_labels(old), compact)
        nowhere = np.zeros(labels.shape, bool)
        before, now = (nowhere if where is None else where for where in (old_unknown, new.unknown))
        same = target.exists() and np.array_equal(old, labels) and np.array_equal(before, now)
    known_share = 1.0 if new.unknown is None else float(1 - new.unknown.mean())
    return check, ImportedFrame(new.frame, new.source, target, nuclei, known_share, changes, not same)


def compare_labels(old: NDArray[np.uint32], new: NDArray[np.uint32]) -> Changes:
    """Say how many nuclei labels (Z, Y, X) gained, lost and kept; numbers do not matter."""
    table = overlap_table(old, new)
    matched = match(table, _SAME_NUCLEUS)
    unchanged = int(np.count_nonzero(matched.ious == 1))
    return Changes(table.n_pred - matched.tp, table.n_true - matched.tp, matched.tp - unchanged, unchanged)


def label_target(folder: Path, name: str, there: EmbryoFrame | None) -> Path:
    """Say where the labels of a frame belong; InputError is raised if that file holds other frames too."""
    labels = folder / "labels"
    path = there.label_path if there else None
    if path is None and labels.is_dir():
        series = (other for other in list_volumes(labels) if name.startswith(f"{frame_stem(other)}_t"))
        path = next((other for other in series if count_times(other) > 1), None)
    path = path or labels / f"{name}.tif"
    if path.exists() and (path.suffix.lower() not in (".tif", ".tiff") or count_times(path) > 1):
        raise InputError(
            f"the labels of {name} lie in {path}, of which no single frame is replaced here; save its frames "
            f"as {labels / '<frame>.tif'} and remove it"
        )
    return path


def _voxel_size(new: NewLabels, params: Params) -> VoxelSize:
    given = VoxelSize.given(params.data.voxel_size_um)
    return given or new.image.voxel_size or new.voxel_size or new.image.require_voxel_size()


def _note_of_size(new: NewLabels, params: Params) -> str:
    """Say that an image has its voxel size from its labels, where it has."""
    if params.data.voxel_size_um is not None or new.image.voxel_size is not None or new.voxel_size is None:
        return ""
    return f"{new.image.path} states no voxel size: {new.voxel_size} is that of {new.source}"


def _copy_image(new: NewLabels, folder: Path, params: Params, files: ExitStack) -> Path:
    """Write the image of labels into the embryo's folder, and give its file."""
    target = folder / "images" / f"{new.frame}.tif"
    image = new.image.read()
    if image.dtype.kind in "iu" and image.dtype.itemsize == 8:
        # TIFF readers know none of these
        image = image.astype(np.result_type(np.min_scalar_type(image.min()), np.min_scalar_type(image.max())))
        if image.dtype.itemsize == 8:
            raise InputError(
                f"{new.image.path} holds numbers beyond 32 bits; convert it before it is imported"
            )
    write_image(files.enter_context(whole_file(target)), image, _voxel_size(new, params))
    return target


def _read_all(
    inputs: Sequence[Path], folder: Path, images: Path | None, params: Params
) -> Iterator[NewLabels]:
    """Find the image of each volume of labels, then read them one by one."""
    known = _find_images(folder, images, params)
    sources: list[tuple[Path, str, Entry | None]] = []
    for path in inputs:
        if path.suffix.lower() in FOREIGN_LABELS:
            name = label_stem(re.sub(r"[_\-. ]rois?$", "", path.stem, flags=re.IGNORECASE))
            sources.append((path, name, None))
        elif path.is_dir() or is_zarr(path) or not is_known_mask(path):
            sources += [(entry.frame.path, entry.stem, entry) for entry in find_label_entries(path)]
    named = [_match(path, name, folder, known, alone=len(sources) == 1) for path, name, _ in sources]
    for (path, _, entry), (frame, image) in zip(sources, named, strict=True):
        if entry is not None:
            labels, unknown = read_partial_labels(entry.frame, params.data.unknown_label)
            # a time point without any label has not been labelled yet
            if entry.frame.time is None or labels.any():
                yield NewLabels(path, image, frame, labels, unknown, entry.frame.voxel_size)
            continue
        if path.suffix.lower() == ".npy":
            labels = to_labels(read_seg(path), str(path))
        else:
            labels, unnumbered = read_rois(path, image.shape)
            if unnumbered:
                say(
                    f"{path}: {unnumbered} regions have no nucleus in their name (<nucleus>-<plane>); they "
                    "belong to what they overlap in the planes beside"
                )
        yield NewLabels(path, image, frame, labels)


def _find_images(folder: Path, images: Path | None, params: Params) -> dict[str, tuple[str, Frame]]:
    """Give frame and image by all names, those in the data set first; by "" the lone image that was given."""
    known: dict[str, tuple[str, Frame]] = {}
    own = folder / "images"
    if own.is_dir() and list_volumes(own):
        for entry in find_image_entries(own, params.data.channel, params.data.image):
            for name in (entry.frame.name, entry.stem):
                known.setdefault(name, (entry.frame.name, entry.frame))
    if images is not None:
        found = find_image_entries(images, params.data.channel, params.data.image)
        for entry in [entry for entry in found if folder.name in entry.folders] or found:
            other = known.setdefault(entry.stem, (entry.stem, entry.frame))[1]
            if other is not entry.frame and not other.path.is_relative_to(own):
                raise InputError(f"{other.path} and {entry.frame.path} have the same name; give one embryo's")
        if len(found) == 1:
            known[""] = known[found[0].stem]
    if not known:
        raise InputError(f"{own} holds no image; give those that were labelled: --images FILE_OR_FOLDER")
    return known


def _match(
    path: Path, name: str, folder: Path, images: Mapping[str, tuple[str, Frame]], *, alone: bool
) -> tuple[str, Frame]:
    for known in (name, name.removeprefix(f"{folder.name}_")):
        if known in images:
            return images[known]
    if alone and "" in images:
        return images[""]
    raise InputError(
        f"{path} has no image: none is called '{name}' in {folder / 'images'} or --images (such as "
        f"'{next(iter(images))}'); name it like its image, or give that image alone with --images"
    )
