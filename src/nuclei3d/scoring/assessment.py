"""Everything that the evaluation wants to know about one volume, nucleus by nucleus.

Recall where predictions are cut at the score that gives a wanted precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.bootstrap import percentile_interval, wilson_interval
from nuclei3d.scoring.contrast import contrast_bin, nucleus_contrast
from nuclei3d.scoring.distances import centroids_um, surface_distances_um
from nuclei3d.scoring.matching import match, overlap_table, relabel_sequential
from nuclei3d.scoring.metrics import MATCH_IOU, THRESHOLDS, Tally, tally_of

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


@dataclass(frozen=True)
class NucleusTable:
    """One row per nucleus of one volume, either the true or the predicted ones.

    Attributes
    ----------
    label
        Label in the file.
    place_um
        Centroid (z, y, x) in um, shape (n, 3).
    volume_um3
        Volume.
    contrast
        See `nuclei3d.scoring.contrast`; nan without an image.
    best_iou
        Best IoU with any nucleus of the other side.
    partner
        Label of the nucleus that it is matched with at IoU .5, 0 if it is missed or false.
    score
        For predicted nuclei the score that the model gave, for true ones that of the partner; else nan.
    surface_um
        Mean distance of the surfaces of the matched pair, nan if unmatched.
    """

    label: NDArray[np.int64]
    place_um: Floats
    volume_um3: Floats
    contrast: Floats
    best_iou: Floats
    partner: NDArray[np.int64]
    score: Floats
    surface_um: Floats

    @property
    def matched(self) -> NDArray[np.bool_]:
        """Whether each nucleus has a partner at IoU .5."""
        return self.partner > 0


@dataclass(frozen=True)
class Assessment:
    """Counts and nuclei of one volume."""

    tally: Tally
    true: NucleusTable
    pred: NucleusTable
    centre_distance_um: Floats


def assess_volume(
    truth: NDArray[np.integer[Any]],
    prediction: NDArray[np.integer[Any]],
    voxel_size: VoxelSize,
    *,
    image: NDArray[np.number[Any]] | None = None,
    scores: dict[int, float] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    surfaces: bool = True,
    true_contrast: Floats | None = None,
) -> Assessment:
    """Compare one predicted with one true volume.

    Parameters
    ----------
    truth, prediction
        Labels (Z, Y, X), any non-negative integers.
    image
        The volume that was segmented; without it contrasts are nan.
    scores
        Score of each predicted label, where the model gave one.
    surfaces
        Whether to measure surface distances, the slowest part.
    true_contrast
        `NucleusTable.contrast` of the same truth from an earlier assessment, to save measuring it again.
    """
    true_labels, true_names = relabel_sequential(truth)
    pred_labels, pred_names = relabel_sequential(prediction)
    table = overlap_table(true_labels, pred_labels)
    matching = match(table, MATCH_IOU)
    partner_of_true = np.zeros(table.n_true, dtype=np.int64)
    partner_of_true[matching.true_index] = matching.pred_index + 1
    partner_of_pred = np.zeros(table.n_pred, dtype=np.int64)
    partner_of_pred[matching.pred_index] = matching.true_index + 1

    true_place = centroids_um(true_labels, table.true_labels, voxel_size)
    pred_place = centroids_um(pred_labels, table.pred_labels, voxel_size)
    pairs = np.stack([matching.true_index + 1, matching.pred_index + 1], axis=1)
    surface = np.full(len(pairs), np.nan)
    if surfaces:
        surface = surface_distances_um(true_labels, pred_labels, pairs, voxel_size)
    pred_score = np.array(
        [(scores or {}).get(int(name), np.nan) for name in pred_names[1:]], dtype=np.float64
    )

    def contrast_of(labels: NDArray[np.uint32], count: int) -> Floats:
        return np.full(count, np.nan) if image is None else nucleus_contrast(image, labels, voxel_size)[1:]

    def spread(values: Floats, at: NDArray[np.int64], count: int) -> Floats:
        column = np.full(count, np.nan)
        column[at] = values
        return column

    return Assessment(
        tally=tally_of(table, thresholds),
        true=NucleusTable(
            label=true_names[1:],
            place_um=true_place,
            volume_um3=table.true_sizes * voxel_size.volume_um3,
            contrast=contrast_of(true_labels, table.n_true) if true_contrast is None else true_contrast,
            best_iou=table.best_true_iou,
            partner=pred_names[partner_of_true],
            score=spread(pred_score[matching.pred_index], matching.true_index, table.n_true),
            surface_um=spread(surface, matching.true_index, table.n_true),
        ),
        pred=NucleusTable(
            label=pred_names[1:],
            place_um=pred_place,
            volume_um3=table.pred_sizes * voxel_size.volume_um3,
            contrast=contrast_of(pred_labels, table.n_pred),
            best_iou=table.best_pred_iou,
            partner=true_names[partner_of_pred],
            score=pred_score,
            surface_um=spread(surface, matching.pred_index, table.n_pred),
        ),
        centre_distance_um=np.linalg.norm(
            true_place[matching.true_index] - pred_place[matching.pred_index], axis=1
        ),
    )


@dataclass(frozen=True)
class BinCounts:
    """Per volume and bin, how many true nuclei there are and are found, and the same of the predicted.

    All have shape (volumes, bins).
    """

    true: Floats
    found: Floats
    pred: Floats
    right: Floats


@dataclass(frozen=True)
class BinScore:
    """Recall and precision of one bin, each with its 95 % interval; nan where there is nothing to count."""

    n: int
    recall: float
    recall_interval: tuple[float, float]
    n_pred: int
    precision: float
    precision_interval: tuple[float, float]


def count_by_contrast(assessments: Sequence[Assessment], edges: Sequence[float]) -> BinCounts:
    """Count nuclei by contrast, faintest bin first; those without a contrast are left out."""
    return _count(
        [(contrast_bin(a.true.contrast, edges), a.true.matched) for a in assessments],
        [(contrast_bin(a.pred.contrast, edges), a.pred.matched) for a in assessments],
        len(edges) + 1,
    )


def count_by_depth(assessments: Sequence[Assessment], edges_um: Sequence[float]) -> BinCounts:
    """Count nuclei by the z of their centroid; `edges_um` are the inner edges."""
    edges = np.asarray(edges_um, dtype=np.float64)
    return _count(
        [(np.searchsorted(edges, a.true.place_um[:, 0], side="right"), a.true.matched) for a in assessments],
        [(np.searchsorted(edges, a.pred.place_um[:, 0], side="right"), a.pred.matched) for a in assessments],
        len(edges) + 1,
    )


def score_bins(counts: BinCounts, weights: Floats | None) -> list[BinScore]:
    """Turn counts into recall and precision with intervals.

    Parameters
    ----------
    weights
        Bootstrap weights (replicates, volumes); None: Wilson's interval over nuclei, for a single unit.
    """
    bins = []
    for index in range(counts.true.shape[1]):
        found, true = counts.found[:, index], counts.true[:, index]
        right, pred = counts.right[:, index], counts.pred[:, index]
        bins.append(
            BinScore(
                n=int(true.sum()),
                recall=_share(found, true),
                recall_interval=_share_interval(found, true, weights),
                n_pred=int(pred.sum()),
                precision=_share(right, pred),
                precision_interval=_share_interval(right, pred, weights),
            )
        )
    return bins


def _count(
    true: Sequence[tuple[NDArray[np.int64], NDArray[np.bool_]]],
    pred: Sequence[tuple[NDArray[np.int64], NDArray[np.bool_]]],
    bins: int,
) -> BinCounts:
    def tabulate(
        columns: Sequence[tuple[NDArray[np.int64], NDArray[np.bool_]]],
    ) -> tuple[Floats, Floats]:
        totals = [np.bincount(b[b >= 0], minlength=bins) for b, _ in columns]
        hits = [np.bincount(b[(b >= 0) & matched], minlength=bins) for b, matched in columns]
        return np.array(totals, dtype=np.float64), np.array(hits, dtype=np.float64)

    return BinCounts(*tabulate(true), *tabulate(pred))


def _share(part: Floats, whole: Floats) -> float:
    return float(part.sum() / whole.sum()) if whole.sum() else float("nan")


def _share_interval(part: Floats, whole: Floats, weights: Floats | None) -> tuple[float, float]:
    if weights is None:
        return wilson_interval(float(part.sum()), float(whole.sum()))
    total = weights @ whole
    samples = np.divide(weights @ part, total, out=np.full(len(total), np.nan), where=total > 0)
    low, high = percentile_interval(samples)
    return float(low), float(high)
