"""Two evaluations, metric by metric: where is one surely better? Paired, by the bootstrap."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from nuclei3d.scoring.bootstrap import (
    FEWEST_NUCLEI,
    Comparison,
    PairedDifference,
    Statistics,
    compare_paired,
    side_of_zero,
)
from nuclei3d.scoring.matching import Floats
from nuclei3d.scoring.metrics import COUNTS, Tally, ratio, score, stack_tallies

_NAMES = {
    "ap_mean": "mean AP (IoU .5 to .9)",
    "pq": "PQ",
    "seg": "SEG",
    "det": "DET",
    "mucov": "MUCov",
    "true_cover": "mean best IoU of truths",
    "foreground_iou": "foreground IoU",
    "precision": "precision",
    "recall": "recall",
    "recall_faint": "recall, faintest bin",
    "recall_bright": "recall, brightest bin",
}


def metric_name(metric: str) -> str:
    """Call a metric as the reader knows it, such as ``AP at .75`` for ``ap_0.75``."""
    if metric[3:4] == "0":
        return f"{metric[:2].upper()} at {metric[3:].removeprefix('0')}"
    return _NAMES.get(metric, metric)


def list_metrics(metrics: Sequence[str]) -> str:
    """Name metrics in a row; F1, which rises and falls with AP, only where AP is not among them."""
    told = [name for name in metrics if not (name[:3] == "f1_" and f"ap_{name[3:]}" in metrics)]
    ious = [name[3:].removeprefix("0") for name in told if name[:4] == "ap_0"]
    words = [metric_name(name) for name in told if name[:4] != "ap_0"]
    at = [f"AP at {' '.join(ious)}"] if ious else []
    return ", ".join([*words, *at])


def pooled_scores(
    tallies: Sequence[Tally],
    thresholds: Sequence[float],
    contrast_counts: Sequence[Mapping[str, Any] | None] | None = None,
    shared: Sequence[float] | None = None,
) -> Statistics:
    """Give every share among the metrics, pooled over volumes, by name.

    `thresholds` are those of the tallies; only AP and F1 at the `shared` ones count. With the counts of
    true and found nuclei by bin of contrast, the recalls of the outer bins are among them.
    """
    kept = [place for place, iou in enumerate(thresholds) if shared is None or iou in shared]
    stacked = stack_tallies(tallies)
    stacked = replace(stacked, tp=stacked.tp[:, kept], matched_iou=stacked.matched_iou[:, kept])
    ious = [thresholds[place] for place in kept]

    def pool(weights: Floats | None) -> dict[str, Floats]:
        total = stacked.total(weights)
        values = {"ap_0.50": total.ap_half} | score(total, ious).by_name()
        values = {name: value for name, value in values.items() if name not in COUNTS}
        if contrast_counts and all(contrast_counts):
            true, found = (
                np.array([count[part] for count in contrast_counts if count]) for part in ("true", "found")
            )
            once = np.ones(len(tallies)) if weights is None else weights
            for name, place in (("recall_faint", 0), ("recall_bright", -1)):
                values[name] = ratio(once @ found[:, place], once @ true[:, place])
        return values

    return pool


@dataclass(frozen=True)
class Evaluations:
    """Two evaluations A and B on the volumes that count: what was compared, and what was left out.

    `trained_on` and `chosen_on` name the volumes that A or B was trained on (left out), and those on which
    thresholds or epoch were chosen (compared).
    """

    volumes: tuple[str, ...]
    compared: Comparison | None
    trained_on: tuple[str, ...]
    chosen_on: tuple[str, ...]
    same_bins: bool


def named_like(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Give a metrics.json whose volumes are called as those of another with the same true labels.

    Folders lend volumes their names, so that one that is evaluated from another folder is called otherwise.
    Names that both have stay, and so do those of truths that one of them holds twice, such as empty ones.
    """
    truths = [
        Counter(volume["truth_digest"] for volume in each["volumes"].values()) for each in (first, second)
    ]
    name_of = {
        volume["truth_digest"]: name
        for name, volume in first["volumes"].items()
        if name not in second["volumes"] and all(each[volume["truth_digest"]] == 1 for each in truths)
    }
    volumes = {
        name if name in first["volumes"] else name_of.get(volume["truth_digest"], name): volume
        for name, volume in second["volumes"].items()
    }
    return {**second, "volumes": volumes}


def compare_evaluations(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    replicates: int,
    over: Literal["auto", "embryo", "time"] = "auto",
    seed: int,
) -> Evaluations:
    """Compare two metrics.json on the volumes that both hold, but for embryos that either was trained on.

    What varies between embryos cancels out: the same are drawn for both. Where the contrast bins differ,
    recall by contrast is not compared. Fewer than `FEWEST_NUCLEI` true nuclei give no interval.
    """
    names = [name for name in a["volumes"] if name in b["volumes"]]
    first, second = ([each["volumes"][name] for name in names] for each in (a, b))

    def seen(part: str) -> list[str]:
        return [
            name
            for name, *both in zip(names, first, second, strict=True)
            if part in [v.get("seen") for v in both]
        ]

    trained_on, chosen_on = seen("train"), seen("validation")
    embryos = {name: str(volume["embryo"]) for name, volume in zip(names, first, strict=True)}
    known = {embryos[name] for name in trained_on}
    kept = [name for name in names if embryos[name] not in known]
    edges = [each.get("contrast_edges") for each in (a, b)]
    same_bins = None in edges or edges[0] == edges[1]
    compared = None
    if kept:
        shared = sorted(map(float, a["ap"].keys() & b["ap"].keys()))

        def statistics(metrics: Mapping[str, Any]) -> Statistics:
            volumes = [metrics["volumes"][name] for name in kept]
            return pooled_scores(
                [Tally.from_json(volume["counts"]) for volume in volumes],
                list(map(float, metrics["ap"])),
                [volume.get("contrast_counts") for volume in volumes] if same_bins else None,
                shared,
            )

        enough = sum(a["volumes"][name]["n_true"] for name in kept) >= FEWEST_NUCLEI
        compared = compare_paired(
            statistics(a),
            statistics(b),
            [embryos[name] for name in kept],
            replicates=replicates if enough else 0,
            over=over,
            rng=np.random.default_rng(seed),
        )
    return Evaluations(
        tuple(kept),
        compared,
        tuple(name for name in names if name not in kept),
        tuple(name for name in chosen_on if name in kept),
        same_bins,
    )


def surely(differences: Mapping[str, PairedDifference], side: int) -> tuple[str, ...]:
    """Give the metrics in which B is surely better (1) or worse (-1) than A; all of them are best high."""
    return tuple(name for name, pair in differences.items() if side_of_zero(pair.low, pair.high) == side)


def tell_difference(metric: str, pair: PairedDifference) -> str:
    """Say a difference, such as ``PQ +0.100, 95 % interval +0.050 to +0.150``."""
    text = f"{metric_name(metric)} {pair.difference:+.3f}"
    if math.isnan(pair.low):
        return text
    return f"{text}, 95 % interval {pair.low:+.3f} to {pair.high:+.3f}"


def tell_others(differences: Mapping[str, PairedDifference], primary: str) -> str:
    """Name the other metrics that surely differ, such as ``surely better in PQ, surely worse in DET``."""
    sides = {
        word: [name for name in surely(differences, side) if name != primary]
        for word, side in (("better", 1), ("worse", -1))
    }
    return "; ".join(f"surely {word} in {list_metrics(names)}" for word, names in sides.items() if names)
