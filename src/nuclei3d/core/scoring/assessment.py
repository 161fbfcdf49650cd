"""Everything that the evaluation wants to know about one volume, nucleus by nucleus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.scoring.bootstrap import percentile_interval, wilson_interval
from nuclei3d.core.scoring.contrast import contrast_bin, nucleus_contrast
from nuclei3d.core.scoring.distances import centroids_um, surface_distances_um
from nuclei3d.core.scoring.matching import match, overlap_table, relabel_sequential
from nuclei3d.core.scoring.metrics import MATCH_IOU, THRESHOLDS, Tally, tally_of
from nuclei3d.volumes.voxel_size import VoxelSize

Floats = NDArray[np.float64]


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
        See `nuclei3d.core.scoring.contrast`; nan without an image.
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
