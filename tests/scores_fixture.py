"""Scores of label arrays, pooled over volumes, for tests of the scoring and of baselines."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nuclei3d.scoring.matching import overlap_table
from nuclei3d.scoring.metrics import THRESHOLDS, Metrics, score, stack_tallies, tally_of


def score_volumes(
    truths: Sequence[NDArray[np.integer]],
    predictions: Sequence[NDArray[np.integer]],
    thresholds: Sequence[float] = THRESHOLDS,
) -> Metrics:
    tallies = [tally_of(overlap_table(*pair), thresholds) for pair in zip(truths, predictions, strict=True)]
    return score(stack_tallies(tallies).total(), thresholds)
