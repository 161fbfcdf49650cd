"""Charts put numbers where they belong and hold no text that a browser would take for markup."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from nuclei3d.report.charts import METHOD_STYLES, OUTLINES, Axes, Series, draw_chart, nice_ticks, style_of


def test_the_chart_is_well_formed_and_names_are_escaped() -> None:
    series = [
        Series("<b>&\"'", style_of(0), [0, 1], [0.2, 0.4], low=[0.1, None], high=[0.3, None]),
        Series("b", style_of(1), [0, 1], [None, 0.4], low=[0, 0], high=[1, 1], whiskers=True, line=False),
    ]
    chart = draw_chart(Axes("x", "y", (0, 1)), series, "a <title>")
    ElementTree.fromstring(f"<div>{chart}</div>")
    assert "<b>" not in chart


def test_points_lie_on_their_scale() -> None:
    axes = Axes("x", "y", (0, 10), (0, 1))
    left, bottom = axes.place(0, 0)
    right, top = axes.place(10, 1)
    assert axes.place(5, 0.5) == pytest.approx(((left + right) / 2, (bottom + top) / 2))
    assert top < bottom
    # what is out of range is drawn at the border, not outside
    assert axes.place(5, 7) == axes.place(5, 1)


def test_missing_values_interrupt_a_line() -> None:
    style = style_of(0)
    chart = draw_chart(
        Axes("x", "y", (0, 4)), [Series("a", style, [0, 1, 2, 3, 4], [0.1, 0.2, None, 0.4, 0.5])], "t"
    )
    path = re.search(r'<path d="([^"]+)" fill="none" stroke-width="2" stroke-dasharray=""', chart)
    assert path is not None
    assert path.group(1).count("M") == 2
    assert chart.count("<circle") == 4


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 53, [0, 20, 40]), (0.5, 0.9, [0.5, 0.6, 0.7, 0.8, 0.9])],
)
def test_ticks_are_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == ticks


def test_an_empty_range_has_one_tick() -> None:
    assert nice_ticks(3, 3) == [3]


def seen_by(color: str, matrix: list[list[float]]) -> list[float]:
    """Give a colour as the colour-blind see it, in linear RGB (Machado et al. 2009, severity 1)."""
    rgb = [(int(color[k : k + 2], 16) / 255) ** 2.2 for k in (1, 3, 5)]
    return [sum(weight * part for weight, part in zip(row, rgb, strict=True)) for row in matrix]


@pytest.mark.parametrize(
    "matrix",
    [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ],
    ids=["protanopia", "deuteranopia"],
)
@pytest.mark.parametrize(
    "colors",
    [list(OUTLINES.values()), [style.color for style in METHOD_STYLES[:3]]],
    ids=["outlines", "methods"],
)
def test_colours_stay_apart_for_the_colour_blind(matrix: list[list[float]], colors: list[str]) -> None:
    seen = [seen_by(color, matrix) for color in colors]
    for index, first in enumerate(seen):
        for second in seen[index + 1 :]:
            assert sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) ** 0.5 > 0.15
