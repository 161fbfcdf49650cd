"""Choosing the thresholds of a prediction on labelled volumes that were not trained on.

For each threshold of the logit a volume is segmented once, with all nuclei kept. What a threshold of the
score or of the volume would drop is then a matter of counting: above an IoU of one half a true nucleus has at
most one partner, so dropping a prediction changes no other match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.matching import overlap_table
from nuclei3d.segmentation.dynamics import label_flows
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.settings import SegmentationSettings

_MOST_SCORES = 40


@dataclass(frozen=True)
class LabelledFlow:
    """What the network says of a volume (`Segmenter.flows`), and true labels on the image's grid."""

    flows: FlowField
    truth: NDArray[np.integer[Any]]
    voxel_size: VoxelSize


@dataclass(frozen=True)
class Thresholds:
    """The thresholds chosen, the average precision that they reach and that of the defaults.

    Both are means over the overlaps that were asked for, counts pooled over volumes.
    """

    cellprob: float
    score: float
    min_volume_um3: float
    ap: float
    ap_default: float


@dataclass(frozen=True)
class _Candidates:
    """All predictions of one logit threshold, pooled over volumes."""

    best_iou: NDArray[np.float64]
    score: NDArray[np.float64]
    volume_um3: NDArray[np.float64]
    n_true: int

    def ap(self, ious: Sequence[float], score: float, least_um3: float) -> float:
        """Mean average precision of the predictions that pass."""
        passed = (self.score >= score) & (self.volume_um3 >= least_um3)
        hits = np.array([np.count_nonzero(passed & (self.best_iou > iou)) for iou in ious])
        union = self.n_true + np.count_nonzero(passed) - hits
        return float(np.mean(hits / np.maximum(union, 1)))


def choose_thresholds(
    volumes: Sequence[LabelledFlow],
    settings: SegmentationSettings,
    cellprob: Sequence[float],
    ious: Sequence[float],
    volume_fractions: Sequence[float],
) -> Thresholds:
    """Choose the thresholds of logit, score and least volume with the best average precision.

    Among equals those nearest to the defaults are taken; of the scores the lowest whose average precision is
    within one standard error of the best (Breiman et al. 1984). That rule is for the score alone: a few dozen
    nuclei of one embryo hardly tell a threshold from the next, and too high a one costs the faint nuclei of
    other embryos.

    Parameters
    ----------
    volumes
        At least one, of embryos that were not trained on.
    settings
        Of the prediction; its own thresholds count as the defaults.
    cellprob
        Logit thresholds to try; that of the settings is always tried.
    ious
        Overlaps, each at least .5, over which the average precision is averaged.
    volume_fractions
        Least volumes to try, as fractions of the volume of a typical nucleus.
    """
    default = settings.masks.cellprob_threshold
    typical_um3 = float(np.pi / 6 * settings.nucleus_diameter_um**3)
    tried = sorted({default, *cellprob}, key=lambda value: abs(value - default))
    best: Thresholds | None = None
    ap_default = 0.0
    for threshold in tried:
        found = _segment_all(volumes, settings, threshold)
        if threshold == default:
            ap_default = found.ap(ious, settings.masks.score_threshold, settings.masks.min_volume_um3)
        for fraction in sorted(volume_fractions):
            for score in _scores_to_try(found):
                ap = found.ap(ious, score, fraction * typical_um3)
                if best is None or ap > best.ap + 1e-9:
                    best = Thresholds(threshold, score, fraction * typical_um3, ap, ap_default)
                    candidates = found
    assert best is not None
    error = float(np.sqrt(best.ap * (1 - best.ap) / max(candidates.n_true, 1)))
    for score in _scores_to_try(candidates):
        ap = candidates.ap(ious, score, best.min_volume_um3)
        if ap >= best.ap - error:
            return replace(best, score=float(score), ap=ap)
    return best


def _segment_all(
    volumes: Sequence[LabelledFlow], settings: SegmentationSettings, cellprob: float
) -> _Candidates:
    masks = replace(settings.masks, cellprob_threshold=cellprob, score_threshold=0.0, min_volume_um3=0.0)
    trial = replace(settings, masks=masks)
    ious, scores, sizes = [], [], []
    n_true = 0
    for volume in volumes:
        labels, score = label_flows(volume.flows, volume.truth.shape, trial)
        table = overlap_table(volume.truth, labels)
        n_true += table.n_true
        ious.append(table.best_pred_iou)
        scores.append(score[table.pred_labels].astype(np.float64))
        sizes.append(table.pred_sizes * volume.voxel_size.volume_um3)
    return _Candidates(np.concatenate(ious), np.concatenate(scores), np.concatenate(sizes), n_true)


def _scores_to_try(found: _Candidates) -> NDArray[np.float64]:
    """Zero and evenly spaced quantiles of the lower half, rounded: few, and not fitted to single nuclei."""
    if not len(found.score):
        return np.zeros(1)
    quantiles = np.quantile(found.score, np.linspace(0, 0.6, _MOST_SCORES))
    rounded: NDArray[np.float64] = np.unique(np.concatenate([[0.0], np.floor(quantiles * 100) / 100]))
    return rounded
