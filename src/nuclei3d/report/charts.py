"""The charts of the report as inline SVG: small, sharp at any zoom, without a library in the browser.

Colours and marks can be told apart by the colour-blind (Okabe and Ito 2008), and in greyscale by shape.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nuclei3d.scoring.matching import Floats

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_WIDE, _OPEN = {"linewidth": 3.2, "markersize": 7.5}, {"linewidth": 1.6, "markerfacecolor": "none"}
#: How a method is drawn in every chart: the model first, then the baselines in the order given. Later ones
#: are thinner, broken, and have open marks: where they lie on the model's line, it is seen below them.
METHOD_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o", **_WIDE},
    {"color": "#E69F00", "linestyle": "--", "marker": "s", **_OPEN},
    {"color": "#009E73", "linestyle": ":", "marker": "^", **_OPEN},
    {"color": "#CC79A7", "linestyle": "-.", "marker": "D", **_OPEN},
    {"color": "#56B4E9", "linestyle": (0, (2, 1)), "marker": "x", **_OPEN},
    {"color": "#000000", "linestyle": (0, (1, 2)), "marker": "v", **_OPEN},
)

#: Outlines: found truth, prediction, missed truth, false prediction.
OUTLINES = {"true": "#56B4E9", "pred": "#F0E442", "missed": "#FF6A13", "false": "#E58BBF"}

_MOST_EMBRYOS = 6
_LOOK: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8c959f",
    "axes.grid": True,
    "font.sans-serif": ["DejaVu Sans"],
    "axes.grid.axis": "y",
    "grid.color": "#eaeef2",
    "legend.frameon": False,
    "lines.markersize": 5,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "nuclei3d",
}
# What XML wants and HTML does not: namespaces, and names of groups, which are the same in every chart.
_XML_ONLY = re.compile(r' xmlns(:xlink)?="[^"]*"|(?<=<g) id="[\w.]+_\d+"')


def style_of(position: int) -> dict[str, Any]:
    """Give the style of the method at a position; they repeat after the last."""
    return METHOD_STYLES[position % len(METHOD_STYLES)]


def draw_chart(draw: Callable[[Axes], None]) -> str:
    """Give what `draw` draws as SVG with a legend below; screen readers read what is drawn by what."""
    import matplotlib
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=(5.1, 3.3), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        handles, names = axes.get_legend_handles_labels()
        if len(names) > 1:
            columns = 3 if max(map(len, names)) < 16 else 2
            figure.legend(handles, names, loc="outside lower left", ncols=columns)
        title = f"{axes.get_ylabel()} by {axes.get_xlabel()}"
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    text = file.getvalue()
    svg = _XML_ONLY.sub("", text[text.index("<svg") :]).replace("xlink:href", "href")
    svg = re.sub(r'<g id="hint ([^"]*)">', r"<g><title>\1</title>", svg)
    return svg.replace("<svg", f'<svg class="chart" role="img" aria-label="{escape(title)}"', 1)


def draw_series(
    axes: Axes,
    name: str,
    x: Sequence[float] | Floats,
    y: Sequence[float | None],
    hints: Sequence[str],
    **style: Any,
) -> None:
    """Draw a line of points; None leaves a gap. The hint of a point shows under the mouse."""
    axes.plot(x, np.array(y, float), label=name, clip_on=False, **style)
    for across, up, hint in zip(x, y, hints, strict=False):
        if up is not None:
            axes.plot(across, up, "o", markersize=10, alpha=0, clip_on=False, gid=f"hint {hint}")


def draw_ap(axes: Axes, methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw AP against the IoU that a match needs; the model's intervals are a band."""
    for place, (name, scores) in enumerate(methods.items()):
        ious = [float(iou) for iou in scores["ap"]]
        hints = [f"{name}: AP {_text(ap)} at IoU {iou}" for iou, ap in scores["ap"].items()]
        # side by side: lines of methods that score alike would hide each other's marks
        across = [iou + (place - (len(methods) - 1) / 2) * 0.006 for iou in ious]
        draw_series(axes, name, across, list(scores["ap"].values()), hints, **style_of(place))
        # bands of several methods would cover each other
        if place == 0:
            bounds = [scores["intervals"].get(f"ap_{iou}") or (np.nan, np.nan) for iou in scores["ap"]]
            axes.fill_between(
                ious, *np.transpose(bounds), color=style_of(0)["color"], alpha=0.15, linewidth=0
            )
    axes.set(xlabel="IoU that a match needs", ylabel="average precision", ylim=(0, 1))


