"""One predicted frame: its masks, its table, and the record by which both count as done before."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nuclei3d.console import say, warn
from nuclei3d.digests import digest_of, digest_of_voxels
from nuclei3d.errors import InputError
from nuclei3d.images.frames import Frame, frame_stem
from nuclei3d.images.ome_zarr import BESIDE_THE_IMAGE
from nuclei3d.outputs import free_path, remove, require_writable, write_text
from nuclei3d.stages.nuclei_table import table_path

RECORD_FOLDER = ".predicted"
"""In it is noted, a file each, what is finished: so several jobs can fill one folder."""
CHANGED_FOLDER = Path(RECORD_FOLDER, "changed")
"""In it are masks that were changed by hand before they were predicted again."""
TRACKS_FILE = Path("tracks", "tracks.csv")
"""The table that ``nuclei3d track MASKS --out MASKS/tracks`` leaves beside the masks."""


@dataclass(frozen=True)
class PredictedFrame:
    """One frame and where its results are."""

    name: str
    masks: Path
    table: Path
    nuclei: int
    seconds: float
    done_before: bool
    fingerprint: str = ""
    """Digest of all that it depends on, by which it counts as done."""
    warnings: tuple[str, ...] = ()
    """In what the frame is unlike the training of the model (`nuclei3d.segmentation.likeness`)."""
    diameter_um: float | None = None
    """Of the nuclei, as estimated; None where it was given or is the model's."""
    made_by: Mapping[str, Any] = field(default_factory=dict)
    """What predicted it from what: the fields of `MadeBy`."""
    placed: Mapping[Path, tuple[int, int]] = field(default_factory=dict)
    """Its files as they were put in place (`place_of`): those of another process may follow."""


_Finite = Annotated[float, Field(allow_inf_nan=False)]


class MadeBy(BaseModel):
    """What predicted masks from what; empty where that is not known.

    ``weights_sha256`` of the networks (none of a service) and ``thresholds`` are as
    `nuclei3d.networks.folder.scored_model` has them; ``image`` is the number of the image in its ``files``,
    of which these are digests; ``voxels`` is that of the image, if it was read as a whole.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    weights_sha256: tuple[str, ...] = ()
    thresholds: dict[str, _Finite | None] = Field(default_factory=dict)
    image: int | str | None = None
    files: tuple[str, ...] = ()
    voxels: str | None = None


class _Record(BaseModel):
    """What is noted of a finished frame; `written` are the digests of its masks and its table."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    masks: str
    nuclei: int
    seconds: _Finite
    warnings: tuple[str, ...] = ()
    made_by: MadeBy = MadeBy()
    fingerprint: str
    written: tuple[str, ...]


def _read_record(out: Path, name: str) -> _Record | None:
    """Read a frame's record; one that cannot be read is none."""
    try:
        return _Record.model_validate_json(_record_file(out, name).read_bytes())
    except (OSError, ValidationError):
        return None


def forget(out: Path, name: str) -> None:
    """Remove a frame's record before its masks are replaced: it never speaks of other masks than its own.

    Masks and tables that somebody changed since they were written, or that nothing says were predicted, are
    laid aside, and so are tracks beside them, which may link them.
    """
    file, record = _record_file(out, name), _read_record(out, name)
    require_writable(file)
    if file.is_dir():
        raise InputError(f"{file} is a folder where {name} is noted as done; move it away")
    if file.exists():
        _lay_tracks_aside(out)
    written = () if record is None else record.written
    for path in (*_mask_files(out, name), table_path(out, name)):
        if not path.exists() or (path.is_file() and not path.stat().st_size):
            continue
        digest = digest_of(path)
        if digest not in written:
            kept = lay_aside(path, digest, out)
            why = "was changed since it was predicted" if written else "is there, not known to be predicted,"
            warn(f"{path} {why} and is written again; the one before: {kept}")
    file.unlink(missing_ok=True)


def _mask_files(out: Path, name: str) -> list[Path]:
    """Give the files that may hold a frame's masks."""
    return [out / f"{name}_masks.ome{suffix}" for suffix in (".tif", ".zarr")]


def _kept_aside(path: Path, digest: str) -> Path:
    """Say where a file is laid aside: by content, so that what was laid aside before stays."""
    return path.parent / CHANGED_FOLDER / f"{digest[:8]}_{path.name}"


def lay_aside(path: Path, digest: str, out: Path) -> Path:
    """Move what somebody changed out of the way of what is written, and say where to."""
    kept = _kept_aside(out / path.name, digest)
    kept.parent.mkdir(parents=True, exist_ok=True)
    remove(kept)
    shutil.move(path, kept)
    return kept


def _lay_tracks_aside(out: Path) -> None:
    if (out / TRACKS_FILE).is_file():
        tracks, kept = out / TRACKS_FILE.parent, free_path(out / RECORD_FOLDER / TRACKS_FILE.parent)
        kept.parent.mkdir(parents=True, exist_ok=True)
        tracks.replace(kept)
        say(f"{tracks} is of masks that are written again: moved to {kept} (--track links the new masks)")


