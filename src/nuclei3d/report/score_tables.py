"""The tables of the report, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

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
            cells.append(f"<td{mark}>{number(value)}{range_beside(_interval(scores, key))}</td>")
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


def _interval(scores: Mapping[str, Any], key: str) -> Sequence[float] | None:
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
