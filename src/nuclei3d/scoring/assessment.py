"""One volume nucleus by nucleus: who is found, where, how far off; and what many volumes say together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects, generate_binary_structure

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.bootstrap import (
    FEWEST_NUCLEI,
    bootstrap_weights,
    percentile_interval,
    resampling_units,
    wilson_interval,
)
from nuclei3d.scoring.contrast import contrast_bin, nucleus_contrast
from nuclei3d.scoring.matching import (
    Floats,
    Integers,
    Labels,
    leave_out_unknown,
    match,
    overlap_table,
    relabel_sequential,
)
from nuclei3d.scoring.metrics import (
    COUNTS,
    MATCH_IOU,
    THRESHOLDS,
    Tally,
    number_or_none,
    ratio,
    score,
    stack_tallies,
    tally_of,
)

#: Precisions at which the recall is given where the model gives scores.
TARGET_PRECISIONS = (0.9, 0.95)
#: Stages of an embryo by its number of true nuclei: first number of each.
STAGES = (0, 8, 32, 128, 512)
_DEPTH_BINS = 5


@dataclass(frozen=True)
class NucleusTable:
    """One row per nucleus of one volume, either the true or the predicted ones.

    `place_um` (n, 3) is the centroid (z, y, x); `contrast` that of `nuclei3d.scoring.contrast`, nan without
    an image; `best_iou` that with any nucleus of the other side, `partner` the label of the one that it is
    matched with at IoU .5, or 0; `score` is what the model gave predicted nuclei, for true ones that of the
    partner, else nan; `surface_um` the mean distance of the surfaces of the matched pair, nan if unmatched.
    """

    label: Integers
    place_um: Floats
    volume_um3: Floats
    contrast: Floats
    best_iou: Floats
    partner: Integers
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
    truth: Labels,
    prediction: Labels,
    voxel_size: VoxelSize,
    *,
    image: NDArray[np.number[Any]] | None = None,
    scores: dict[int, float] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    surfaces: bool = True,
    true_contrast: Floats | None = None,
    unknown: NDArray[np.bool_] | None = None,
) -> Assessment:
    """Compare one predicted with one true volume of labels (Z, Y, X).

    Without the `image` that was segmented contrasts are nan; `scores` are those of predicted labels, where
    the model gave any. Measuring `surfaces` is the slowest part; `true_contrast` is `NucleusTable.contrast`
    of the same truth from an earlier assessment, to save measuring it again. Where nobody looked (`unknown`;
    None: nowhere) nothing counts.
    """
    prediction = leave_out_unknown(prediction, truth, unknown)
    true_labels, true_names = relabel_sequential(truth)
    pred_labels, pred_names = relabel_sequential(prediction)
    table = overlap_table(true_labels, pred_labels)
    matching = match(table, MATCH_IOU)
    true_at, pred_at = matching.true_index, matching.pred_index
    surface = np.full(len(true_at), np.nan)
    if surfaces:
        pairs = np.stack([true_at + 1, pred_at + 1], axis=1)
        surface = surface_distances_um(true_labels, pred_labels, pairs, voxel_size)
    given = scores or {}
    pred_score = np.array([given.get(int(name), np.nan) for name in pred_names[1:]], dtype=np.float64)

    def spread(values: NDArray[Any], at: Integers, count: int, unmatched: float = np.nan) -> NDArray[Any]:
        column = np.full(count, unmatched, values.dtype)
        column[at] = values
        return column

    def describe(
        labels: Labels,
        names: Integers,
        sizes: Integers,
        at: Integers,
        partner: Integers,
        contrast: Floats | None,
    ) -> dict[str, Any]:
        n = len(sizes)
        if contrast is None and image is not None:
            contrast = nucleus_contrast(image, labels, voxel_size, unknown)[1:]
        return {
            "label": names[1:],
            "place_um": centroids_um(labels, np.arange(1, n + 1), voxel_size),
            "volume_um3": sizes * voxel_size.volume_um3,
            "contrast": np.full(n, np.nan) if contrast is None else contrast,
            "partner": spread(partner, at, n, 0),
            "surface_um": spread(surface, at, n),
        }

    true = NucleusTable(
        **describe(
            true_labels, true_names, table.true_sizes, true_at, pred_names[pred_at + 1], true_contrast
        ),
        best_iou=table.best_true_iou,
        score=spread(pred_score[pred_at], true_at, table.n_true),
    )
    pred = NucleusTable(
        **describe(pred_labels, pred_names, table.pred_sizes, pred_at, true_names[true_at + 1], None),
        best_iou=table.best_pred_iou,
        score=pred_score,
    )
    apart_um = np.linalg.norm(true.place_um[true_at] - pred.place_um[pred_at], axis=1)
    return Assessment(tally_of(table, thresholds), true, pred, apart_um)


def centroids_um(labels: Labels, present: Integers, voxel_size: VoxelSize) -> Floats:
    """Give the centroids (n, 3), in um from the centre of the first voxel, of the labels `present` (n,).

    Labels must not be much larger than their number; those that are absent get nan.
    """
    voxels = np.nonzero(labels)
    label = labels[voxels]
    length = max(int(present.max(initial=0)), int(label.max(initial=0))) + 1
    sizes = np.bincount(label, minlength=length)[present]
    centres = np.full((len(present), 3), np.nan)
    for axis, edge_um in enumerate(voxel_size.zyx):
        sums = np.bincount(label, weights=voxels[axis], minlength=length)[present]
        np.divide(sums * edge_um, sizes, out=centres[:, axis], where=sizes > 0)
    return centres


def surface_distances_um(truth: Labels, prediction: Labels, pairs: Integers, voxel_size: VoxelSize) -> Floats:
    """Give the average symmetric surface distance in um of pairs (n, 2) of labels in truth and prediction.

    For every voxel on either surface the distance to the nearest voxel on the other; the mean of the two
    means.
    """
    true_boxes, pred_boxes = find_objects(truth), find_objects(prediction)
    distances = np.full(len(pairs), np.nan)
    for index, (true_label, pred_label) in enumerate(pairs):
        box = tuple(
            slice(min(a.start, b.start), max(a.stop, b.stop))
            for a, b in zip(true_boxes[true_label - 1], pred_boxes[pred_label - 1], strict=True)
        )
        first = _surface(truth[box] == true_label)
        second = _surface(prediction[box] == pred_label)
        to_first = distance_transform_edt(~first, sampling=voxel_size.zyx)
        to_second = distance_transform_edt(~second, sampling=voxel_size.zyx)
        distances[index] = (to_first[second].mean() + to_second[first].mean()) / 2
    return distances


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    # What lies outside the box counts as background, so a nucleus has a surface there too.
    eroded = binary_erosion(mask, generate_binary_structure(3, 1))
    surface: NDArray[np.bool_] = mask & ~eroded
    return surface


@dataclass(frozen=True)
class BinCounts:
    """Per volume and bin, how many true nuclei there are and are found, and the same of the predicted.

    All have shape (volumes, bins).
    """

    true: Floats
    found: Floats
    pred: Floats
    right: Floats


def count_by_contrast(assessments: Sequence[Assessment], edges: Sequence[float]) -> BinCounts:
    """Count nuclei by contrast, faintest bin first; those without a contrast are left out."""
    return _count(assessments, edges, lambda table: table.contrast)


def count_by_depth(assessments: Sequence[Assessment], edges_um: Sequence[float]) -> BinCounts:
    """Count nuclei by the z of their centroid; `edges_um` are the inner edges."""
    return _count(assessments, edges_um, lambda table: table.place_um[:, 0])


def _count(
    assessments: Sequence[Assessment], edges: Sequence[float], value_of: Callable[[NucleusTable], Floats]
) -> BinCounts:
    counts = []
    for tables in ([a.true for a in assessments], [a.pred for a in assessments]):
        placed = [(contrast_bin(value_of(table), edges), table.matched) for table in tables]
        for kept in ([b[b >= 0] for b, _ in placed], [b[(b >= 0) & matched] for b, matched in placed]):
            counts.append(np.array([np.bincount(b, minlength=len(edges) + 1) for b in kept], np.float64))
    return BinCounts(*counts)


def score_bins(counts: BinCounts, edges: Sequence[float], weights: Floats | None) -> list[dict[str, Any]]:
    """Turn counts into recall and precision, with intervals by bootstrap weights (replicates, volumes).

    Without weights, for a single unit, the intervals are Wilson's over nuclei; fewer than `FEWEST_NUCLEI` of
    them have none. The bins are those of
    metrics.json, with their bounds, None where open.
    """

    def share(part: Floats, whole: Floats) -> tuple[int, float | None, list[float] | None]:
        n, value = whole.sum(), ratio(part.sum(), whole.sum())
        if n < FEWEST_NUCLEI:
            interval = None
        elif weights is None:
            interval = interval_as_json(wilson_interval(float(part.sum()), float(n)))
        else:
            interval = interval_as_json(percentile_interval(ratio(weights @ part, weights @ whole)))
        return int(n), number_or_none(value), interval

    bounds, bins = [None, *edges, None], []
    for index, (low, high) in enumerate(pairwise(bounds)):
        n, recall, interval = share(counts.found[:, index], counts.true[:, index])
        n_pred, precision, precision_interval = share(counts.right[:, index], counts.pred[:, index])
        bins.append(
            {
                "from": low,
                "to": high,
                "n": n,
                "recall": recall,
                "interval": interval,
                "n_pred": n_pred,
                "precision": precision,
                "precision_interval": precision_interval,
            }
        )
    return bins


def recall_at_precision(
    assessments: Sequence[Assessment],
    target: float,
    weights: Floats | None = None,
    *,
    edges: Sequence[float] | None = None,
) -> tuple[Floats, Floats]:
    """Give recall and cut if only predictions from a score on are kept, the lowest with that precision.

    The precision is pooled over the volumes, resampled by weights (replicates, volumes), the cut chosen anew
    in each replicate; without weights, each volume counts once and there is one replicate. The recall is that
    of the faintest bin of contrast, given its inner edges, else of all true nuclei. Both, (replicates,), are
    nan if a prediction has no score, no score reaches the precision, or there is nothing to find. A score of
    a volume that was not drawn may be the cut, which leaves the recall as it is.
    """
    weights = np.ones((1, len(assessments))) if weights is None else weights
    recall, cut = np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    scores = np.concatenate([a.pred.score for a in assessments])
    if not len(scores) or np.isnan(scores).any():
        return recall, cut
    order = np.argsort(-scores, kind="stable")
    right = np.concatenate([a.pred.matched for a in assessments])[order]
    volume_of_pred = np.repeat(np.arange(len(assessments)), [len(a.pred.score) for a in assessments])[order]
    scores = scores[order]
    # Predictions of equal score are kept or dropped together.
    last_of_score = np.append(np.diff(scores) != 0, True)
    true_score = np.concatenate([a.true.score for a in assessments])
    volume_of_true = np.repeat(np.arange(len(assessments)), [len(a.true.score) for a in assessments])
    if edges is not None:
        faintest = np.concatenate([contrast_bin(a.true.contrast, edges) for a in assessments]) == 0
        true_score, volume_of_true = true_score[faintest], volume_of_true[faintest]
    for replicate, weight in enumerate(weights):
        of_pred, of_true = weight[volume_of_pred], weight[volume_of_true]
        kept = np.cumsum(of_pred)
        good = (np.cumsum(of_pred * right) >= target * kept) & (kept > 0) & last_of_score
        if good.any() and of_true.sum():
            cut[replicate] = scores[np.flatnonzero(good)[-1]]
            recall[replicate] = of_true[true_score >= cut[replicate]].sum() / of_true.sum()
    return recall, cut


def summarise(
    assessments: Sequence[Assessment],
    embryos: Sequence[str],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    contrast_edges: Sequence[float] | None = None,
    replicates: int = 1000,
    over: Literal["auto", "embryo", "time"] = "auto",
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Pool assessed volumes, those of one embryo in the order of time, and resample them.

    `contrast_edges` are the inner edges of the bins (None: contrasts were not measured), `replicates` those
    of the bootstrap (0: no intervals), of what `over` says (`resampling_units`). Gives the scores of one
    method in metrics.json, undefined ones None: those of the summed counts; by bin of contrast (empty without
    edges; the faintest first) and of depth (nearest to the first plane first), also at high precisions; mean
    distances of matched nuclei in um; the 95 % interval of each scalar that is no count (none for a single
    unit or fewer than `FEWEST_NUCLEI` nuclei), and its mean over the volumes.
    """
    tallies = stack_tallies([assessment.tally for assessment in assessments])
    each = score(tallies, thresholds).by_name()
    units = resampling_units(embryos, over)
    weights = None
    intervals = {}
    n_true, n_pred = int(tallies.n_true.sum()), int(tallies.n_pred.sum())
    if replicates and units.count > 1 and n_true >= FEWEST_NUCLEI:
        weights = bootstrap_weights(units, replicates, rng)
        intervals = {
            name: interval_as_json(percentile_interval(samples))
            for name, samples in score(tallies.total(weights), thresholds).by_name().items()
            if name not in COUNTS and (n_pred >= FEWEST_NUCLEI or name not in ("precision", "mucov"))
        }
    by_contrast = []
    if contrast_edges is not None:
        counts = count_by_contrast(assessments, contrast_edges)
        by_contrast = score_bins(counts, [float(edge) for edge in contrast_edges], weights)
    depth_edges = _depth_edges(assessments)
    return {
        **score(tallies.total(), thresholds).as_json(),
        "recall_by_contrast": by_contrast,
        "recall_faint": by_contrast[0]["recall"] if by_contrast else None,
        "recall_bright": by_contrast[-1]["recall"] if by_contrast else None,
        "recall_at_precision": {
            f"{target:.2f}": _recall_at(
                assessments, target, contrast_edges, weights, by_contrast[0]["n"] if by_contrast else 0
            )
            for target in TARGET_PRECISIONS
        },
        "recall_by_depth_um": score_bins(count_by_depth(assessments, depth_edges), depth_edges, weights),
        "centre_distance_um": _mean(np.concatenate([a.centre_distance_um for a in assessments])),
        "surface_distance_um": _mean(np.concatenate([a.true.surface_um for a in assessments])),
        "intervals": intervals,
        "intervals_over": units.words if intervals else None,
        "volume_mean": {name: _mean(values) for name, values in each.items() if name not in COUNTS},
    }


