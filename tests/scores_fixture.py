"""Scores of label arrays, pooled over volumes, for tests of the scoring and of baselines."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.scoring.matching import overlap_table
from nuclei3d.scoring.metrics import THRESHOLDS, Metrics, score, stack_tallies, tally_of
from nuclei3d.scoring.watershed import OTSU


def score_volumes(
    truths: Sequence[NDArray[np.integer]],
    predictions: Sequence[NDArray[np.integer]],
    thresholds: Sequence[float] = THRESHOLDS,
) -> Metrics:
    tallies = [tally_of(overlap_table(*pair), thresholds) for pair in zip(truths, predictions, strict=True)]
    return score(stack_tallies(tallies).total(), thresholds)


def metrics_of(missed: Sequence[int], digest: str = "d") -> dict[str, Any]:
    """metrics.json of frames of one embryo; of its 16 nuclei each misses the first so many."""
    volumes = {}
    for frame, count in enumerate(missed):
        truth = np.kron(np.arange(1, 17, dtype=np.uint32).reshape(4, 4), np.ones((4, 4), np.uint32))[None]
        tally = tally_of(overlap_table(truth, np.where(truth > count, truth, 0)))
        volumes[f"E/{frame}"] = {
            **score(tally).as_json(),
            "embryo": "E",
            "truth_digest": f"{digest}{frame}",
            "counts": tally.as_json(),
        }
    ap = dict.fromkeys((f"{t:.2f}" for t in THRESHOLDS), 1 - sum(missed) / (16 * len(missed)))
    naive = {"ap": dict.fromkeys(ap, 0.25)}
    return {"ap": ap, "f1": {}, "volumes": volumes, "baselines": {OTSU: naive}}
