"""The champion gives way only to a better model on the same held-out embryos."""

from typing import Any

import numpy as np

from nuclei3d.experiment.registry import judge
from nuclei3d.scoring.matching import overlap_table
from nuclei3d.scoring.metrics import score, tally_of


def truth_of(frame: int) -> np.ndarray[Any, Any]:
    labels = np.zeros((1, 40, 40), np.uint32)
    for number in range(16):
        y, x = divmod(number, 4)
        labels[0, 10 * y + 1 : 10 * y + 8, 10 * x + 1 : 10 * x + 8] = number + 1
    return labels + (labels > 0) * np.uint32(100 * frame)


def metrics_of(missed: list[int], digest: str = "d") -> dict[str, Any]:
    """metrics.json of six frames of one embryo in which the first `missed[frame]` nuclei are not found."""
    volumes = {}
    for frame, count in enumerate(missed):
        truth = truth_of(frame)
        found = np.where(truth > 100 * frame + count, truth, 0)
        tally = tally_of(overlap_table(truth, found))
        volumes[f"E/{frame}"] = {
            **score(tally).as_json(),
            "embryo": "E",
            "truth_digest": f"{digest}{frame}",
            "counts": tally.as_json(),
        }
    return {"volumes": volumes}


def test_better_on_every_frame_is_better() -> None:
    verdict = judge(metrics_of([6, 5, 6, 7, 6, 5]), metrics_of([2, 2, 1, 2, 3, 2]), "champion", seed=0)
    assert verdict.better
    # 35 and 12 of 96 nuclei missed and none invented: AP is the share found.
    assert verdict.difference is not None
    np.testing.assert_allclose(verdict.difference, (35 - 12) / 96)
    assert verdict.low is not None
    assert verdict.low > 0
    assert "better than the champion" in verdict.reason


def test_the_same_result_is_not_better() -> None:
    same = metrics_of([3, 2, 4, 3, 2, 3])
    assert not judge(same, same, "champion", seed=0).better


def test_worse_is_not_better() -> None:
    assert not judge(metrics_of([1] * 6), metrics_of([5] * 6), "champion", seed=0).better


def test_better_here_and_worse_there_is_not_better() -> None:
    verdict = judge(metrics_of([8, 0, 8, 0, 8, 0]), metrics_of([0, 0, 0, 7, 8, 8]), "champion", seed=0)
    assert verdict.difference is not None
    assert verdict.difference > 0
    assert not verdict.better


def test_other_embryos_settle_nothing() -> None:
    verdict = judge(metrics_of([6] * 6), metrics_of([0] * 6, digest="other"), "champion", seed=0)
    assert not verdict.better
    assert "same held-out volumes" in verdict.reason
    assert not judge(metrics_of([6] * 6), metrics_of([0] * 5), "champion", seed=0).better
