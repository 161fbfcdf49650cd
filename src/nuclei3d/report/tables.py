"""The tables of the report, as HTML.

The result in plain words, for a reader who has never heard of average precision.

nuclei.csv: every true nucleus, found or missed, and every false one.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nuclei3d.scoring.assessment import Assessment, NucleusTable
from nuclei3d.scoring.contrast import contrast_bin


def summary_sentences(metrics: Mapping[str, Any], method: str) -> list[str]:
    """Say what a metrics.json means.

    Parameters
    ----------
    metrics
        Its content.
    method
        What the predictions are called.

    Returns
    -------
    sentences
        The most important first.
    """
    volumes = metrics["volumes"]
    embryos = {volume["embryo"] for volume in volumes.values()}
    if not metrics["n_true"]:
        return [
            f"The {_count(len(volumes), 'volume')} hold no true nuclei; {method} reports "
            f"{_count(metrics['n_pred'], 'nucleus', 'nuclei')}, all of them false."
        ]
    sentences = [
        f"In {_count(len(volumes), 'volume')} of {_count(len(embryos), 'embryo')} with "
        f"{_count(metrics['n_true'], 'nucleus', 'nuclei')}, {method} finds {_percent(metrics['recall'])}"
        f"{_interval(metrics, 'recall')} of them; {_false_share(metrics)}.",
        *_faint_sentences(metrics),
        *_error_sentences(metrics),
        *_comparisons(metrics, method),
    ]
    if metrics["intervals_over"]:
        sentences.append(
            f"Ranges in brackets are 95 % intervals from resampling {metrics['intervals_over']}"
            + ("; with so few, take them as rough." if _is_few(metrics["intervals_over"]) else ".")
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
    told = []
    for name, scores in metrics["baselines"].items():
        rival, gap = scores["ap"].get("0.50"), scores["behind_model"]
        if rival is None:
            continue
        if gap is None:
            verdict = "below" if own > rival else "not below"
        elif gap["interval"][0] > 0:
            verdict = "really below"
        elif gap["interval"][1] < 0:
            verdict = "really above"
        else:
            verdict = "not really different"
        told.append(f"{name} {rival:.3f} ({verdict})")
    return [
        f"Average precision at IoU .5 (1 is perfect) is {own:.3f}{_interval(metrics, 'ap_0.50')} for "
        f"{method}; on the same volumes: {', '.join(told)}."
    ]


def _false_share(metrics: Mapping[str, Any]) -> str:
    if metrics["precision"] is None:
        return "it predicts nothing at all"
    return (
        f"of its {_count(metrics['n_pred'], 'prediction')}, {_percent(1 - metrics['precision'])} are false "
        "(no true nucleus overlaps them by half)"
    )


def _interval(metrics: Mapping[str, Any], name: str) -> str:
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


def _is_few(words: str) -> bool:
    return int(words.split()[0]) < 6


Outcome = Literal["found", "missed", "false"]


@dataclass(frozen=True)
class NucleusRow:
    """One line of nuclei.csv.

    Places are centroids in um from the centre of the first voxel; `contrast_bin` counts from 1, the faintest;
    `partner` is the label on the other side, empty if there is none. Undefined values are left empty.
    """

    volume: str
    embryo: str
    frame: str
    outcome: Outcome
    label: int
    z_um: float
    y_um: float
    x_um: float
    volume_um3: float
    contrast: float
    contrast_bin: int | None
    best_iou: float
    partner: int | None
    score: float
    surface_um: float


def nucleus_rows(
    volume: str, embryo: str, frame: str, assessment: Assessment, edges: Sequence[float] | None
) -> Iterator[NucleusRow]:
    """Give the true nuclei of a volume in the order of their labels, then the false ones."""
    yield from _rows(volume, embryo, frame, assessment.true, edges, true=True)
    yield from _rows(volume, embryo, frame, assessment.pred, edges, true=False)


def write_nuclei(path: Path, rows: Iterable[NucleusRow]) -> None:
    """Write the rows as CSV with a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(NucleusRow)])
        for row in rows:
            writer.writerow([_text(value) for value in asdict(row).values()])


