"""The paired bootstrap sees what all units share, and calls a difference real if its interval does."""

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from nuclei3d.scoring.comparison import (
    PairedDifference,
    Statistics,
    average_precision_of,
    compare_paired,
    side_of_zero,
)
from nuclei3d.scoring.matching import overlap_table
from nuclei3d.scoring.metrics import tally_of

EMBRYOS = [str(k) for k in range(40)]


def mean_of(values: NDArray[np.float64], *more: str) -> Statistics:
    def pool(weights: NDArray[np.float64] | None) -> Mapping[str, NDArray[np.float64]]:
        once = np.ones(len(values)) if weights is None else weights
        mean = once @ values / once.sum(axis=-1)
        return {name: mean for name in ("mean", *more)}

    return pool


def test_the_interval_of_a_paired_mean_is_that_of_the_differences() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0, 10, 40)
    gain = rng.normal(1, 2, 40)
    compared = compare_paired(mean_of(a), mean_of(a + gain), EMBRYOS, replicates=4000, rng=rng)
    assert compared.resampled
    assert compared.units.words == "40 embryos"
    pair = compared.differences["mean"]
    half = 1.96 * gain.std() / np.sqrt(40)
    assert pair.difference == pytest.approx(gain.mean())
    assert (pair.low, pair.high) == pytest.approx((gain.mean() - half, gain.mean() + half), abs=0.1)


def test_only_numbers_that_both_have_are_compared() -> None:
    values = np.arange(40.0)
    compared = compare_paired(
        mean_of(values, "one"), mean_of(values, "other"), EMBRYOS, replicates=10, rng=np.random.default_rng(0)
    )
    assert list(compared.differences) == ["mean"]
    assert not compared.differences["mean"].real


@pytest.mark.parametrize(("embryos", "replicates"), [(["a"], 100), (["a", "b", "c", "d"], 0)])
def test_without_units_or_replicates_nothing_is_real(embryos: list[str], replicates: int) -> None:
    ones = np.ones(len(embryos))
    compared = compare_paired(
        mean_of(ones), mean_of(2 * ones), embryos, replicates=replicates, rng=np.random.default_rng(0)
    )
    pair = compared.differences["mean"]
    assert not compared.resampled
    assert pair.difference == 1
    assert np.isnan([pair.low, pair.high]).all()
    assert not pair.real


def test_an_interval_that_holds_zero_is_on_neither_side() -> None:
    assert [side_of_zero(*bounds) for bounds in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0.0, 0.1))] == [
        1,
        -1,
        0,
        0,
    ]
    assert PairedDifference(1, 0, -2, -0.5).real


def test_average_precision_counts_at_half_whatever_the_thresholds() -> None:
    truth = np.array([[[1, 1, 1, 0, 2, 2]]])
    found = np.array([[[1, 1, 0, 0, 0, 3]]])
    pool = average_precision_of([tally_of(overlap_table(truth, found), (0.9,))])
    assert pool(None)["ap_0.50"] == 1
