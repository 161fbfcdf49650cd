"""nuclei.csv: every true nucleus, found or missed, and every false one."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from nuclei3d.core.scoring.assessment import Assessment, NucleusTable
from nuclei3d.core.scoring.contrast import contrast_bin

Outcome = Literal["found", "missed", "false"]


@dataclass(frozen=True)
class NucleusRow:
    """One line of nuclei.csv.

    Places are centroids in um from the centre of the first voxel; `contrast_bin` counts from 1, the faintest;
    `partner` is the label on the other side, empty if there is none. Undefined values are left empty.
    """

    volume: str
    embryo: str
    frame: str
    outcome: Outcome
    label: int
    z_um: float
    y_um: float
    x_um: float
    volume_um3: float
    contrast: float
    contrast_bin: int | None
    best_iou: float
    partner: int | None
    score: float
    surface_um: float


def nucleus_rows(
    volume: str, embryo: str, frame: str, assessment: Assessment, edges: Sequence[float] | None
) -> Iterator[NucleusRow]:
    """Give the true nuclei of a volume in the order of their labels, then the false ones."""
    yield from _rows(volume, embryo, frame, assessment.true, edges, true=True)
    yield from _rows(volume, embryo, frame, assessment.pred, edges, true=False)


def write_nuclei(path: Path, rows: Iterable[NucleusRow]) -> None:
    """Write the rows as CSV with a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(NucleusRow)])
        for row in rows:
            writer.writerow([_text(value) for value in asdict(row).values()])


def _rows(
    volume: str,
    embryo: str,
    frame: str,
    table: NucleusTable,
    edges: Sequence[float] | None,
    *,
    true: bool,
) -> Iterator[NucleusRow]:
    bins = contrast_bin(table.contrast, edges) if edges is not None else np.full(len(table.label), -1)
    for index in range(len(table.label)):
        matched = bool(table.matched[index])
        if matched and not true:
            continue
        z_um, y_um, x_um = (float(value) for value in table.place_um[index])
        yield NucleusRow(
            volume=volume,
            embryo=embryo,
            frame=frame,
            outcome=("found" if matched else "missed") if true else "false",
            label=int(table.label[index]),
            z_um=z_um,
            y_um=y_um,
            x_um=x_um,
            volume_um3=float(table.volume_um3[index]),
            contrast=float(table.contrast[index]),
            contrast_bin=int(bins[index]) + 1 if bins[index] >= 0 else None,
            best_iou=float(table.best_iou[index]),
            partner=int(table.partner[index]) if matched else None,
            score=float(table.score[index]),
            surface_um=float(table.surface_um[index]),
        )


def _text(value: object) -> object:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4f}" if isinstance(value, float) else value
