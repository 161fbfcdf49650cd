"""Whether a challenger is better than the champion on the same held-out embryos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.scoring.bootstrap import bootstrap_weights, percentile_interval, resampling_units
from nuclei3d.core.scoring.metrics import Tally, stack_tallies

_REPLICATES = 2000


@dataclass(frozen=True)
class Verdict:
    """The outcome of a comparison.

    Attributes
    ----------
    better
        Whether the challenger takes the champion's place.
    reason
        One sentence without a full stop.
    difference, low, high
        Challenger minus champion in AP at .5, with its 95 % interval; None where nothing was compared.
    """

    better: bool
    reason: str
    difference: float | None
    low: float | None
    high: float | None


def judge(
    champion: Mapping[str, Any], challenger: Mapping[str, Any], champion_name: str, *, seed: int
) -> Verdict:
    """Compare two metrics.json by a paired bootstrap over embryos, or blocks of time where those are few.

    Both must have been evaluated on the same held-out volumes with the same true labels (``truth_digest``);
    otherwise the question has no answer and the champion stays. The challenger is better if the whole 95 %
    interval of the difference in AP at .5, pooled over the volumes, lies above 0; where a single block of
    time is all there is, no interval can be given and the champion stays.
    """
    old, new = champion["volumes"], challenger["volumes"]
    if _truths(old) != _truths(new):
        reason = f"not evaluated on the same held-out volumes as the {champion_name}"
        return Verdict(False, reason, None, None, None)
    names = list(old)
    units = resampling_units([str(old[name].get("embryo", name)) for name in names])
    drawn = bootstrap_weights(units, _REPLICATES, np.random.default_rng(seed))
    weights = np.vstack([np.ones(len(names)), drawn])
    # The same draws for both: what makes an embryo hard for one makes it hard for the other.
    before, after = (_ap(volumes, names, weights) for volumes in (old, new))
    difference = float(after[0] - before[0])
    if units.count < 2:
        reason = (
            f"too few held-out volumes ({len(names)}) to tell whether the difference to the {champion_name} "
            f"in AP at .5, {difference:+.4f}, is real"
        )
        return Verdict(False, reason, difference, None, None)
    low, high = (float(bound) for bound in percentile_interval(after[1:] - before[1:]))
    better = difference > 0 and low > 0
    reason = (
        f"{'better' if better else 'not better'} than the {champion_name} on the same {len(names)} held-out "
        f"volumes: AP at .5 {after[0]:.4f} against {before[0]:.4f}, difference {difference:+.4f} with 95 % "
        f"interval {low:+.4f} to {high:+.4f} over {units.words}"
    )
    return Verdict(better, reason, difference, low, high)


def _truths(volumes: Mapping[str, Any]) -> dict[str, tuple[object, object]]:
    return {name: (volume.get("truth_digest"), volume.get("n_true")) for name, volume in volumes.items()}


def _ap(volumes: Mapping[str, Any], names: list[str], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give AP at .5 of each replicate, shape (replicates,)."""
    tallies = stack_tallies([Tally.from_json(volumes[name]["counts"]) for name in names])
    total = tallies.total(weights)
    whole = total.n_true + total.n_pred - total.tp_half
    return np.divide(total.tp_half, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
