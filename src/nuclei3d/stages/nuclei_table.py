"""The table of nuclei that predict writes beside the masks of a frame."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.console import warn
from nuclei3d.errors import InputError
from nuclei3d.images.frames import frame_stem
from nuclei3d.outputs import write_table
from nuclei3d.segmentation.masks import NUCLEUS_COLUMNS, Nucleus
from nuclei3d.stages.pairing import Entry
from nuclei3d.tracks.nuclei import measure_frame

_PLACE = ("z_um", "y_um", "x_um", "volume_um3")


def table_path(out: Path, name: str) -> Path:
    """Say where the table of a frame's nuclei goes."""
    return out / f"{name}_nuclei.csv"


def write_nuclei(path: Path, nuclei: Sequence[Nucleus]) -> None:
    """Write the table of nuclei, whole or not at all; an unknown score is an empty cell."""
    rows = (
        (label, *("" if math.isnan(value) else f"{value:.6g}" for value in values))
        for label, *values in map(astuple, nuclei)
    )
    write_table(path, NUCLEUS_COLUMNS, rows)


def read_column(
    masks: Entry, labels: NDArray[np.integer[Any]], column: str = "score"
) -> dict[int, float] | None:
    """Read a column of the table beside masks, whose `labels` (Z, Y, X) were read; None if there is none.

    Given are the nuclei that lie in the masks where the table has them; of masks that somebody edited or
    renumbered since, the others are left out, with a warning.
    """
    stem = frame_stem(masks.frame.path)
    path = table_path(masks.frame.path.parent, stem.removesuffix("_masks"))
    if masks.frame.time is not None or not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"label", column} <= rows[0].keys():
        return None
    try:
        values = {int(row["label"]): float(row[column]) for row in rows if row[column]}
        places = {int(row["label"]): [float(row[name]) for name in _PLACE if name in row] for row in rows}
    except (TypeError, ValueError):
        raise InputError(
            f"{path}: cannot read the numbers of {column} and place; remove it or have predict write it again"
        ) from None
    if not all(map(math.isfinite, values.values())):
        return None
    if _PLACE[0] in rows[0] and masks.frame.voxel_size is not None:
        nuclei = measure_frame(labels, masks.frame.voxel_size, 0)
        found = np.column_stack([nuclei.position_um, nuclei.volume_um3])
        there = {
            int(label)
            for label, place in zip(nuclei.label, found, strict=True)
            if int(label) in places and np.allclose(place, places[int(label)], rtol=1e-4, atol=0.01)
        }
        if there != places.keys() or len(there) != len(nuclei):
            known = f"{len(there)} of {len(nuclei)} nuclei"
            warn(f"{path} is not of these masks, which were changed since: it counts for {known}")
        values = {label: value for label, value in values.items() if label in there}
    return values
