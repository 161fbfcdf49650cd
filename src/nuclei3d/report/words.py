"""The result in plain words, for a reader who has never heard of average precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
