"""Intervals, and whether one method is really better than another, by resampling embryos or blocks of time.

Nuclei of one frame, and frames of one film, resemble each other; resampling them one by one would give
intervals that are far too narrow. What is resampled is therefore the largest unit that the data hold
enough of: embryos, else contiguous blocks of time within embryos.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nuclei3d.scoring.matching import Floats, Integers

#: Fewer embryos than this are cut into blocks of time: so few units cannot show how embryos vary.
FEWEST_EMBRYOS = 4

#: Fewer units than this make an interval that should not be taken literally.
FEW_UNITS = 6

#: From fewer nuclei than this no interval is given.
FEWEST_NUCLEI = 10
_LEVEL = 0.95
_TAILS = ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2)
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Units:
    """What is resampled together: `unit_of` gives the unit, 0 .. count - 1, of each volume.

    `words` says what the units are: ``5 embryos`` or ``6 blocks of time in 1 embryo``.
    """

    unit_of: Integers
    count: int
    words: str

    @property
    def few(self) -> bool:
        """Whether they are so few that an interval is rough."""
        return self.count < FEW_UNITS


def resampling_units(embryos: Sequence[str], over: Literal["auto", "embryo", "time"] = "auto") -> Units:
    """Decide what is resampled, from the embryo of each volume (those of one embryo in the order of time).

    `over` is ``embryo``, ``time``, or ``auto``: embryos where there are at least `FEWEST_EMBRYOS`. Blocks
    hold about the cube root of the number of frames, the usual length for a block bootstrap (Kuensch 1989).
    """
    names = list(dict.fromkeys(embryos))
    if over == "embryo" or (over == "auto" and len(names) >= FEWEST_EMBRYOS):
        unit_of = np.array([names.index(name) for name in embryos], dtype=np.int64)
        return Units(unit_of, len(names), _plural(len(names), "embryo"))
    unit_of = np.zeros(len(embryos), dtype=np.int64)
    count = 0
    for name in names:
        volumes = np.flatnonzero(np.array([other == name for other in embryos]))
        blocks = max(round(len(volumes) / max(round(len(volumes) ** (1 / 3)), 1)), 1)
        unit_of[volumes] = count + np.arange(len(volumes)) * blocks // len(volumes)
        count += blocks
    words = f"{_plural(count, 'block')} of time in {_plural(len(names), 'embryo')}"
    return Units(unit_of, count, words)


def bootstrap_weights(units: Units, replicates: int, rng: np.random.Generator) -> Floats:
    """Draw units with replacement: how often each volume enters each replicate, (replicates, volumes)."""
    drawn = rng.multinomial(units.count, np.full(units.count, 1 / units.count), size=replicates)
    return drawn[:, units.unit_of].astype(np.float64)


def percentile_interval(samples: Floats) -> tuple[Floats, Floats]:
    """Give the central 95 % interval over the first axis, nan where no replicate is defined."""
    defined = np.isfinite(samples).any(axis=0)
    bounds = np.full((2, *samples.shape[1:]), np.nan)
    if samples.ndim == 1:
        if defined:
            bounds[:] = np.nanquantile(samples, _TAILS)
    elif defined.any():
        bounds[:, defined] = np.nanquantile(samples[:, defined], _TAILS, axis=0)
    return bounds[0], bounds[1]


def wilson_interval(hits: float, n: float) -> tuple[float, float]:
    """Give the 95 % interval of a share, for when there is nothing larger than a nucleus to resample.

    Wilson's score interval (1927); nan where n is 0.
    """
    if n <= 0:
        return float("nan"), float("nan")
    share, square = hits / n, _Z95**2
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = _Z95 / (1 + square / n) * float(np.sqrt(share * (1 - share) / n + square / (4 * n * n)))
    return max(middle - half, 0.0), min(middle + half, 1.0)


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

    The same units are drawn for both, so what varies between embryos cancels out and small differences become
    visible. The numbers that both have are compared, on the same volumes, whose embryos are given in the
    order of time; with 0 replicates there are no intervals. `over` is that of `resampling_units`.
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


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
