"""Intervals cover what they should; a difference is real if the interval over paired units leaves out 0."""

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from nuclei3d.scoring.bootstrap import (
    PairedDifference,
    Statistics,
    bootstrap_weights,
    compare_paired,
    percentile_interval,
    resampling_units,
    side_of_zero,
    wilson_interval,
)
from nuclei3d.scoring.comparison import pooled_scores
from nuclei3d.scoring.matching import overlap_table
from nuclei3d.scoring.metrics import tally_of


def test_many_embryos_are_resampled_whole() -> None:
    units = resampling_units(["a", "a", "b", "c", "c", "c", "d"])
    assert units.count == 4
    assert list(units.unit_of) == [0, 0, 1, 2, 2, 2, 3]
    assert units.words == "4 embryos"


def test_few_embryos_are_cut_into_contiguous_blocks_of_time() -> None:
    units = resampling_units(["a"] * 27 + ["b"] * 2)
    first = units.unit_of[:27]
    assert (np.diff(first) >= 0).all()
    # blocks as long as the cube root of the number of frames
    assert set(np.bincount(first)) == {3}
    assert list(units.unit_of[27:]) == [9, 10]
    assert units.words == "11 blocks of time in 2 embryos"


def test_the_choice_can_be_made_by_the_user() -> None:
    assert resampling_units(["a", "b"], "embryo").count == 2
    assert resampling_units(["a", "a", "b", "c", "d", "e"], "time").count == 6


def test_volumes_of_one_unit_are_drawn_together_and_each_replicate_draws_as_many_units() -> None:
    units = resampling_units(["a", "a", "b", "c", "d"])
    weights = bootstrap_weights(units, 200, np.random.default_rng(0))
    assert weights.shape == (200, 5)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 1:].sum(axis=1) == 4).all()


def test_the_interval_of_a_mean_is_the_one_of_theory() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(3, 2, size=400)
    units = resampling_units([str(k) for k in range(400)])
    weights = bootstrap_weights(units, 4000, rng)
    low, high = percentile_interval(weights @ values / weights.sum(axis=1))
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_replicates_without_a_value_are_left_out_of_the_interval() -> None:
    samples = np.stack([np.linspace(0, 1, 101), np.full(101, np.nan)], axis=1)
    samples[50, 0] = np.nan
    low, high = percentile_interval(samples)
    assert low[0] == pytest.approx(0.025, abs=0.01)
    assert high[0] == pytest.approx(0.975, abs=0.01)
    assert np.isnan([low[1], high[1]]).all()


def test_wilson_gives_its_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert np.isnan(wilson_interval(0, 0)).all()


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
    pool = pooled_scores([tally_of(overlap_table(truth, found), (0.9,))], (0.9,))
    assert pool(None)["ap_0.50"] == 1
