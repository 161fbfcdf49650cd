"""Charts put numbers where they belong and hold no text that a browser would take for markup."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from nuclei3d.report.charts import (
    METHOD_STYLES,
    OUTLINES,
    counts_charts,
    draw_ap,
    draw_bins,
    draw_chart,
    draw_series,
    style_of,
    training_charts,
)


def test_the_chart_is_well_formed_and_names_are_escaped() -> None:
    one = {"ap": {"0.50": 0.2, "0.75": None}, "intervals": {"ap_0.50": [0.1, 0.3]}}
    chart = draw_chart(lambda axes: draw_ap(axes, {"<b>&\"'": one, "$b$": one}))
    root = ElementTree.fromstring(chart)
    assert root.attrib["aria-label"] == "average precision by IoU that a match needs"
    texts = {node.text for node in root.iter("text")}
    assert {"<b>&\"'", "$b$", "average precision"} <= texts


def test_points_tell_their_numbers_under_the_mouse() -> None:
    entry = {"from": None, "to": None, "n": 3, "recall": 1 / 3, "interval": [0.1, 0.6]}
    unknown = entry | {"recall": None, "interval": None}
    methods = {"M": {"bins": [entry]}, "none": {"bins": [unknown]}, "other": {"bins": [entry | {"to": 2.0}]}}
    chart = draw_chart(lambda axes: draw_bins(axes, methods, "bins", "recall", "depth"))
    titles = [node.text for node in ElementTree.fromstring(chart).iter("title")]
    # undefined numbers have no point, and other bins no place
    assert titles == ["M: recall 0.333 of 3, 95 % 0.100 to 0.600"]
    assert "other" not in chart


def test_missing_values_interrupt_a_line() -> None:
    y = [0.1, 0.2, None, 0.4, 0.5]
    chart = draw_chart(lambda axes: draw_series(axes, "a", range(5), y, "abcde", **style_of(0)))
    (path,) = re.findall(r'<path d="([^"]+)"[^>]*style="fill: none; stroke: #0072b2', chart)
    assert path.count("M") == 2
    assert re.findall(r"<title>(\w)</title>", chart) == ["a", "b", "d", "e"]


def test_only_embryos_with_several_frames_have_a_course_of_time() -> None:
    frames = (('"<A>', 0), ('"<A>', 1), ("B", 0))
    volumes = [{"embryo": embryo, "frame": f"t{k}", "n_true": k, "n_pred": 2} for embryo, k in frames]
    (chart,) = counts_charts(volumes)
    root = ElementTree.fromstring(chart)
    assert root.attrib["aria-label"] == 'nuclei by frame of "<A>'
    hints = [node.text for node in root.iter("title")]
    assert hints == ["t0: 0 true", "t1: 1 true", "t0: 2 predicted", "t1: 2 predicted"]


def test_columns_of_a_history_that_are_absent_or_empty_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    for text, captions in (
        ("", []),
        ("epoch,train_loss\n", []),
        ("epoch,train_loss,volume_ap\n1,0.5,\n2,0.25,\n", ["Loss of the training"]),
        ("epoch,train_loss,volume_ap\n1,x,0.5\n", ["Average precision on the validation volumes"]),
    ):
        path.write_text(text)
        assert [caption for caption, _ in training_charts(path)] == captions


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
    [list(OUTLINES.values()), [style["color"] for style in METHOD_STYLES[:3]]],
    ids=["outlines", "methods"],
)
def test_colours_stay_apart_for_the_colour_blind(matrix: list[list[float]], colors: list[str]) -> None:
    seen = [seen_by(color, matrix) for color in colors]
    for index, first in enumerate(seen):
        for second in seen[index + 1 :]:
            assert sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) ** 0.5 > 0.15
