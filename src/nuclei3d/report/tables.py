"""The tables beside the report: nuclei.csv, and the small CSV files from which `dvc plots` draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nuclei3d.outputs import write_table
from nuclei3d.scoring.assessment import Assessment
from nuclei3d.scoring.contrast import contrast_bin

if TYPE_CHECKING:
    import pandas as pd


def nucleus_table(
    volume: str, embryo: str, frame: str, assessment: Assessment, edges: Sequence[float] | None
) -> pd.DataFrame:
    """Give the lines of nuclei.csv: the true nuclei of a volume in the order of their labels, then the false.

    Places are centroids in um from the centre of the first voxel; `contrast_bin` counts from 1, the faintest;
    `partner` is the label on the other side. What is undefined is missing.
    """
    import pandas as pd

    sides = []
    for side, unmatched in ((assessment.true, "missed"), (assessment.pred, "false")):
        bins = np.zeros(len(side.label)) if edges is None else contrast_bin(side.contrast, edges) + 1
        table = pd.DataFrame(
            {
                "volume": volume,
                "embryo": embryo,
                "frame": frame,
                "outcome": np.where(side.matched, "found", unmatched),
                "label": side.label,
                **dict(zip(("z_um", "y_um", "x_um"), side.place_um.T, strict=True)),
                "volume_um3": side.volume_um3,
                "contrast": side.contrast,
                "contrast_bin": pd.Series(bins, dtype="Int64").where(bins > 0),
                "best_iou": side.best_iou,
                "partner": pd.Series(side.partner, dtype="Int64").where(side.matched),
                "score": side.score,
                "surface_um": side.surface_um,
            }
        )
        sides.append(table[~side.matched] if unmatched == "false" else table)
    return pd.concat(sides)


def write_plot_data(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write ap_by_iou.csv, recall_by_contrast.csv, recall_by_depth.csv and counts.csv of a metrics.json."""
    folder.mkdir()
    methods = {"model": metrics, **metrics["baselines"]}
    ap = [
        {"iou": iou, "method": name, "ap": scores["ap"][iou], "f1": scores["f1"][iou]}
        for name, scores in methods.items()
        for iou in scores["ap"]
    ]
    _write(folder / "ap_by_iou.csv", ap, ("iou", "method", "ap", "f1"))
    for key, file in (
        ("recall_by_contrast", "recall_by_contrast.csv"),
        ("recall_by_depth_um", "recall_by_depth.csv"),
    ):
        bins = [
            {"bin": number, "method": name, **entry}
            for name, scores in methods.items()
            for number, entry in enumerate(scores[key], start=1)
        ]
        _write(folder / file, bins, ("bin", "from", "to", "method", "n", "recall", "precision"))
    volumes = [{"volume": name, **volume} for name, volume in metrics["volumes"].items()]
    _write(folder / "counts.csv", volumes, ("volume", "embryo", "frame", "n_true", "n_pred"))


def _write(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    write_table(path, columns, ([row[column] for column in columns] for row in rows))
