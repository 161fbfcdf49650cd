"""Intervals cover what they should, and what is resampled are embryos or blocks of time."""

import numpy as np
import pytest

from nuclei3d.scoring.bootstrap import (
    bootstrap_weights,
    percentile_interval,
    resampling_units,
    wilson_interval,
)


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
