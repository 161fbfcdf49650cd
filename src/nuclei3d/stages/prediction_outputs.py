"""What a prediction writes: masks, a table of nuclei, and the record of finished frames."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nuclei3d.core.segmentation.nuclei import Nucleus
from nuclei3d.volumes.frames import Frame
from nuclei3d.volumes.whole import whole_file

COLUMNS = ("label", "z_um", "y_um", "x_um", "volume_um3", "mean_intensity", "score")
_RECORD_FOLDER = ".predicted"


@dataclass(frozen=True)
class PredictedFrame:
    """One frame and where its results are."""

    name: str
    masks: Path
    table: Path
    nuclei: int
    seconds: float
    done_before: bool


def masks_path(out: Path, name: str) -> Path:
    """Where the masks of a frame go (those of a frame cut into blocks: ``.ome.zarr``)."""
    return out / f"{name}_masks.ome.tif"


def table_path(out: Path, name: str) -> Path:
    """Where the table of a frame's nuclei goes."""
    return out / f"{name}_nuclei.csv"


def write_table(path: Path, nuclei: Sequence[Nucleus]) -> None:
    """Write the table of nuclei, whole or not at all; an unknown score is an empty cell."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for nucleus in nuclei:
            values = (getattr(nucleus, column) for column in COLUMNS[1:])
            writer.writerow(
                [nucleus.label, *("" if math.isnan(value) else f"{value:.6g}" for value in values)]
            )


def fingerprint_of(frame: Frame, identity: Mapping[str, Any]) -> str:
    """Digest of what a frame's result depends on; files are told apart by size and time of change."""
    status = frame.path.stat()
    content = {
        "path": str(frame.path.resolve()),
        "size": status.st_size,
        "changed": status.st_mtime_ns,
        "time": frame.time,
        "axes": repr(frame.axes),
        "voxel_size_um": frame.require_voxel_size().zyx,
        **identity,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class PredictionRecord:
    """Which frames are finished, and what they were made from.

    One small file per frame in a hidden folder among the outputs: so several jobs can fill one folder.
    """

    def __init__(self, out: Path) -> None:
        self._out = out

    def find(self, name: str, fingerprint: str) -> PredictedFrame | None:
        """Give the frame if it was finished from the same things and its files are there."""
        try:
            entry = json.loads(self._file(name).read_text(encoding="utf-8"))
            if entry["fingerprint"] != fingerprint:
                return None
            masks, table = self._out / Path(entry["masks"]).name, table_path(self._out, name)
            if not masks.exists() or not table.is_file():
                return None
            return PredictedFrame(name, masks, table, int(entry["nuclei"]), float(entry["seconds"]), True)
        except (OSError, ValueError, KeyError, TypeError):
            # A record that cannot be read only means that the frame is done again.
            return None

    def add(self, frame: PredictedFrame, fingerprint: str) -> None:
        """Write down that a frame is finished."""
        entry = {
            "masks": frame.masks.name,
            "nuclei": frame.nuclei,
            "seconds": frame.seconds,
            "fingerprint": fingerprint,
        }
        with whole_file(self._file(frame.name)) as partial:
            partial.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")

    def _file(self, name: str) -> Path:
        return self._out / _RECORD_FOLDER / f"{name}.json"
