"""Charts as inline SVG: small, sharp at any zoom, and without a library in the reader's browser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from nuclei3d.report.palette import MethodStyle

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
    """Draw lines, points, whiskers and bands with a legend below the chart.

    Parameters
    ----------
    title
        Read aloud by screen readers, not drawn.
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