def _rows(
    volume: str,
    embryo: str,
    frame: str,
    table: NucleusTable,
    edges: Sequence[float] | None,
    *,
    true: bool,
) -> Iterator[NucleusRow]:
    bins = contrast_bin(table.contrast, edges) if edges is not None else np.full(len(table.label), -1)
    for index in range(len(table.label)):
        matched = bool(table.matched[index])
        if matched and not true:
            continue
        z_um, y_um, x_um = (float(value) for value in table.place_um[index])
        yield NucleusRow(
            volume=volume,
            embryo=embryo,
            frame=frame,
            outcome=("found" if matched else "missed") if true else "false",
            label=int(table.label[index]),
            z_um=z_um,
            y_um=y_um,
            x_um=x_um,
            volume_um3=float(table.volume_um3[index]),
            contrast=float(table.contrast[index]),
            contrast_bin=int(bins[index]) + 1 if bins[index] >= 0 else None,
            best_iou=float(table.best_iou[index]),
            partner=int(table.partner[index]) if matched else None,
            score=float(table.score[index]),
            surface_um=float(table.surface_um[index]),
        )


def _text(value: object) -> object:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4f}" if isinstance(value, float) else value


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
_LOW_IS_GOOD = frozenset({"surface_distance_um", "centre_distance_um", "splits", "merges"})
_NEUTRAL = frozenset({"n_true", "n_pred"})


def score_table(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw all scores, one column a method, the best of each row in bold, with intervals."""
    head = "".join(f"<th>{escape(name)}</th>" for name in methods)
    body = []
    for key, name, hint in _ROWS:
        values = [look_up(scores, key) for scores in methods.values()]
        if all(value is None for value in values):
            continue
        best = _best(key, values) if len(values) > 1 else None
        cells = []
        for scores, value in zip(methods.values(), values, strict=True):
            mark = ' class="best"' if value is not None and value == best else ""
            cells.append(f"<td{mark}>{number(value)}{range_beside(_interval_tables(scores, key))}</td>")
        body.append(
            f'<tr><td>{escape(name)}</td>{"".join(cells)}<td class="meaning">{escape(hint)}</td></tr>'
        )
    return f"<table><thead><tr><th></th>{head}<th></th></tr></thead><tbody>{''.join(body)}</tbody></table>"


def group_table(groups: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """Draw a few scores of groups of volumes (embryos, stages), one row a group."""
    columns = (
        ("n_true", "true"),
        ("n_pred", "predicted"),
        ("ap/0.50", "AP .5"),
        ("ap/0.75", "AP .75"),
        ("precision", "precision"),
        ("recall", "recall"),
        ("seg", "SEG"),
        ("mucov", "MUCov"),
        ("foreground_iou", "foreground IoU"),
    )
    head = "".join(f"<th>{escape(name)}</th>" for _, name in columns)
    body = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{number(look_up(scores, key))}</td>" for key, _ in columns)
        + "</tr>"
        for name, scores in groups.items()
    )
    return f"<table><thead><tr><th>{escape(title)}</th>{head}</tr></thead><tbody>{body}</tbody></table>"


def volume_table(volumes: Mapping[str, Mapping[str, Any]], *, linked: bool) -> str:
    """Draw one row a volume; with `linked`, its name opens it in the viewer."""
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
            *(
                number(look_up(scores, key))
                for key in ("ap/0.50", "ap/0.75", "seg", "mucov", "foreground_iou")
            ),
        ]
        rows.append(f"<tr><td>{text}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    names = ("true", "predicted", "missed", "false", "AP .5", "AP .75", "SEG", "MUCov", "foreground IoU")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<div class="scroll"><table><thead><tr><th>volume</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def look_up(scores: Mapping[str, Any], key: str) -> float | int | None:
    """Give a score by its key, such as ``seg`` or ``ap/0.50``; None where it is missing or undefined."""
    node: Any = scores
    for part in key.split("/"):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node if isinstance(node, int | float) else None


def number(value: float | int | None) -> str:
    """Write a score: counts whole, shares with three decimals, a dash where undefined."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def range_beside(interval: Sequence[float] | None) -> str:
    """Write an interval in small print."""
    if interval is None:
        return ""
    return f' <span class="range">{interval[0]:.3f} to {interval[1]:.3f}</span>'


def _interval_tables(scores: Mapping[str, Any], key: str) -> Sequence[float] | None:
    bins = scores.get("recall_by_contrast") or []
    if key in ("recall_faint", "recall_bright") and bins:
        found = bins[0 if key == "recall_faint" else -1]["interval"]
    elif key.startswith("recall_at_precision/"):
        _, precision, name = key.split("/")
        found = (scores["recall_at_precision"].get(precision) or {}).get(f"{name}_interval_tables")
    else:
        found = scores["intervals"].get(key.replace("/", "_"))
    return found if isinstance(found, list) else None


def _best(key: str, values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if key in _NEUTRAL or not known:
        return None
    return min(known) if key in _LOW_IS_GOOD else max(known)
