"""One predicted frame: its masks, its table, and the record by which both count as done before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nuclei3d.console import say, warn
from nuclei3d.digests import digest_of, digest_of_voxels
from nuclei3d.errors import InputError
from nuclei3d.images.frames import Frame, frame_stem
from nuclei3d.images.ome_zarr import BESIDE_THE_IMAGE
from nuclei3d.outputs import remove, require_writable, whole_file
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
    """What predicted it from what: ``weights_sha256`` of the networks (none of a service) and ``thresholds``
    as `nuclei3d.networks.folder.scored_model` has them, ``image`` and ``files``, the digests of its files,
    and ``voxels``, that of the image, if it was read as a whole."""


def forget(out: Path, name: str) -> None:
    """Remove a frame's record before its masks are replaced: it never speaks of other masks than its own.

    Masks and tables that somebody changed since they were written, or that nothing says were predicted, are
    laid aside, and so are tracks beside them, which may link them.
    """
    record = _record_file(out, name)
    require_writable(record)
    if record.exists():
        _lay_tracks_aside(out)
    written: list[str] = []
    with suppress(OSError, ValueError, KeyError, TypeError):
        written = list(json.loads(record.read_text(encoding="utf-8"))["written"])
    for path in (*_mask_files(out, name), table_path(out, name)):
        if not path.exists() or (path.is_file() and not path.stat().st_size):
            continue
        digest = digest_of(path)
        if digest not in written:
            kept = lay_aside(path, digest, out)
            why = "was changed since it was predicted" if written else "is there, not known to be predicted,"
            warn(f"{path} {why} and is written again; the one before: {kept}")
    record.unlink(missing_ok=True)


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
    tracks, kept = out / TRACKS_FILE.parent, out / RECORD_FOLDER / TRACKS_FILE.parent
    if (out / TRACKS_FILE).is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        remove(kept)
        tracks.replace(kept)
        say(f"{tracks} is of masks that are written again: moved to {kept} (--track links the new masks)")


def _record_file(out: Path, name: str) -> Path:
    """Say where it is noted that a frame is finished."""
    return out / RECORD_FOLDER / f"{name}.json"


def find_done(out: Path, name: str, fingerprint: str) -> PredictedFrame | None:
    """Give the frame if it was finished from the same things and its files are as they were written."""
    try:
        entry = json.loads(_record_file(out, name).read_text(encoding="utf-8"))
        masks, table = out / Path(entry["masks"]).name, table_path(out, name)
        if entry["fingerprint"] != fingerprint or entry["written"] != _digest_written(masks, table):
            return None
        nuclei, seconds = int(entry["nuclei"]), float(entry["seconds"])
        found = PredictedFrame(name, masks, table, nuclei, seconds, True, fingerprint)
        made_by = dict(entry.get("made_by", {}))
        return replace(found, warnings=tuple(entry.get("warnings", ())), made_by=made_by)
    except (OSError, ValueError, KeyError, TypeError):  # an InputError, too
        # A record that cannot be read only means that the frame is done again.
        return None


def made_by(masks: Path) -> dict[str, Any]:
    """Give what predicted masks, as was noted beside them (`PredictedFrame.made_by`); {} if not known."""
    return _made_by(masks.parent, frame_stem(masks).removesuffix("_masks"), masks.name)


def _made_by(out: Path, name: str, masks: str | None = None) -> dict[str, Any]:
    try:
        entry = json.loads(_record_file(out, name).read_text(encoding="utf-8"))
        return dict(entry["made_by"]) if masks in (None, entry["masks"]) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def refuse_another_image(out: Path, frame: Frame) -> None:
    """Raise InputError where a frame's masks would replace those of another image of the same file."""
    known = _made_by(out, frame.name)
    if known and known.get("image") != frame.image and known.get("files") == file_digests(frame):
        raise InputError(
            f"the masks of {frame.name} in {out} are of another image of {frame.path} "
            f"('{known['image']}', not '{frame.image}'); give another folder (--out)"
        )


def tell_changed_images(pairs: Iterable[tuple[Path, Frame]]) -> list[str]:
    """Warn, once, of masks that predict noted to be of an image with other voxels; give the warning."""
    changed = [(masks, frame) for masks, frame in pairs if _is_changed(made_by(masks), frame)]
    if not changed:
        return []
    masks, frame = changed[0]
    more = f" (and {len(changed) - 1} others)" if len(changed) > 1 else ""
    told = f"{masks}{more} was predicted from another image than {frame.path} is now; predict it again"
    warn(told)
    return [told]


def _is_changed(known: Mapping[str, Any], frame: Frame) -> bool:
    """Tell whether the image changed of which masks are noted to be, if that is noted."""
    if not known.get("files") or known["files"] == file_digests(frame):
        return False
    # a file may be written anew with the same image in it
    return known.get("voxels") is None or known["voxels"] != digest_of_voxels(frame.read())


def file_digests(frame: Frame) -> list[str]:
    """Digest the content of the files of a frame, without what lies beside the image in them."""
    files = [frame.path.with_name(name) for name in sorted(frame.companions)] or [frame.path]
    return [digest_of(file, without=BESIDE_THE_IMAGE) for file in files]


def _digest_written(masks: Path, table: Path) -> list[str]:
    return [digest_of(masks), digest_of(table)]


def note_done(out: Path, frame: PredictedFrame) -> None:
    """Note that a frame is finished, and what it was made from; its masks in another form go."""
    for other in _mask_files(out, frame.name):
        if other != frame.masks:
            remove(other)
    entry = {
        "masks": frame.masks.name,
        "nuclei": frame.nuclei,
        "seconds": frame.seconds,
        "warnings": frame.warnings,
        "made_by": dict(frame.made_by),
        "fingerprint": frame.fingerprint,
        "written": (written := _digest_written(frame.masks, frame.table)),
    }
    for path, digest in zip((frame.masks, frame.table), written, strict=True):
        remove(_kept_aside(path, digest))  # of a run that was killed: the same
    with whole_file(_record_file(out, frame.name)) as partial:
        partial.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
