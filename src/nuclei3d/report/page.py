"""The report: one HTML file with everything in it, that needs no network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from nuclei3d.report.charts import (
    OUTLINES,
    ap_chart,
    contrast_chart,
    counts_charts,
    depth_chart,
    training_charts,
)
from nuclei3d.report.tables import (
    NucleusRow,
    group_table,
    look_up,
    notes,
    number,
    score_table,
    summary_sentences,
    volume_table,
)

_LISTED = (
    "volume",
    "outcome",
    "label",
    "z_um",
    "y_um",
    "x_um",
    "volume_um3",
    "contrast",
    "best_iou",
    "score",
)
# Found nuclei are listed too, as long as they do not make the page heavy.
_MOST_FOUND = 5000


def build_page(
    metrics: Mapping[str, Any],
    nuclei: Sequence[NucleusRow],
    volumes: Sequence[Mapping[str, Any]],
    *,
    method: str,
    title: str,
    unit: str = "um",
    history: Path | None = None,
) -> str:
    """Put the report together.

    Parameters
    ----------
    metrics
        The content of metrics.json.
    nuclei
        The rows of nuclei.csv.
    volumes
        What `pack_volumes` gave; may be empty.
    method
        What the predictions are called.
    unit
        Of lengths: ``um``, or ``voxels`` where no file states a voxel size.
    history
        history.csv of the training.
    """
    methods = {method: metrics, **metrics["baselines"]}
    shown = f"{len(volumes)} of {len(metrics['volumes'])} volumes are in this file"
    thinned = "" if len(volumes) == len(metrics["volumes"]) else f" {shown}: those with the most errors."
    note = (
        "Grey values are clipped to the percentiles 1 and 99.8 of each volume and compressed; they are for "
        f"looking, not for measuring.{thinned}"
    )
    viewer = Template(_text("viewer.html")).substitute(viewer_note=escape(note)) if volumes else ""
    listed = "".join(f"<li>{escape(line)}</li>" for line in summary_sentences(metrics, method))
    remarks = " ".join(notes(metrics))
    return Template(_text("report.html")).substitute(
        title=escape(title),
        subtitle=escape(
            f"Evaluated with nuclei3d {metrics['nuclei3d']}. Scores are pooled over all nuclei, not averaged "
            "over volumes."
        ),
        css=_text("report.css"),
        js=_text("report.js"),
        viewer_link='<a href="#view">Viewer</a>' if volumes else "",
        sentences=listed,
        cards=_cards(metrics),
        notes=f'<p class="note">{escape(remarks)}</p>' if remarks else "",
        viewer=viewer,
        scores=score_table(methods) + _averages(methods),
        charts=_charts(metrics, methods, unit, history),
        volumes=_volumes(metrics, linked=bool(volumes)),
        data=_embedded(nuclei, volumes, unit),
    )


def _cards(metrics: Mapping[str, Any]) -> str:
    wanted = (
        ("ap/0.50", "AP at IoU .5"),
        ("seg", "SEG"),
        ("mucov", "MUCov"),
        ("precision", "precision"),
        ("recall", "recall"),
        ("recall_faint", "recall, faintest bin"),
    )
    cards = []
    for key, name in wanted:
        interval = metrics["intervals"].get(key.replace("/", "_"))
        if key == "recall_faint" and metrics["recall_by_contrast"]:
            interval = metrics["recall_by_contrast"][0]["interval"]
        span = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "no interval"
        cards.append(
            f'<div class="card"><div class="name">{name}</div><div class="value">'
            f'{number(look_up(metrics, key))}</div><div class="range">{span}</div></div>'
        )
    return "".join(cards)


def _averages(methods: Mapping[str, Mapping[str, Any]]) -> str:
    rows = {
        name: {
            **scores["volume_mean"],
            "ap": {
                "0.50": scores["volume_mean"].get("ap_0.50"),
                "0.75": scores["volume_mean"].get("ap_0.75"),
            },
            "n_true": scores["n_true"],
            "n_pred": scores["n_pred"],
        }
        for name, scores in methods.items()
    }
    return f"<details><summary>Averaged over volumes instead</summary>{group_table(rows, 'method')}</details>"


def _charts(
    metrics: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    unit: str,
    history: Path | None,
) -> str:
    drawn = [("Average precision (band: 95 % interval)", ap_chart(methods))]
    if metrics["recall_by_contrast"]:
        drawn += [
            ("Are faint nuclei found? Recall by contrast", contrast_chart(methods, "recall")),
            ("Are faint predictions right?", contrast_chart(methods, "precision")),
        ]
    if metrics["recall_by_depth_um"]:
        drawn.append(("Recall by depth", depth_chart(methods, _symbol(unit))))
    drawn += [("Numbers of nuclei over time", chart) for chart in counts_charts(metrics)]
    if history is not None:
        drawn += training_charts(history)
    return "".join(f"<figure><h3>{escape(caption)}</h3>{chart}</figure>" for caption, chart in drawn)


def _volumes(metrics: Mapping[str, Any], *, linked: bool) -> str:
    parts = [volume_table(metrics["volumes"], linked=linked)]
    if len(metrics["by_embryo"]) > 1:
        parts.append("<h2>By embryo</h2>" + group_table(metrics["by_embryo"], "embryo"))
    if len(metrics["by_stage"]) > 1:
        parts.append("<h2>By number of nuclei</h2>" + group_table(metrics["by_stage"], "nuclei a volume"))
    return "".join(parts)


def _embedded(nuclei: Sequence[NucleusRow], volumes: Sequence[Mapping[str, Any]], unit: str) -> str:
    errors = [row for row in nuclei if row.outcome != "found"]
    found = [row for row in nuclei if row.outcome == "found"][:_MOST_FOUND]
    assert set(_LISTED) <= {field.name for field in fields(NucleusRow)}
    tree = {
        "volumes": list(volumes),
        "fields": _LISTED,
        "nuclei": [[_plain(asdict(row)[name]) for name in _LISTED] for row in errors + found]
        if volumes
        else [],
        "colors": OUTLINES,
        "unit": _symbol(unit),
    }
    # Inside a script element only "</" and "<!--" have a meaning; JSON may write < as an escape.
    return json.dumps(tree, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 3)
    return value


def _symbol(unit: str) -> str:
    return "µm" if unit == "um" else unit


def _text(name: str) -> str:
    return resources.files("nuclei3d.report").joinpath(name).read_text(encoding="utf-8")