def _record_file(out: Path, name: str) -> Path:
    """Say where it is noted that a frame is finished."""
    return out / RECORD_FOLDER / f"{name}.json"


def find_done(out: Path, name: str, fingerprint: str) -> PredictedFrame | None:
    """Give the frame if it was finished from the same things and its files are as they were written."""
    record = _read_record(out, name)
    if record is None or record.fingerprint != fingerprint:
        return None
    masks, table = out / Path(record.masks).name, table_path(out, name)
    with suppress(OSError, ValueError):  # an InputError, too: they are gone
        if record.written == _digest_written(masks, table):
            return PredictedFrame(
                *(name, masks, table, record.nuclei, record.seconds, True, fingerprint, record.warnings),
                made_by=record.made_by.model_dump(),
            )
    return None


def made_by(masks: Path) -> dict[str, Any]:
    """Give what predicted masks, as was noted beside them, by the fields of `MadeBy`."""
    return _noted_of(masks).model_dump()


def _record_of(masks: Path) -> _Record | None:
    record = _read_record(masks.parent, frame_stem(masks).removesuffix("_masks"))
    return record if record is not None and record.masks == masks.name else None


def _noted_of(masks: Path) -> MadeBy:
    record = _record_of(masks)
    return MadeBy() if record is None else record.made_by


def refuse_another_image(out: Path, frame: Frame) -> None:
    """Raise InputError where a frame's masks would replace those of another image of the same file."""
    record = _read_record(out, frame.name)
    if record is None or record.made_by.image in (None, frame.image):
        return
    if record.made_by.files == tuple(file_digests(frame)):
        raise InputError(
            f"the masks of {frame.name} in {out} are of another image of {frame.path} "
            f"('{record.made_by.image}', not '{frame.image}'); give another folder (--out)"
        )


def tell_changed_images(pairs: Iterable[tuple[Path, Frame]]) -> list[str]:
    """Warn, once, of masks that predict noted to be of an image with other voxels; give the warning."""
    changed = [str(masks) for masks, frame in pairs if _is_changed(_noted_of(masks), frame)]
    return _tell(changed, "was predicted from an image with other voxels than it has now; predict it again")


def tell_changed_masks(paths: Iterable[Path]) -> list[str]:
    """Warn, once, of masks that are no longer as predict noted to have written them; give the warning."""
    changed = [
        str(path)
        for path in paths
        if (record := _record_of(path)) is not None and digest_of(path) not in record.written
    ]
    return _tell(changed, "was changed since it was predicted: the scores are not the model's")


def _tell(changed: list[str], what: str) -> list[str]:
    if not changed:
        return []
    more = f" (and {len(changed) - 1} others)" if len(changed) > 1 else ""
    told = f"{changed[0]}{more} {what}"
    warn(told)
    return [told]


def _is_changed(known: MadeBy, frame: Frame) -> bool:
    """Tell whether the image changed of which masks are noted to be, if that is noted."""
    if not known.files or known.files == tuple(file_digests(frame)):
        return False
    # a file may be written anew with the same image in it
    return known.voxels is None or known.voxels != digest_of_voxels(frame.read())


def file_digests(frame: Frame) -> list[str]:
    """Digest the content of the files of a frame, without what lies beside the image in them."""
    files = [frame.path.with_name(name) for name in sorted(frame.companions)] or [frame.path]
    return [digest_of(file, without=BESIDE_THE_IMAGE) for file in files]


def _digest_written(masks: Path, table: Path) -> tuple[str, str]:
    return digest_of(masks), digest_of(table)


def place_of(path: Path) -> tuple[int, int]:
    """Tell a file or folder from one that took its place since."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def note_done(out: Path, frame: PredictedFrame) -> None:
    """Note that a frame is finished, and what it was made from; its masks in another form go.

    Where another process wrote it meanwhile, nothing is noted: the files may be of either.
    """
    for other in _mask_files(out, frame.name):
        if other != frame.masks:
            remove(other)
    try:
        written = _digest_written(frame.masks, frame.table)
        is_own = all(place_of(path) == place for path, place in frame.placed.items())
    except (OSError, InputError):
        is_own = False
    if not is_own:
        warn(f"{frame.name} was written by another process, too: it does not count as done; predict it again")
        return
    for path, digest in zip((frame.masks, frame.table), written, strict=True):
        remove(_kept_aside(path, digest))  # of a run that was killed: the same
    record = _Record(
        masks=frame.masks.name,
        nuclei=frame.nuclei,
        seconds=frame.seconds,
        warnings=frame.warnings,
        made_by=MadeBy.model_validate(dict(frame.made_by)),
        fingerprint=frame.fingerprint,
        written=written,
    )
    write_text(_record_file(out, frame.name), record.model_dump_json(indent=1) + "\n")
