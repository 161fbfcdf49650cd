"""Whether one method is really better than another on the same volumes: the paired bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nuclei3d.scoring.bootstrap import Units, bootstrap_weights, percentile_interval, resampling_units
from nuclei3d.scoring.matching import Floats
from nuclei3d.scoring.metrics import Tally, stack_tallies

#: Numbers of a method pooled over volumes, by name. Given weights (replicates, volumes), each has the
#: replicates as its axis; given None, every volume counts once.
Statistics = Callable[[Floats | None], Mapping[str, Floats]]


@dataclass(frozen=True)
class PairedDifference:
    """A number of method A and of B, and the 95 % interval of B minus A; nan where undefined."""

    a: float
    b: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """B minus A."""
        return self.b - self.a

    @property
    def real(self) -> bool:
        """Whether the interval leaves out 0; false where there is none."""
        return side_of_zero(self.low, self.high) != 0


@dataclass(frozen=True)
class Comparison:
    """Paired differences by name, and the units that were resampled.

    `resampled` is false where there was only one unit, or no replicate was wanted: no number has an interval.
    """

    units: Units
    resampled: bool
    differences: dict[str, PairedDifference]


def side_of_zero(low: float, high: float) -> int:
    """Give 1 or -1 if an interval lies wholly above or below 0, else 0: the difference is not real."""
    return int(low > 0) - int(high < 0)


def compare_paired(
    a: Statistics,
    b: Statistics,
    embryos: Sequence[str],
    *,
    replicates: int,
    over: Literal["auto", "embryo", "time"] = "auto",
    rng: np.random.Generator,
) -> Comparison:
    """Compare two methods by a paired bootstrap over embryos or blocks of time.

    The same units are drawn for both, so what varies between embryos cancels out and small differences
    become visible.

    Parameters
    ----------
    a, b
        The numbers of the two methods on the same volumes; those that both have are compared.
    embryos
        The embryo of each volume; volumes of one embryo in the order of time.
    replicates
        Bootstrap replicates; 0 for no intervals.
    over
        See `nuclei3d.scoring.bootstrap.resampling_units`.
    """
    units = resampling_units(embryos, over)
    first, second = a(None), b(None)
    names = [name for name in first if name in second]
    bounds = dict.fromkeys(names, (np.nan, np.nan))
    resampled = bool(replicates) and units.count > 1
    if resampled:
        weights = bootstrap_weights(units, replicates, rng)
        drawn_a, drawn_b = a(weights), b(weights)
        for name in names:
            low, high = percentile_interval(drawn_b[name] - drawn_a[name])
            bounds[name] = (float(low), float(high))
    differences = {
        name: PairedDifference(float(first[name]), float(second[name]), *bounds[name]) for name in names
    }
    return Comparison(units, resampled, differences)


def average_precision_of(tallies: Sequence[Tally]) -> Statistics:
    """Give the AP at IoU .5 of volumes, called ``ap_0.50``, whatever the thresholds of their tallies."""
    stacked = stack_tallies(tallies)
    return lambda weights: {"ap_0.50": stacked.total(weights).ap_half}
