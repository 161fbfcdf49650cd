"""The charts of the report, from metrics.json and the history of the training."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nuclei3d.report.charts import Axes, Series, draw_chart
from nuclei3d.report.palette import METHOD_STYLES, style_of

_MOST_EMBRYOS = 6


def ap_chart(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw AP against the IoU that a match needs, with intervals as bands."""
    series = []
    for place, (name, scores) in enumerate(methods.items()):
        keys = list(scores["ap"])
        bounds = [scores["intervals"].get(f"ap_{key}") or (None, None) for key in keys]
        series.append(
            Series(
                name,
                style_of(place),
                [float(key) for key in keys],
                list(scores["ap"].values()),
                # bands of several methods cover each other: only the model has one
                low=[low for low, _ in bounds] if place == 0 else (),
                high=[high for _, high in bounds] if place == 0 else (),
                hints=[f"{name}: AP {_text(scores['ap'][key])} at IoU {key}" for key in keys],
            )
        )
    ious = series[0].x
    axes = Axes("IoU that a match needs", "average precision", (min(ious), max(max(ious), min(ious) + 0.05)))
    return draw_chart(axes, series, "Average precision by IoU threshold")


def contrast_chart(methods: Mapping[str, Mapping[str, Any]], quantity: str) -> str:
    """Draw recall or precision by bin of contrast, faintest left, with intervals as whiskers."""
    return _bin_chart(
        methods,
        "recall_by_contrast",
        quantity,
        lambda entry: _bounds_text(entry["from"], entry["to"]),
        f"contrast, faintest {'true nuclei' if quantity == 'recall' else 'predictions'} left",
    )


def depth_chart(methods: Mapping[str, Mapping[str, Any]], unit: str) -> str:
    """Draw recall by depth, nearest to the first plane left."""
    return _bin_chart(
        methods,
        "recall_by_depth_um",
        "recall",
        lambda entry: _bounds_text(entry["from"], entry["to"]),
        f"z of the nucleus ({unit}), first plane left",
    )


def counts_charts(metrics: Mapping[str, Any]) -> list[str]:
    """Draw true and predicted numbers of nuclei over time, one chart an embryo (the first few embryos)."""
    by_embryo: dict[str, list[Mapping[str, Any]]] = {}
    for volume in metrics["volumes"].values():
        by_embryo.setdefault(volume["embryo"], []).append(volume)
    charts = []
    for embryo, volumes in list(by_embryo.items())[:_MOST_EMBRYOS]:
        if len(volumes) < 2:
            continue
        x = [float(k) for k in range(len(volumes))]
        every = max(math.ceil(len(volumes) / 6), 1)
        ticks = [(x[k], volumes[k]["frame"]) for k in range(0, len(volumes), every)]
        top = max(max(v["n_true"], v["n_pred"]) for v in volumes)
        axes = Axes(f"frame of {embryo}", "nuclei", (0, x[-1]), (0, max(top * 1.08, 1)), ticks)
        series = [
            Series(
                name,
                METHOD_STYLES[place],
                x,
                [float(v[key]) for v in volumes],
                hints=[f"{v['frame']}: {v[key]} {name}" for v in volumes],
            )
            for place, (key, name) in ((5, ("n_true", "true")), (0, ("n_pred", "predicted")))
        ]
        charts.append(draw_chart(axes, series, f"Numbers of nuclei over time in {embryo}"))
    return charts


def training_charts(history: Path) -> list[tuple[str, str]]:
    """Draw the curves of a training from its history.csv: losses, and what was measured in 3D.

    Returns
    -------
    charts
        (caption, chart) of each; columns that are absent or empty are left out.
    """
    with history.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "epoch" not in rows[0]:
        return []
    epochs = [float(row["epoch"]) for row in rows]
    span = (min(epochs), max(max(epochs), min(epochs) + 1))

    def column(name: str) -> list[float | None]:
        return [_float(row.get(name)) for row in rows]

    charts = []
    losses = {"training": column("train_loss"), "validation": column("validation_loss")}
    known = [value for values in losses.values() for value in values if value is not None]
    if known:
        axes = Axes("epoch", "loss", span, (0, max(known) * 1.05))
        series = [
            Series(name, style_of(place), epochs, values, points=len(epochs) < 60)
            for place, (name, values) in enumerate(losses.items())
            if any(value is not None for value in values)
        ]
        charts.append(("Loss of the training", draw_chart(axes, series, "Loss by epoch")))
    ap = column("volume_ap")
    measured = [(epoch, value) for epoch, value in zip(epochs, ap, strict=True) if value is not None]
    if measured:
        axes = Axes("epoch", "AP at IoU .5", span)
        series = [
            Series("validation volumes", style_of(0), [e for e, _ in measured], [v for _, v in measured])
        ]
        charts.append(
            (
                "Average precision on the validation volumes",
                draw_chart(axes, series, "Validation AP by epoch"),
            )
        )
    return charts


def _bin_chart(
    methods: Mapping[str, Mapping[str, Any]],
    key: str,
    quantity: str,
    label: Callable[[Mapping[str, Any]], str],
    caption: str,
) -> str:
    interval = "interval" if quantity == "recall" else "precision_interval"
    count = "n" if quantity == "recall" else "n_pred"
    first = next(iter(methods.values()))[key]
    bins = len(first)
    series = []
    for place, (name, scores) in enumerate(methods.items()):
        entries = scores[key]
        # Methods with other depth bins than the model cannot share its axis.
        if [entry["to"] for entry in entries] != [entry["to"] for entry in first]:
            continue
        shift = (place - (len(methods) - 1) / 2) * 0.12
        bounds = [entry[interval] or (None, None) for entry in entries]
        series.append(
            Series(
                name,
                style_of(place),
                [k + shift for k in range(bins)],
                [entry[quantity] for entry in entries],
                low=[low for low, _ in bounds],
                high=[high for _, high in bounds],
                hints=[
                    f"{name}: {quantity} {_text(entry[quantity])} of {entry[count]}, "
                    f"95 % {_text(low)} to {_text(high)}"
                    for entry, (low, high) in zip(entries, bounds, strict=True)
                ],
                line=False,
                whiskers=True,
            )
        )
    ticks = [(float(k), label(entry)) for k, entry in enumerate(first)]
    axes = Axes(caption, quantity, (-0.5, bins - 0.5), x_ticks=ticks)
    return draw_chart(axes, series, f"{quantity} by bin")


def _bounds_text(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "all"
    if low is None:
        return f"< {high:.3g}"
    return f"> {low:.3g}" if high is None else f"{low:.3g}–{high:.3g}"


def _float(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return None if math.isnan(value) else value


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
