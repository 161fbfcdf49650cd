"""Whether a model is better than another, or than the naive baseline: one sentence, with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nuclei3d.scoring.bootstrap import PairedDifference, side_of_zero
from nuclei3d.scoring.comparison import compare_evaluations, metric_name, tell_difference, tell_others
from nuclei3d.scoring.watershed import OTSU

_REPLICATES = 2000


@dataclass(frozen=True)
class Verdict:
    """Whether a challenger is to take the champion's place, and why (a sentence without a full stop).

    Challenger minus champion in the primary metric, with its 95 % interval; None where nothing was compared.
    """

    better: bool
    reason: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None


def judge(
    champion: Mapping[str, Any],
    challenger: Mapping[str, Any],
    champion_name: str,
    *,
    seed: int,
    metric: str = "ap_mean",
) -> Verdict:
    """Compare two metrics.json by a paired bootstrap over embryos, or blocks of time where those are few.

    Both must have been evaluated on the same held-out volumes with the same true labels (``truth_digest``),
    on some at least that neither was trained on; otherwise the question has no answer and the champion stays.
    The challenger is better if the whole 95 % interval of the difference in the metric, pooled over the
    volumes, lies above 0; where no interval can be given, the champion stays.
    """
    old, new = champion["volumes"], challenger["volumes"]
    if _truths(old) != _truths(new):
        reason = f"not evaluated on the same held-out volumes as the {champion_name}"
        return Verdict(False, reason)
    found = compare_evaluations(champion, challenger, replicates=_REPLICATES, seed=seed)
    compared = found.compared
    if compared is None:
        reason = (
            f"cannot be judged against the {champion_name}: one of them was trained on the embryos of "
            f"{', '.join(found.trained_on[:3])}; evaluate both on embryos that neither has seen"
        )
        return Verdict(False, reason)
    pair = compared.differences.get(metric, PairedDifference(*[float("nan")] * 4))
    if np.isnan([pair.difference, pair.low]).any():
        reason = (
            f"too few held-out volumes ({len(found.volumes)}) or nuclei to tell whether the difference to "
            f"the {champion_name} in {metric_name(metric)}, {pair.difference:+.4f}, is real"
        )
        return Verdict(False, reason, pair.difference)
    better = pair.low > 0
    others = tell_others(compared.differences, metric)
    count = f"{len(found.volumes)}{f' of {len(new)}' if found.trained_on else ''}"
    reason = (
        f"{'better' if better else 'not better'} than the {champion_name} on the same {count} held-out "
        f"volumes: {tell_difference(metric, pair)} over {compared.units.words}, {pair.b:.4f} against "
        f"{pair.a:.4f}" + (others and f"; {others}")
    )
    return Verdict(better, reason, pair.difference, pair.low, pair.high)


def judge_first(result: Mapping[str, Any], *, metric: str = "ap_mean") -> Verdict:
    """Tell whether a first version beats the naive baseline that its metrics.json holds.

    It does if the whole 95 % interval of the paired difference lies above 0. Where there is no interval (a
    single volume, a metrics.json from before it was written) the values themselves decide.
    """
    seen = [name for name, volume in result["volumes"].items() if volume.get("seen") == "train"]
    if seen:
        return Verdict(False, f"cannot be judged: it was trained on {', '.join(seen[:3])}")
    naive = (result.get("baselines") or {}).get(OTSU)
    told = f"the naive baseline ({OTSU})"
    if naive is None:
        return Verdict(
            False,
            f"first version, not shown to beat {told}: its metrics.json does not hold it; evaluate with the "
            "images and with otsu in evaluate.baselines",
        )
    own, other = _value(result, metric), _value(naive, metric)
    if own is None or other is None:
        return Verdict(False, f"first version, not shown to beat {told}: no {metric_name(metric)} is known")
    difference = own - other
    numbers = f"{metric_name(metric)} {own:.3f} against {other:.3f}"
    known = ((naive.get("behind_model") or {}).get("metrics") or {}).get(metric)
    if known is None:
        better = difference > 0
        return Verdict(
            better,
            f"first version, {'better' if better else 'not better'} than {told}: {numbers}; no interval "
            "tells whether that is real",
            difference,
        )
    low, high = known["interval"]
    word = {1: "surely better", -1: "surely worse", 0: "not surely better"}[side_of_zero(low, high)]
    reason = f"first version, {word} than {told}: {numbers}, 95 % interval {low:+.3f} to {high:+.3f}"
    return Verdict(low > 0, reason, difference, low, high)


def _value(scores: Mapping[str, Any], metric: str) -> float | None:
    """Look a score up; the mean AP also where metrics.json is of a version that did not write it."""
    if metric == "ap_mean" and metric not in scores:
        aps = [value for iou, value in scores["ap"].items() if 0.5 <= float(iou) <= 0.9]
        return None if None in aps or not aps else float(np.mean(aps))
    value = scores[metric[:2]].get(metric[3:]) if metric[3:4] == "0" else scores.get(metric)
    return None if value is None else float(value)


def _truths(volumes: Mapping[str, Any]) -> dict[str, tuple[object, object]]:
    return {name: (volume.get("truth_digest"), volume.get("n_true")) for name, volume in volumes.items()}
