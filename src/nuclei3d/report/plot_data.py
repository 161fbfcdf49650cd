"""Small CSV files behind the plots, in the shape that `dvc plots` draws."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_plot_data(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write ap_by_iou.csv, recall_by_contrast.csv, recall_by_depth.csv and counts.csv.

    Parameters
    ----------
    metrics
        The content of metrics.json.
    """
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
    for key, file, unit in (
        ("recall_by_contrast", "recall_by_contrast.csv", "bin"),
        ("recall_by_depth_um", "recall_by_depth.csv", "bin"),
    ):
        _write(
            folder / file,
            (unit, "from", "to", "method", "n", "recall", "precision"),
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


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(["" if value is None else value for value in row] for row in rows)
