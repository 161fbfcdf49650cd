"""One predicted frame: its masks, its table, and the record by which both count as done before."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from nuclei3d.console import say, warn
from nuclei3d.digests import digest_of
from nuclei3d.images.frames import frame_stem
from nuclei3d.outputs import remove, require_writable, whole_file
from nuclei3d.stages.nuclei_table import table_path
from nuclei3d.stages.time_lapse import RECORD_FOLDER

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
    warnings: tuple[str, ...] = ()
    """In what the frame is unlike the training of the model (`nuclei3d.segmentation.likeness`)."""
    diameter_um: float | None = None
    """Of the nuclei, as estimated; None where it was given or is the model's."""
    weights_sha256: tuple[str, ...] = ()
    """Of the networks that predicted it (`nuclei3d.networks.folder.digest_of_weights`); none of a service."""


def forget(out: Path, name: str) -> None:
    """Remove a frame's record before its masks are replaced: it never speaks of other masks than its own.

    Masks that somebody changed since they were written are laid aside, and so are tracks beside them, which
    may link them.
    """
    record = _record_file(out, name)
    require_writable(record)
    if record.exists():
        _lay_tracks_aside(out)
    with suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(record.read_text(encoding="utf-8"))
        masks = out / Path(entry["masks"]).name
        digest = digest_of(masks) if masks.exists() and masks.stat().st_size else entry["written"][0]
        if digest != entry["written"][0]:
            # by content, so that what was laid aside before stays
            kept = out / CHANGED_FOLDER / f"{digest[:8]}_{masks.name}"
            kept.parent.mkdir(exist_ok=True)
            masks.replace(kept)
            warn(f"{masks} was changed since it was predicted and is written again; the changed one: {kept}")
    record.unlink(missing_ok=True)


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
        found = PredictedFrame(name, masks, table, int(entry["nuclei"]), float(entry["seconds"]), True)
        weights = tuple(entry.get("weights_sha256", ()))
        return replace(found, warnings=tuple(entry.get("warnings", ())), weights_sha256=weights)
    except (OSError, ValueError, KeyError, TypeError):  # an InputError, too
        # A record that cannot be read only means that the frame is done again.
        return None


def weights_behind(masks: Path) -> tuple[str, ...]:
    """Give the digests of the weights that predicted masks, as was noted beside them; none if not known."""
    record = _record_file(masks.parent, frame_stem(masks).removesuffix("_masks"))
    try:
        entry = json.loads(record.read_text(encoding="utf-8"))
        return tuple(entry["weights_sha256"]) if entry["masks"] == masks.name else ()
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _digest_written(masks: Path, table: Path) -> list[str]:
    return [digest_of(masks), digest_of(table)]


def note_done(out: Path, frame: PredictedFrame, fingerprint: str) -> None:
    """Note that a frame is finished, and what it was made from; its masks in another form go."""
    for other in (out / f"{frame.name}_masks.ome{suffix}" for suffix in (".tif", ".zarr")):
        if other != frame.masks:
            remove(other)
    entry = {
        "masks": frame.masks.name,
        "nuclei": frame.nuclei,
        "seconds": frame.seconds,
        "warnings": frame.warnings,
        "weights_sha256": frame.weights_sha256,
        "fingerprint": fingerprint,
        "written": _digest_written(frame.masks, frame.table),
    }
    with whole_file(_record_file(out, frame.name)) as partial:
        partial.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
