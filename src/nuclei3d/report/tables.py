"""The tables beside the report: nuclei.csv, and the small CSV files from which `dvc plots` draws."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nuclei3d.scoring.assessment import Assessment, NucleusTable
from nuclei3d.scoring.contrast import contrast_bin

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
    sides: list[tuple[NucleusTable, Outcome]] = [(assessment.true, "missed"), (assessment.pred, "false")]
    for table, unmatched in sides:
        bins = contrast_bin(table.contrast, edges) if edges is not None else np.full(len(table.label), -1)
        for index, matched in enumerate(table.matched):
            if matched and unmatched == "false":
                continue
            z_um, y_um, x_um = (float(value) for value in table.place_um[index])
            yield NucleusRow(
                volume=volume,
                embryo=embryo,
                frame=frame,
                outcome="found" if matched else unmatched,
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


def write_nuclei(path: Path, rows: Iterable[NucleusRow]) -> None:
    """Write the rows as CSV with a header."""
    names = [field.name for field in fields(NucleusRow)]
    _write(path, names, ([_text(getattr(row, name)) for name in names] for row in rows))


def _text(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4f}"
    return value


def write_plot_data(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write ap_by_iou.csv, recall_by_contrast.csv, recall_by_depth.csv and counts.csv of a metrics.json."""
    folder.mkdir()
    methods = {"model": metrics, **metrics["baselines"]}
    _write(
        folder / "ap_by_iou.csv",
        ("iou", "method", "ap", "f1"),
        [
            (iou, name, scores["ap"][iou], scores["f1"][iou])
            for name, scores in methods.items()
            for iou in scores["ap"]
        ],
    )
    for key, file in (
        ("recall_by_contrast", "recall_by_contrast.csv"),
        ("recall_by_depth_um", "recall_by_depth.csv"),
    ):
        _write(
            folder / file,
            ("bin", "from", "to", "method", "n", "recall", "precision"),
            [
                (number, entry["from"], entry["to"], name, entry["n"], entry["recall"], entry["precision"])
                for name, scores in methods.items()
                for number, entry in enumerate(scores[key], start=1)
            ],
        )
    _write(
        folder / "counts.csv",
        ("volume", "embryo", "frame", "n_true", "n_pred"),
        [
            (name, volume["embryo"], volume["frame"], volume["n_true"], volume["n_pred"])
            for name, volume in metrics["volumes"].items()
        ],
    )


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