def draw_bins(
    axes: Axes, methods: Mapping[str, Mapping[str, Any]], key: str, quantity: str, caption: str
) -> None:
    """Draw recall or precision by bin of contrast or depth, with intervals as whiskers."""
    interval, count = ("interval", "n") if quantity == "recall" else ("precision_interval", "n_pred")
    first = next(iter(methods.values()))[key]
    for place, (name, scores) in enumerate(methods.items()):
        entries = scores[key]
        # Methods with other depth bins than the model cannot share its axis.
        if [entry["to"] for entry in entries] != [entry["to"] for entry in first]:
            continue
        x = np.arange(len(entries)) + (place - (len(methods) - 1) / 2) * 0.12
        low, high = np.transpose([entry[interval] or (np.nan, np.nan) for entry in entries])
        hints = [
            f"{name}: {quantity} {_text(entry[quantity])} of {entry[count]}, "
            f"95 % {_text((entry[interval] or [None])[0])} to {_text((entry[interval] or [None])[-1])}"
            for entry in entries
        ]
        style = style_of(place) | {"linestyle": ""}
        # The bounds of a percentile interval need not hold the estimate itself.
        whiskers: dict[str, Any] = {"fmt": "none", "ecolor": style["color"], "capsize": 3, "clip_on": False}
        axes.errorbar(x, (low + high) / 2, (high - low) / 2, **whiskers)
        draw_series(axes, name, x, [entry[quantity] for entry in entries], hints, **style)
    axes.set(xlabel=caption, ylabel=quantity, ylim=(0, 1), xlim=(-0.5, len(first) - 0.5))
    axes.set_xticks(range(len(first)), [_bounds_text(entry["from"], entry["to"]) for entry in first])


def charts_of(
    methods: Mapping[str, Mapping[str, Any]], unit: str, history: Path | None
) -> list[tuple[str, str]]:
    """Draw the charts of a report as (caption, SVG).

    `methods` has the metrics.json by method, the model first; `unit` is that of lengths; `history` the
    history.csv of the training.
    """
    metrics = next(iter(methods.values()))
    charts = [("Average precision (band: 95 % interval)", draw_chart(partial(draw_ap, methods=methods)))]
    contrast, depth = "recall_by_contrast", "recall_by_depth_um"
    for title, key, quantity, caption in (
        (
            "Are faint nuclei found? Recall by contrast",
            contrast,
            "recall",
            "contrast, faintest true nuclei left",
        ),
        ("Are faint predictions right?", contrast, "precision", "contrast, faintest predictions left"),
        ("Recall by depth", depth, "recall", f"z of the nucleus ({unit}), first plane left"),
    ):
        if metrics[key]:
            draw = partial(draw_bins, methods=methods, key=key, quantity=quantity, caption=caption)
            charts.append((title, draw_chart(draw)))
    charts += [("Numbers of nuclei over time", chart) for chart in counts_charts(metrics["volumes"].values())]
    return charts + (training_charts(history) if history is not None else [])


def counts_charts(volumes: Iterable[Mapping[str, Any]]) -> list[str]:
    """Draw true and predicted numbers of nuclei over time, one chart an embryo (the first few embryos)."""
    by_embryo: dict[str, list[Mapping[str, Any]]] = {}
    for volume in volumes:
        by_embryo.setdefault(volume["embryo"], []).append(volume)

    def draw(axes: Axes, embryo: str, frames: Sequence[Mapping[str, Any]]) -> None:
        for place, key, name in ((5, "n_true", "true"), (0, "n_pred", "predicted")):
            hints = [f"{frame['frame']}: {frame[key]} {name}" for frame in frames]
            counts = [frame[key] for frame in frames]
            draw_series(
                axes, name, range(len(frames)), counts, hints, **METHOD_STYLES[place], zorder=2 + place
            )
        ticks = range(0, len(frames), math.ceil(len(frames) / 6))
        axes.set_xticks(ticks, [frames[k]["frame"] for k in ticks])
        axes.set(xlabel=f"frame of {embryo}", ylabel="nuclei", ylim=(0, max(1, axes.get_ylim()[1])))

    return [
        draw_chart(partial(draw, embryo=embryo, frames=frames))
        for embryo, frames in list(by_embryo.items())[:_MOST_EMBRYOS]
        if len(frames) > 1
    ]


def training_charts(history: Path) -> list[tuple[str, str]]:
    """Draw the curves of a training from its history.csv: losses, and what was measured in 3D.

    Gives (caption, SVG) of each; columns that are absent or empty are left out.
    """
    import pandas as pd

    with history.open(newline="", encoding="utf-8") as file:
        rows = pd.DataFrame(csv.DictReader(file)).apply(pd.to_numeric, errors="coerce")
    charts = []
    for caption, label, top, columns in (
        ("Loss of the training", "loss", None, {"training": "train_loss", "validation": "validation_loss"}),
        ("Average precision on the validation volumes", "AP at IoU .5", 1.0, {"volumes": "volume_ap"}),
    ):
        known = {name: ["epoch", column] for name, column in columns.items() if {"epoch", column} <= {*rows}}
        curves = {name: rows[pair].dropna() for name, pair in known.items()}
        curves = {name: curve for name, curve in curves.items() if len(curve)}
        if curves:
            draw = partial(_draw_curves, curves=curves, label=label, top=top)
            charts.append((caption, draw_chart(draw)))
    return charts


def _draw_curves(axes: Axes, curves: Mapping[str, pd.DataFrame], label: str, top: float | None) -> None:
    for place, (name, curve) in enumerate(curves.items()):
        epochs, values = (curve[column].tolist() for column in curve)
        style, hints = style_of(place), [f"{name}: {value:.3g}" for value in values]
        if len(epochs) >= 60:
            # so many points would hide the line
            style, hints = style | {"marker": ""}, []
        draw_series(axes, name, epochs, values, hints, **style)
    axes.set(xlabel="epoch", ylabel=label, ylim=(0, top))
    axes.locator_params("x", integer=True)


def _bounds_text(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "all"
    if low is None:
        return f"< {high:.3g}"
    return f"> {low:.3g}" if high is None else f"{low:.3g}–{high:.3g}"


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