def by_embryo(
    assessments: Sequence[Assessment], embryos: Sequence[str], thresholds: Sequence[float]
) -> dict[str, Any]:
    """Pool the volumes of each embryo."""
    return _pools(dict.fromkeys(embryos), assessments, embryos, thresholds)


def by_stage(assessments: Sequence[Assessment], thresholds: Sequence[float]) -> dict[str, Any]:
    """Pool volumes of about as many nuclei; the names tell how many, such as ``8-31``."""
    names = [*(f"{first}-{after - 1}" for first, after in pairwise(STAGES)), f"{STAGES[-1]}+"]
    numbers = [int(assessment.tally.n_true) for assessment in assessments]
    places = np.searchsorted(STAGES, numbers, side="right") - 1
    return _pools(names, assessments, [names[place] for place in places], thresholds)


def _pools(
    names: Iterable[str], assessments: Sequence[Assessment], group: Sequence[str], thresholds: Sequence[float]
) -> dict[str, Any]:
    pools = {}
    for name in names:
        tallies = [a.tally for a, other in zip(assessments, group, strict=True) if other == name]
        if tallies:
            pools[name] = score(stack_tallies(tallies).total(), thresholds).as_json()
    return pools


def interval_as_json(bounds: tuple[Any, Any]) -> list[float] | None:
    """Give an interval as a list of two, or None where it is undefined."""
    return None if np.isnan(bounds).any() else [float(bound) for bound in bounds]


