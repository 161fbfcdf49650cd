"""Choosing the thresholds of a prediction on labelled volumes that were not trained on.

First come the thresholds at which outlines end, in the plane and along z: the overlap with the true nuclei
decides. Then, with these, for each threshold of the logit a volume is segmented once, with all nuclei kept.
What a threshold of the score or of the volume would drop is then a matter of counting: above an IoU of one
half a true nucleus has at most one partner, so dropping a prediction changes no other match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.matching import leave_out_unknown, overlap_table
from nuclei3d.segmentation.dynamics import label_flows
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.settings import MaskSettings, SegmentationSettings

_MOST_SCORES = 40
_USUAL_SCORE = 0.35
"""Higher ones still raise the average precision on embryos left out, but cost nuclei that divide."""


@dataclass(frozen=True)
class LabelledFlow:
    """What the network says of a volume (`Segmenter.flows`), and true labels on the image's grid.

    Nothing counts where it is `unknown` what there is; None: all is known.
    """

    flows: FlowField
    truth: NDArray[np.integer[Any]]
    voxel_size: VoxelSize
    unknown: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Thresholds:
    """The thresholds chosen, the average precision that they reach and that of the defaults.

    Both are means over the overlaps that were asked for, counts pooled over volumes.
    """

    cellprob: float
    outline: float
    outline_z: float
    score: float
    min_volume_um3: float
    ap: float
    ap_default: float


@dataclass(frozen=True)
class _Candidates:
    """All predictions of one logit threshold, pooled over volumes."""

    best_iou: NDArray[np.float64]
    true_iou: NDArray[np.float64]
    score: NDArray[np.float64]
    volume_um3: NDArray[np.float64]

    @property
    def n_true(self) -> int:
        """Number of true nuclei."""
        return len(self.true_iou)

    @property
    def seg(self) -> float:
        """Mean over the true nuclei of the best IoU, 0 unless above one half, as no other nucleus has it."""
        return float(np.where(self.true_iou > 0.5, self.true_iou, 0.0).sum() / max(self.n_true, 1))

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
    outline: Sequence[float],
    ious: Sequence[float],
    volume_fractions: Sequence[float],
) -> Thresholds:
    """Choose outlines by overlap (SEG), then logit, score and least volume by the average precision.

    Outlines are chosen with nuclei found at the default, or above it where an outline is: one threshold
    for all directions, then along z, then in the plane. Among equals those nearest to the defaults are
    taken. A few dozen nuclei of one embryo hardly tell a threshold from the next: another may have debris
    and false nuclei where this has none, or fainter nuclei and smaller ones, just divided. So the largest
    volume is taken that costs nothing here, and the score nearest to .35 between the lowest whose average
    precision is within one standard error of the best (Breiman et al. 1984) and the highest that costs
    nothing.

    There is at least one volume, of embryos that were not trained on; the thresholds of `settings` count as
    the defaults. Tried are the logit thresholds `cellprob` and that of the settings, the logit thresholds
    `outline` of outlines, and least volumes as `volume_fractions` of that of a typical nucleus. The average
    precision is the mean over the overlaps `ious`, each at least .5.
    """
    default = settings.masks.cellprob_threshold
    typical_um3 = float(np.pi / 6 * settings.nucleus_diameter_um**3)
    outline_z, outline_xy = _choose_outline(volumes, settings, outline)
    drawn = replace(settings.masks, outline_threshold=outline_xy, outline_threshold_z=outline_z)
    best: tuple[float, _Candidates, float, float] | None = None
    for threshold in sorted({default, *cellprob}, key=lambda value: abs(value - default)):
        found = _segment_all(volumes, settings, replace(drawn, cellprob_threshold=threshold))
        for fraction in sorted(volume_fractions):
            for score in _scores_to_try(found):
                ap = found.ap(ious, score, fraction * typical_um3)
                if best is None or ap > best[0] + 1e-9:
                    best, chosen = (ap, found, score, fraction), threshold
    assert best is not None
    best_ap, candidates, score, _ = best
    no_loss, enough = best_ap - 1e-9, best_ap - np.sqrt(best_ap * (1 - best_ap) / max(candidates.n_true, 1))
    least = [each * typical_um3 for each in sorted(volume_fractions, reverse=True)]
    least_um3 = next(each for each in least if candidates.ap(ious, score, each) >= no_loss)
    aps = {float(each): candidates.ap(ious, each, least_um3) for each in _scores_to_try(candidates)}
    lowest = min(each for each, ap in aps.items() if ap >= enough)
    score = min(max(_USUAL_SCORE, lowest), max(each for each, ap in aps.items() if ap >= no_loss))
    plain = _segment_all(volumes, settings, settings.masks)
    return Thresholds(
        cellprob=chosen,
        outline=min(chosen, outline_xy),
        outline_z=min(chosen, outline_z),
        score=score,
        min_volume_um3=least_um3,
        ap=candidates.ap(ious, score, least_um3),
        ap_default=plain.ap(ious, settings.masks.score_threshold, settings.masks.min_volume_um3),
    )


def _choose_outline(
    volumes: Sequence[LabelledFlow], settings: SegmentationSettings, tried: Sequence[float]
) -> tuple[float, float]:
    default = settings.masks.cellprob_threshold
    tried = sorted({default, *tried}, key=lambda each: abs(default - each))
    seg: dict[tuple[float, float], float] = {}

    def best_of(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
        for z, xy in pairs:
            if (z, xy) not in seg:
                masks = replace(settings.masks, outline_threshold=xy, outline_threshold_z=z)
                masks = replace(masks, cellprob_threshold=max(default, z, xy))
                seg[z, xy] = _segment_all(volumes, settings, masks).seg
        return max(pairs, key=lambda pair: round(seg[pair], 9))

    _, xy = best_of([(each, each) for each in tried])
    z, xy = best_of([(each, xy) for each in tried])
    return best_of([(z, each) for each in tried])


def _segment_all(
    volumes: Sequence[LabelledFlow], settings: SegmentationSettings, masks: MaskSettings
) -> _Candidates:
    trial = replace(settings, masks=replace(masks, score_threshold=0.0, min_volume_um3=0.0))
    ious, true_ious, scores, sizes = [], [], [], []
    for volume in volumes:
        labels, score = label_flows(volume.flows, volume.truth.shape, trial)
        table = overlap_table(volume.truth, leave_out_unknown(labels, volume.truth, volume.unknown))
        ious.append(table.best_pred_iou)
        true_ious.append(table.best_true_iou)
        scores.append(score[table.pred_labels].astype(np.float64))
        sizes.append(table.pred_sizes * volume.voxel_size.volume_um3)
    return _Candidates(*(np.concatenate(each) for each in (ious, true_ious, scores, sizes)))


def _scores_to_try(found: _Candidates) -> NDArray[np.float64]:
    """Zero and evenly spaced quantiles of the lower half, rounded: few, and not fitted to single nuclei."""
    if not len(found.score):
        return np.zeros(1)
    quantiles = np.quantile(found.score, np.linspace(0, 0.6, _MOST_SCORES))
    rounded: NDArray[np.float64] = np.unique(np.concatenate([[0.0], np.floor(quantiles * 100) / 100]))
    return rounded
