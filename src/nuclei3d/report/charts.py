"""The charts of the report as inline SVG: small, sharp at any zoom, without a library in the browser.

Colours and marks can be told apart by the colour-blind (Okabe and Ito 2008), and in greyscale by shape.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class MethodStyle:
    """How one method is drawn in every chart: colour, dash pattern of lines, shape of points."""

    color: str
    dash: str
    marker: str


#: The model first, then the baselines in the order in which they are given.
METHOD_STYLES = (
    MethodStyle("#0072B2", "", "circle"),
    MethodStyle("#E69F00", "7 4", "square"),
    MethodStyle("#009E73", "2 3", "triangle"),
    MethodStyle("#CC79A7", "9 3 2 3", "diamond"),
    MethodStyle("#56B4E9", "4 2", "cross"),
    MethodStyle("#000000", "1 2", "circle"),
)

#: Outlines: found truth, prediction, missed truth, false prediction.
OUTLINES = {"true": "#56B4E9", "pred": "#F0E442", "missed": "#FF6A13", "false": "#E58BBF"}


def style_of(position: int) -> MethodStyle:
    """Give the style of the method at a position; they repeat after the last."""
    return METHOD_STYLES[position % len(METHOD_STYLES)]


_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 12.0, 42.0


@dataclass(frozen=True)
class Series:
    """One line of points; None leaves a gap. `low` and `high` bound the interval of each point."""

    name: str
    style: MethodStyle
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    hints: Sequence[str] = ()
    line: bool = True
    points: bool = True
    whiskers: bool = False


@dataclass(frozen=True)
class Axes:
    """Extent and captions of a chart; `x_ticks` are (position, text)."""

    x_caption: str
    y_caption: str
    x_range: tuple[float, float]
    y_range: tuple[float, float] = (0.0, 1.0)
    x_ticks: Sequence[tuple[float, str]] = field(default_factory=tuple)
    width: float = 460.0
    height: float = 270.0

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Give the position on the paper of a point."""
        x0, x1 = self.x_range
        y0, y1 = self.y_range
        across = (x - x0) / (x1 - x0 or 1)
        up = (min(max(y, y0), y1) - y0) / (y1 - y0 or 1)
        return (
            _LEFT + across * (self.width - _LEFT - _RIGHT),
            self.height - _BOTTOM - up * (self.height - _TOP - _BOTTOM),
        )


def draw_chart(axes: Axes, series: Sequence[Series], title: str) -> str:
    """Draw lines, points, whiskers and bands with a legend below; screen readers read the title, not
    drawn.
    """
    parts = [
        f'<svg class="chart" viewBox="0 0 {axes.width:g} {axes.height:g}" role="img" '
        f'aria-label="{escape(title, quote=True)}">',
        *_grid(axes),
    ]
    for item in series:
        if item.line and item.low:
            parts.append(_band(axes, item))
    for item in series:
        parts.append(f'<g stroke="{item.style.color}" fill="{item.style.color}">')
        if item.line:
            parts.append(_line(axes, item))
        if item.whiskers:
            parts += _whiskers(axes, item)
        if item.points:
            parts += _points(axes, item)
        parts.append("</g>")
    parts.append("</svg>")
    return "".join(parts) + draw_legend([(item.name, item.style) for item in series])


