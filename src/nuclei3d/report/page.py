"""The report: one HTML file with everything in it, that needs no network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, Literal

from nuclei3d.report.charts import OUTLINES, ap_chart, bin_chart, counts_charts, training_charts
from nuclei3d.report.tables import NucleusRow
from nuclei3d.scoring.bootstrap import FEW_UNITS, side_of_zero

_PLACE = ("z_um", "y_um", "x_um")
_LISTED = ("volume", "outcome", "label", *_PLACE, "volume_um3", "contrast", "best_iou", "score")
# Found nuclei are listed too, as long as they do not make the page heavy.
_MOST_FOUND = 5000


def build_page(
    metrics: Mapping[str, Any],
    nuclei: Sequence[NucleusRow],
    volumes: Sequence[Mapping[str, Any]],
    *,
    method: str,
    unit: Literal["um", "voxels"] = "um",
    history: Path | None = None,
) -> str:
    """Put the report together.

    Parameters
    ----------
    metrics, nuclei
        The content of metrics.json, and the rows of nuclei.csv.
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
    remarks = " ".join(notes(metrics))
    return Template(_text("report.html")).substitute(
        title=escape(f"How good is {method}?"),
        subtitle=escape(
            f"Evaluated with nuclei3d {metrics['nuclei3d']}. Scores are pooled over all nuclei, not averaged "
            "over volumes."
        ),
        css=_text("report.css"),
        js=_text("report.js"),
        viewer_link='<a href="#view">Viewer</a>' if volumes else "",
        sentences="".join(f"<li>{escape(line)}</li>" for line in summary_sentences(metrics, method)),
        cards=_cards(metrics),
        notes=f'<p class="note">{escape(remarks)}</p>' if remarks else "",
        viewer=viewer,
        scores=_score_table(methods) + _averages(methods),
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
        interval = _interval(metrics, key)
        span = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "no interval"
        cards.append(
            f'<div class="card"><div class="name">{name}</div><div class="value">'
            f'{_number(_look_up(metrics, key))}</div><div class="range">{span}</div></div>'
        )
    return "".join(cards)


def _averages(methods: Mapping[str, Mapping[str, Any]]) -> str:
    rows = {
        name: {
            **scores["volume_mean"],
            "ap": {iou: scores["volume_mean"].get(f"ap_{iou}") for iou in ("0.50", "0.75")},
            "n_true": scores["n_true"],
            "n_pred": scores["n_pred"],
        }
        for name, scores in methods.items()
    }
    return (
        f"<details><summary>Averaged over volumes instead</summary>{_group_table(rows, 'method')}</details>"
    )


def _charts(
    metrics: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    unit: str,
    history: Path | None,
) -> str:
    drawn = [("Average precision (band: 95 % interval)", ap_chart(methods))]
    if metrics["recall_by_contrast"]:
        key, caption = "recall_by_contrast", "contrast, faintest true nuclei left"
        drawn.append(
            ("Are faint nuclei found? Recall by contrast", bin_chart(methods, key, "recall", caption))
        )
        caption = "contrast, faintest predictions left"
        drawn.append(("Are faint predictions right?", bin_chart(methods, key, "precision", caption)))
    if metrics["recall_by_depth_um"]:
        caption = f"z of the nucleus ({_symbol(unit)}), first plane left"
        drawn.append(("Recall by depth", bin_chart(methods, "recall_by_depth_um", "recall", caption)))
    drawn += [("Numbers of nuclei over time", chart) for chart in counts_charts(metrics)]
    if history is not None:
        drawn += training_charts(history)
    return "".join(f"<figure><h3>{escape(caption)}</h3>{chart}</figure>" for caption, chart in drawn)


def _volumes(metrics: Mapping[str, Any], *, linked: bool) -> str:
    parts = [_volume_table(metrics["volumes"], linked=linked)]
    if len(metrics["by_embryo"]) > 1:
        parts.append("<h2>By embryo</h2>" + _group_table(metrics["by_embryo"], "embryo"))
    if len(metrics["by_stage"]) > 1:
        parts.append("<h2>By number of nuclei</h2>" + _group_table(metrics["by_stage"], "nuclei a volume"))
    return "".join(parts)


def _embedded(nuclei: Sequence[NucleusRow], volumes: Sequence[Mapping[str, Any]], unit: str) -> str:
    errors = [row for row in nuclei if row.outcome != "found"]
    found = [row for row in nuclei if row.outcome == "found"][:_MOST_FOUND]
    tree = {
        "volumes": list(volumes),
        "fields": _LISTED,
        "nuclei": [[_plain(getattr(row, name)) for name in _LISTED] for row in errors + found]
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


def summary_sentences(metrics: Mapping[str, Any], method: str) -> list[str]:
    """Say what a metrics.json means, the most important first; `method` is what the predictions are
    called.
    """
    volumes = metrics["volumes"]
    embryos = {volume["embryo"] for volume in volumes.values()}
    if not metrics["n_true"]:
        return [
            f"The {_count(len(volumes), 'volume')} hold no true nuclei; {method} reports "
            f"{_count(metrics['n_pred'], 'nucleus', 'nuclei')}, all of them false."
        ]
    false = "it predicts nothing at all"
    if metrics["precision"] is not None:
        share = _percent(1 - metrics["precision"])
        false = (
            f"of its {_count(metrics['n_pred'], 'prediction')}, {share} are false "
            "(no true nucleus overlaps them by half)"
        )
    sentences = [
        f"In {_count(len(volumes), 'volume')} of {_count(len(embryos), 'embryo')} with "
        f"{_count(metrics['n_true'], 'nucleus', 'nuclei')}, {method} finds {_percent(metrics['recall'])}"
        f"{_in_brackets(metrics, 'recall')} of them; {false}.",
        *_faint_sentences(metrics),
        *_error_sentences(metrics),
        *_comparisons(metrics, method),
    ]
    if metrics["intervals_over"]:
        few = int(metrics["intervals_over"].split()[0]) < FEW_UNITS
        sentences.append(
            f"Ranges in brackets are 95 % intervals from resampling {metrics['intervals_over']}"
            + ("; with so few, take them as rough." if few else ".")
        )
    else:
        sentences.append("There is only one volume or block of time, so no interval can be given for it.")
    return sentences


def notes(metrics: Mapping[str, Any]) -> list[str]:
    """Say what was left out or chosen."""
    lines = []
    unpaired = metrics["unpaired"]
    if unpaired["truth"]:
        lines.append(f"{_count(len(unpaired['truth']), 'true volume')} without prediction left out.")
    if unpaired["prediction"]:
        lines.append(f"{_count(len(unpaired['prediction']), 'prediction')} without truth left out.")
    if metrics["contrast_edges"] is None:
        lines.append("Contrast was not measured: it needs the images and the voxel size.")
    elif metrics["contrast_edges_from"] == "training labels":
        lines.append("The contrast bins are the quintiles of the training labels.")
    else:
        lines.append(
            "The contrast bins are the quantiles of these true labels themselves, because no training set "
            "was named; they are not the same bins as in another evaluation."
        )
    return lines


def _faint_sentences(metrics: Mapping[str, Any]) -> list[str]:
    bins = metrics["recall_by_contrast"]
    if not bins or bins[0]["recall"] is None or bins[-1]["recall"] is None:
        return []
    faint, bright = bins[0], bins[-1]
    sentence = (
        f"Of the faintest nuclei ({faint['n']}) it finds {_percent(faint['recall'])}"
        f"{_bounds(faint['interval'])}, of the brightest ({bright['n']}) {_percent(bright['recall'])}"
        f"{_bounds(bright['interval'])}"
    )
    if faint["precision"] is not None:
        sentence += f"; of its own predictions as faint as that, {_percent(faint['precision'])} are right"
    at = (metrics["recall_at_precision"] or {}).get("0.95")
    if at and at["recall_faint"] is not None:
        sentence += (
            f". Cut at a score of {at['score']:.2f}, where 95 % of all predictions are right, it finds "
            f"{_percent(at['recall_faint'])} of the faintest"
        )
    return [sentence + "."]


def _error_sentences(metrics: Mapping[str, Any]) -> list[str]:
    parts = []
    if metrics["splits"]:
        parts.append(f"{_count(metrics['splits'], 'nucleus is', 'nuclei are')} cut in pieces")
    if metrics["merges"]:
        parts.append(f"{_count(metrics['merges'], 'prediction joins', 'predictions join')} several nuclei")
    words = " and ".join(parts) if parts else "No nucleus is cut in pieces and none are joined"
    shape = ""
    if metrics["surface_distance_um"] is not None:
        shape = (
            f". Outlines of found nuclei lie {metrics['surface_distance_um']:.2g} µm from the true ones on "
            f"average, centres {metrics['centre_distance_um']:.2g} µm"
        )
    return [words[0].upper() + words[1:] + shape + "."]


def _comparisons(metrics: Mapping[str, Any], method: str) -> list[str]:
    own = metrics["ap"].get("0.50")
    if own is None or not metrics["baselines"]:
        return []
    rivals = []
    for name, scores in metrics["baselines"].items():
        rival, gap = scores["ap"].get("0.50"), scores["behind_model"]
        if rival is None:
            continue
        if gap is None:
            verdict = "below" if own > rival else "not below"
        else:
            side = side_of_zero(*gap["interval"])
            verdict = {1: "really below", -1: "really above", 0: "not really different"}[side]
        rivals.append(f"{name} {rival:.3f} ({verdict})")
    return [
        f"Average precision at IoU .5 (1 is perfect) is {own:.3f}{_in_brackets(metrics, 'ap_0.50')} for "
        f"{method}; on the same volumes: {', '.join(rivals)}."
    ]


def _in_brackets(metrics: Mapping[str, Any], name: str) -> str:
    return _bounds(metrics["intervals"].get(name), percent=name in ("recall", "precision"))


def _bounds(interval: list[float] | None, *, percent: bool = True) -> str:
    if interval is None:
        return ""
    if percent:
        return f" ({100 * interval[0]:.0f} to {100 * interval[1]:.0f} %)"
    return f" ({interval[0]:.3f} to {interval[1]:.3f})"


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.0f} %"


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


# (key, name, explanation); keys with a slash lie one level down.
_ROWS = (
    ("ap/0.50", "AP at IoU .5", "found / (found + missed + false); a match overlaps by half of the union"),
    ("ap/0.75", "AP at IoU .75", "the same with outlines that fit closely"),
    ("f1/0.50", "F1 at IoU .5", "harmonic mean of precision and recall"),
    ("precision", "precision", "share of predictions that match a true nucleus at IoU .5"),
    ("recall", "recall", "share of true nuclei that are matched at IoU .5"),
    ("recall_faint", "recall, faintest bin", "recall of the true nuclei in the faintest bin of contrast"),
    (
        "recall_at_precision/0.90/recall_faint",
        "... at precision .9",
        "the same if predictions of low score are dropped until 90 % are right",
    ),
    ("recall_at_precision/0.95/recall_faint", "... at precision .95", "the same until 95 % are right"),
    ("recall_bright", "recall, brightest bin", "recall of the true nuclei in the brightest bin of contrast"),
    (
        "seg",
        "SEG",
        "mean IoU of each true nucleus with the prediction that holds most of it (Cell Tracking Challenge)",
    ),
    ("det", "DET", "detection: a miss weighs 10, a double 5, a false nucleus 1 (Cell Tracking Challenge)"),
    ("mucov", "MUCov", "mean over predictions of the best IoU with a true nucleus"),
    ("true_cover", "mean best IoU", "mean over true nuclei of the best IoU with a prediction"),
    ("pq", "PQ", "panoptic quality: F1 times the mean IoU of matches"),
    ("foreground_iou", "foreground IoU", "overlap of all nuclei together, voxel by voxel"),
    ("surface_distance_um", "surface distance", "mean distance of the outlines of matched nuclei, in µm"),
    ("centre_distance_um", "centre distance", "mean distance of the centres of matched nuclei, in µm"),
    ("splits", "splits", "true nuclei that hold two predictions or more"),
    ("merges", "merges", "predictions that hold two true nuclei or more"),
    ("n_true", "true nuclei", ""),
    ("n_pred", "predicted nuclei", ""),
)
# of the tables by volume, embryo and stage
_COLUMNS = {
    "n_true": "true",
    "n_pred": "predicted",
    "ap/0.50": "AP .5",
    "ap/0.75": "AP .75",
    "precision": "precision",
    "recall": "recall",
    "seg": "SEG",
    "mucov": "MUCov",
    "foreground_iou": "foreground IoU",
}
_LOW_IS_GOOD = frozenset({"surface_distance_um", "centre_distance_um", "splits", "merges"})
_NEUTRAL = frozenset({"n_true", "n_pred"})


def _score_table(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw all scores, one column a method, the best of each row in bold, with intervals."""
    rows = []
    for key, name, hint in _ROWS:
        values = [_look_up(scores, key) for scores in methods.values()]
        if all(value is None for value in values):
            continue
        best = _best(key, values) if len(values) > 1 else None
        cells = []
        for scores, value in zip(methods.values(), values, strict=True):
            mark = ' class="best"' if value is not None and value == best else ""
            interval = _interval(scores, key)
            span = f' <span class="range">{interval[0]:.3f} to {interval[1]:.3f}</span>' if interval else ""
            cells.append(f"<td{mark}>{_number(value)}{span}</td>")
        rows.append(
            f'<tr><td>{escape(name)}</td>{"".join(cells)}<td class="meaning">{escape(hint)}</td></tr>'
        )
    return _table(["", *methods, ""], rows)


def _group_table(groups: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """Draw a few scores of groups of volumes (embryos, stages), one row a group."""
    rows = [
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{_number(_look_up(scores, key))}</td>" for key in _COLUMNS)
        + "</tr>"
        for name, scores in groups.items()
    ]
    return _table([title, *_COLUMNS.values()], rows)


def _volume_table(volumes: Mapping[str, Mapping[str, Any]], *, linked: bool) -> str:
    """Draw one row a volume; with `linked`, its name opens it in the viewer."""
    columns = {key: _COLUMNS[key] for key in ("ap/0.50", "ap/0.75", "seg", "mucov", "foreground_iou")}
    rows = []
    for name, scores in volumes.items():
        found = scores["counts"]["tp_half"]
        text = escape(name)
        if linked:
            text = (
                f'<button type="button" class="link" data-volume="{escape(name, quote=True)}">{text}</button>'
            )
        cells = [
            str(scores["n_true"]),
            str(scores["n_pred"]),
            f"{scores['n_true'] - found:.0f}",
            f"{scores['n_pred'] - found:.0f}",
            *(_number(_look_up(scores, key)) for key in columns),
        ]
        rows.append(f"<tr><td>{text}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = ["volume", "true", "predicted", "missed", "false", *columns.values()]
    return f'<div class="scroll">{_table(head, rows)}</div>'


def _table(head: Iterable[str], rows: Iterable[str]) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _look_up(scores: Mapping[str, Any], key: str) -> float | int | None:
    """Give a score by its key, such as ``seg`` or ``ap/0.50``; None where it is missing or undefined."""
    node: Any = scores
    for part in key.split("/"):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node if isinstance(node, int | float) else None


def _number(value: float | int | None) -> str:
    """Write a score: counts whole, shares with three decimals, a dash where undefined."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _interval(scores: Mapping[str, Any], key: str) -> Sequence[float] | None:
    """Give the interval of a score by its key; see `_look_up`."""
    bins = scores.get("recall_by_contrast") or []
    if key in ("recall_faint", "recall_bright") and bins:
        found = bins[0 if key == "recall_faint" else -1]["interval"]
    elif key.startswith("recall_at_precision/"):
        _, precision, name = key.split("/")
        found = (scores["recall_at_precision"].get(precision) or {}).get(f"{name}_interval")
    else:
        found = scores["intervals"].get(key.replace("/", "_"))
    return found if isinstance(found, list) else None


def _best(key: str, values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if key in _NEUTRAL or not known:
        return None
    return min(known) if key in _LOW_IS_GOOD else max(known)