def _depth_edges(assessments: Sequence[Assessment]) -> tuple[float, ...]:
    depths = np.concatenate([assessment.true.place_um[:, 0] for assessment in assessments])
    if not len(depths):
        return ()
    edges = np.linspace(depths.min(), depths.max(), _DEPTH_BINS + 1)[1:-1]
    return tuple(round(float(edge), 2) for edge in edges)


def _recall_at(
    assessments: Sequence[Assessment],
    target: float,
    edges: Sequence[float] | None,
    weights: Floats | None,
    n_faintest: int,
) -> dict[str, Any] | None:
    """Give the recall of the faintest bin and of all nuclei, and the cut; None where it is out of reach."""

    def reach(edges: Sequence[float] | None) -> tuple[float | None, list[float] | None, float]:
        (recall,), (cut,) = recall_at_precision(assessments, target, edges=edges)
        if weights is None or np.isnan(recall) or (edges is not None and n_faintest < FEWEST_NUCLEI):
            return number_or_none(recall), None, float(cut)
        drawn, _ = recall_at_precision(assessments, target, weights, edges=edges)
        return float(recall), interval_as_json(percentile_interval(drawn)), float(cut)

    recall, interval, cut = reach(None)
    if recall is None:
        return None
    faint, faint_interval, _ = (None, None, 0.0) if edges is None else reach(edges)
    return {
        "recall_faint": faint,
        "recall_faint_interval": faint_interval,
        "recall": recall,
        "recall_interval": interval,
        "score": cut,
    }


def _mean(values: Floats) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
