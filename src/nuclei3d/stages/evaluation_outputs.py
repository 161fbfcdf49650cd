"""What the evaluation writes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.core.scoring.assessment import Assessment
from nuclei3d.report.figures import ShownVolume, draw_nuclei, draw_overlay, draw_scores, worst_nuclei
from nuclei3d.report.nuclei_table import NucleusRow, nucleus_rows, write_nuclei
from nuclei3d.report.page import build_page
from nuclei3d.report.plot_data import write_plot_data
from nuclei3d.report.viewer_data import ViewedVolume, pack_volumes
from nuclei3d.stages.evaluation_inputs import VolumePair

_WORST_SHOWN = 8


def write_evaluation(
    params: Params,
    folder: Path,
    metrics: dict[str, Any],
    pairs: Sequence[VolumePair],
    assessments: Sequence[Assessment],
    edges: Sequence[float] | None,
    method: str,
    history: Path | None,
) -> None:
    """Write metrics.json, nuclei.csv, plots, figures and report.html into an empty folder.

    Parameters
    ----------
    metrics
        The content of metrics.json.
    assessments
        Of the model, in the order of `pairs`.
    edges
        Inner edges of the contrast bins; None where contrast was not measured.
    method
        Name of the model.
    history
        history.csv of its training.
    """
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    (folder / "metrics.json").write_text(text, encoding="utf-8")
    rows = [
        row
        for pair, assessment in zip(pairs, assessments, strict=True)
        for row in nucleus_rows(pair.name, pair.embryo, pair.frame, assessment, edges)
    ]
    write_nuclei(folder / "nuclei.csv", rows)
    write_plot_data(folder / "plots", metrics)
    _draw_figures(folder / "figures", metrics, pairs, assessments, rows, method)
    if params.evaluate.report:
        viewed = [
            ViewedVolume(pair.name, pair.voxel_size, assessment, partial(_read_all, pair))
            for pair, assessment in zip(pairs, assessments, strict=True)
        ]
        page = build_page(
            metrics,
            rows,
            pack_volumes(viewed, params.evaluate.viewer_megabytes),
            method=method,
            title=f"How good is {method}?",
            unit="um" if all(pair.physical for pair in pairs) else "voxels",
            history=history,
        )
        (folder / "report.html").write_text(page, encoding="utf-8")


def _draw_figures(
    folder: Path,
    metrics: Mapping[str, Any],
    pairs: Sequence[VolumePair],
    assessments: Sequence[Assessment],
    rows: Sequence[NucleusRow],
    method: str,
) -> None:
    """Draw the scores, the volume with the most errors in three views, and the worst nuclei."""
    folder.mkdir()
    draw_scores({method: metrics, **metrics["baselines"]}, folder / "scores.png")

    def shown(name: str) -> ShownVolume:
        place = [pair.name for pair in pairs].index(name)
        pair, assessment = pairs[place], assessments[place]
        image, truth, pred = _read_all(pair)
        true, predicted = assessment.true, assessment.pred
        return ShownVolume(
            name=pair.name,
            voxel_size=pair.voxel_size,
            image=image,
            truth=truth,
            pred=pred,
            found=frozenset(true.label[true.matched].tolist()),
            right=frozenset(predicted.label[predicted.matched].tolist()),
        )

    errors = Counter(row.volume for row in rows if row.outcome != "found")
    busiest = max((pair.name for pair in pairs), key=lambda name: errors[name])
    volume = shown(busiest)
    of_volume = [row for row in rows if row.volume == busiest]
    wrong = [row for row in of_volume if row.outcome != "found"] or of_volume
    middle = (
        [n // 2 for n in volume.truth.shape]
        if not wrong
        else [
            round(place / edge)
            for place, edge in zip(
                (wrong[0].z_um, wrong[0].y_um, wrong[0].x_um), volume.voxel_size.zyx, strict=True
            )
        ]
    )
    draw_overlay(volume, middle, folder / "overlay.png")
    worst = worst_nuclei(rows, _WORST_SHOWN)
    if worst:
        volumes = {name: shown(name) for name in dict.fromkeys(row.volume for row in worst)}
        radius_um = float(np.median([(6 / np.pi * row.volume_um3) ** (1 / 3) for row in worst]))
        draw_nuclei([(volumes[row.volume], row) for row in worst], folder / "worst_nuclei.png", radius_um)


def _read_all(
    pair: VolumePair,
) -> tuple[NDArray[Any] | None, NDArray[np.uint32], NDArray[np.uint32]]:
    """Read the image (if there is one), the truth and the prediction of a pair."""
    truth = pair.read_truth()
    return pair.read_image(), truth, pair.read_prediction(pair.pred, truth.shape)
