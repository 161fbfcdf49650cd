"""Recall where predictions are cut at the score that gives a wanted precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.scoring.assessment import Assessment
from nuclei3d.core.scoring.contrast import contrast_bin

Floats = NDArray[np.float64]


def recall_at_precision(
    assessments: Sequence[Assessment],
    target: float,
    *,
    edges: Sequence[float] | None = None,
    bin_index: int = 0,
) -> tuple[float, float] | None:
    """Recall if only predictions above a score are kept, the score being the lowest with that precision.

    Parameters
    ----------
    target
        Precision, pooled over the volumes, that the kept predictions reach.
    edges, bin_index
        Inner edges of the contrast bins and the bin whose recall is wanted; None: of all true nuclei.

    Returns
    -------
    recall, score
        None if a prediction has no score, no score reaches the precision, or the bin is empty.
    """
    once = np.ones((1, len(assessments)))
    found = resampled_recall_at_precision(assessments, target, once, edges=edges, bin_index=bin_index)
    if found is None or np.isnan(found[0][0]):
        return None
    return float(found[0][0]), float(found[1][0])


def resampled_recall_at_precision(
    assessments: Sequence[Assessment],
    target: float,
    weights: Floats,
    *,
    edges: Sequence[float] | None = None,
    bin_index: int = 0,
) -> tuple[Floats, Floats] | None:
    """Give the same for resampled volumes, the cut chosen anew in each replicate.

    Parameters
    ----------
    weights
        Bootstrap weights, shape (replicates, volumes).

    Returns
    -------
    recall, score
        Shape (replicates,); nan where no score reaches the precision or there is nothing to find. A score of
        a volume that was not drawn may be the cut, which leaves the recall as it is. None if a prediction
        has no score, or there is none.
    """
    scores = np.concatenate([a.pred.score for a in assessments])
    if not len(scores) or np.isnan(scores).any():
        return None
    order = np.argsort(-scores, kind="stable")
    right = np.concatenate([a.pred.matched for a in assessments])[order]
    volume_of_pred = np.repeat(np.arange(len(assessments)), [len(a.pred.score) for a in assessments])[order]
    scores = scores[order]
    # Predictions of equal score are kept or dropped together.
    last_of_score = np.append(np.diff(scores) != 0, True)
    true_score = np.concatenate([a.true.score for a in assessments])
    volume_of_true = np.repeat(np.arange(len(assessments)), [len(a.true.score) for a in assessments])
    if edges is not None:
        bins = np.concatenate([contrast_bin(a.true.contrast, edges) for a in assessments])
        true_score, volume_of_true = true_score[bins == bin_index], volume_of_true[bins == bin_index]
    recall, cut = np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    for replicate, weight in enumerate(weights):
        of_pred, of_true = weight[volume_of_pred], weight[volume_of_true]
        kept = np.cumsum(of_pred)
        good = (np.cumsum(of_pred * right) >= target * kept) & (kept > 0) & last_of_score
        if good.any() and of_true.sum():
            cut[replicate] = scores[np.flatnonzero(good)[-1]]
            recall[replicate] = of_true[true_score >= cut[replicate]].sum() / of_true.sum()
    return recall, cut