def draw_legend(entries: Sequence[tuple[str, MethodStyle]]) -> str:
    """Draw names with their line and mark; nothing for a single entry."""
    if len(entries) < 2:
        return ""
    keys = []
    for name, style in dict.fromkeys(entries):
        mark = _mark(style.marker, 14, 6, 4)
        keys.append(
            f'<span class="key"><svg viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">'
            f'<g stroke="{style.color}" fill="{style.color}"><path d="M0 6H28" fill="none" stroke-width="2" '
            f'stroke-dasharray="{style.dash}"/>{mark}</g></svg>{escape(name)}</span>'
        )
    return f'<div class="legend">{"".join(keys)}</div>'


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Give about `count` round numbers between two bounds."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def _grid(axes: Axes) -> list[str]:
    left, bottom = axes.place(axes.x_range[0], axes.y_range[0])
    right, top = axes.place(axes.x_range[1], axes.y_range[1])
    parts = ['<g class="grid">']
    for tick in nice_ticks(*axes.y_range):
        _, y = axes.place(axes.x_range[0], tick)
        parts.append(f'<path d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
    parts.append(f'</g><g class="axis"><path d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"/>')
    for tick in nice_ticks(*axes.y_range):
        _, y = axes.place(axes.x_range[0], tick)
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick, text in axes.x_ticks or [(t, f"{t:g}") for t in nice_ticks(*axes.x_range)]:
        x, _ = axes.place(tick, axes.y_range[0])
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{escape(text)}</text>')
    middle = (left + right) / 2
    parts.append(
        f'<text class="caption" x="{middle:.1f}" y="{axes.height - 6:.1f}" text-anchor="middle">'
        f"{escape(axes.x_caption)}</text>"
        f'<text class="caption" transform="translate(12 {(top + bottom) / 2:.1f}) rotate(-90)" '
        f'text-anchor="middle">{escape(axes.y_caption)}</text></g>'
    )
    return parts


def _line(axes: Axes, item: Series) -> str:
    steps, pen_down = [], False
    for x, y in zip(item.x, item.y, strict=True):
        if y is None:
            pen_down = False
            continue
        across, up = axes.place(x, y)
        steps.append(f"{'L' if pen_down else 'M'}{across:.1f} {up:.1f}")
        pen_down = True
    return f'<path d="{"".join(steps)}" fill="none" stroke-width="2" stroke-dasharray="{item.style.dash}"/>'


def _band(axes: Axes, item: Series) -> str:
    points = [
        (axes.place(x, low), axes.place(x, high))
        for x, low, high in zip(item.x, item.low, item.high, strict=True)
        if low is not None and high is not None
    ]
    outline = [point[1] for point in points] + [point[0] for point in reversed(points)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in outline)
    return f'<path d="M{path}Z" fill="{item.style.color}" opacity="0.15"/>' if outline else ""


def _whiskers(axes: Axes, item: Series) -> list[str]:
    parts = []
    for x, low, high in zip(item.x, item.low, item.high, strict=True):
        if low is None or high is None:
            continue
        across, bottom = axes.place(x, low)
        _, top = axes.place(x, high)
        parts.append(
            f'<path d="M{across:.1f} {bottom:.1f}V{top:.1f}M{across - 3:.1f} {bottom:.1f}h6'
            f'M{across - 3:.1f} {top:.1f}h6" fill="none" stroke-width="1.4"/>'
        )
    return parts


def _points(axes: Axes, item: Series) -> list[str]:
    parts = []
    for index, (x, y) in enumerate(zip(item.x, item.y, strict=True)):
        if y is None:
            continue
        across, up = axes.place(x, y)
        hint = item.hints[index] if item.hints else f"{item.name}: {y:.3g}"
        mark = _mark(item.style.marker, across, up, 4)
        parts.append(f"<g><title>{escape(hint)}</title>{mark}</g>")
    return parts


def _mark(marker: str, x: float, y: float, r: float) -> str:
    d = r + 1
    shapes = {
        "square": f"M{x - r:.1f} {y - r:.1f}h{2 * r:g}v{2 * r:g}h-{2 * r:g}Z",
        "triangle": f"M{x:.1f} {y - d:.1f}l{d:g} {2 * r:g}h-{2 * d:g}Z",
        "diamond": f"M{x:.1f} {y - d:.1f}l{d:g} {d:g}l-{d:g} {d:g}l-{d:g} -{d:g}Z",
        "cross": f"M{x - r:.1f} {y - r:.1f}l{2 * r:g} {2 * r:g}m0 -{2 * r:g}l-{2 * r:g} {2 * r:g}",
    }
    if marker == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" stroke="none"/>'
    width = "2" if marker == "cross" else "0"
    return f'<path d="{shapes[marker]}" stroke-width="{width}"/>'


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


def bin_chart(
    methods: Mapping[str, Mapping[str, Any]],
    key: str,
    quantity: Literal["recall", "precision"],
    caption: str,
) -> str:
    """Draw recall or precision by bin of contrast or depth, with intervals as whiskers."""
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
    ticks = [(float(k), _bounds_text(entry["from"], entry["to"])) for k, entry in enumerate(first)]
    axes = Axes(caption, quantity, (-0.5, bins - 0.5), x_ticks=ticks)
    return draw_chart(axes, series, f"{quantity} by bin")


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

    Gives (caption, chart) of each; columns that are absent or empty are left out.
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
