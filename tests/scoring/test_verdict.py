import numpy as np
import pytest

from nuclei3d.scoring.verdict import judge
from scores_fixture import metrics_of


def test_better_on_every_frame_is_better() -> None:
    verdict = judge(metrics_of([6, 5, 6, 7, 6, 5]), metrics_of([2, 2, 1, 2, 3, 2]), "champion", seed=0)
    assert verdict.better
    # 35 and 12 of 96 nuclei missed and none invented: AP is the share found.
    assert verdict.difference is not None
    np.testing.assert_allclose(verdict.difference, (35 - 12) / 96)
    assert verdict.low is not None
    assert verdict.low > 0
    assert "better than the champion" in verdict.reason


@pytest.mark.parametrize(
    ("before", "now", "difference"),
    [
        ([3, 2, 4, 3, 2, 3], [3, 2, 4, 3, 2, 3], 0),
        ([1] * 6, [5] * 6, -1),
        # better here and worse there
        ([8, 0, 8, 0, 8, 0], [0, 0, 0, 7, 8, 8], 1),
    ],
)
def test_what_is_not_surely_better_is_not_better(before: list[int], now: list[int], difference: int) -> None:
    verdict = judge(metrics_of(before), metrics_of(now), "champion", seed=0)
    assert not verdict.better
    assert np.sign(verdict.difference) == difference


def test_other_embryos_settle_nothing() -> None:
    verdict = judge(metrics_of([6] * 6), metrics_of([0] * 6, digest="other"), "champion", seed=0)
    assert not verdict.better
    assert "same held-out volumes" in verdict.reason
    assert not judge(metrics_of([6] * 6), metrics_of([0] * 5), "champion", seed=0).better
