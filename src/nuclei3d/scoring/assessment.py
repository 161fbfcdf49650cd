"""One volume nucleus by nucleus: who is found, where, how far off; and what many volumes say together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects, generate_binary_structure

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.bootstrap import (
    Units,
    bootstrap_weights,
    percentile_interval,
    resampling_units,
    wilson_interval,
)
from nuclei3d.scoring.contrast import contrast_bin, nucleus_contrast
from nuclei3d.scoring.matching import Floats, Integers, Labels, match, overlap_table, relabel_sequential
from nuclei3d.scoring.metrics import (
    COUNTS,
    MATCH_IOU,
    THRESHOLDS,
    Metrics,
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

    Attributes
    ----------
    place_um
        Centroid (z, y, x) in um, shape (n, 3).
    contrast
        See `nuclei3d.scoring.contrast`; nan without an image.
    best_iou, partner
        Best IoU with any nucleus of the other side; label of the one that it is matched with at IoU .5, or 0.
    score
        For predicted nuclei the score that the model gave, for true ones that of the partner; else nan.
    surface_um
        Mean distance of the surfaces of the matched pair, nan if unmatched.
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
) -> Assessment:
    """Compare one predicted with one true volume of labels (Z, Y, X).

    Parameters
    ----------
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
    true_at, pred_at = matching.true_index, matching.pred_index

    def spread(values: Floats, at: Integers, count: int) -> Floats:
        column = np.full(count, np.nan)
        column[at] = values
        return column

    def partners(names: Integers, own: Integers, other: Integers, count: int) -> Integers:
        index = np.zeros(count, dtype=np.int64)
        index[own] = other + 1
        return names[index]

    def contrast_of(labels: Labels, count: int) -> Floats:
        return np.full(count, np.nan) if image is None else nucleus_contrast(image, labels, voxel_size)[1:]

    pairs = np.stack([true_at + 1, pred_at + 1], axis=1)
    surface = np.full(len(pairs), np.nan)
    if surfaces:
        surface = surface_distances_um(true_labels, pred_labels, pairs, voxel_size)
    given = scores or {}
    pred_score = np.array([given.get(int(name), np.nan) for name in pred_names[1:]], dtype=np.float64)
    true = NucleusTable(
        label=true_names[1:],
        place_um=centroids_um(true_labels, table.true_labels, voxel_size),
        volume_um3=table.true_sizes * voxel_size.volume_um3,
        contrast=contrast_of(true_labels, table.n_true) if true_contrast is None else true_contrast,
        best_iou=table.best_true_iou,
        partner=partners(pred_names, true_at, pred_at, table.n_true),
        score=spread(pred_score[pred_at], true_at, table.n_true),
        surface_um=spread(surface, true_at, table.n_true),
    )
    pred = NucleusTable(
        label=pred_names[1:],
        place_um=centroids_um(pred_labels, table.pred_labels, voxel_size),
        volume_um3=table.pred_sizes * voxel_size.volume_um3,
        contrast=contrast_of(pred_labels, table.n_pred),
        best_iou=table.best_pred_iou,
        partner=partners(true_names, pred_at, true_at, table.n_pred),
        score=pred_score,
        surface_um=spread(surface, pred_at, table.n_pred),
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
    return _count(assessments, len(edges) + 1, lambda table: contrast_bin(table.contrast, edges))


def count_by_depth(assessments: Sequence[Assessment], edges_um: Sequence[float]) -> BinCounts:
    """Count nuclei by the z of their centroid; `edges_um` are the inner edges."""
    edges = np.asarray(edges_um, dtype=np.float64)
    return _count(
        assessments,
        len(edges) + 1,
        lambda table: np.searchsorted(edges, table.place_um[:, 0], side="right"),
    )


def _count(
    assessments: Sequence[Assessment], bins: int, bin_of: Callable[[NucleusTable], Integers]
) -> BinCounts:
    def tabulate(tables: Sequence[NucleusTable]) -> tuple[Floats, Floats]:
        placed = [(bin_of(table), table.matched) for table in tables]
        totals = [np.bincount(b[b >= 0], minlength=bins) for b, _ in placed]
        hits = [np.bincount(b[(b >= 0) & matched], minlength=bins) for b, matched in placed]
        return np.array(totals, dtype=np.float64), np.array(hits, dtype=np.float64)

    return BinCounts(*tabulate([a.true for a in assessments]), *tabulate([a.pred for a in assessments]))


def score_bins(counts: BinCounts, weights: Floats | None) -> list[BinScore]:
    """Turn counts into recall and precision with intervals by bootstrap weights (replicates, volumes).

    Without weights, for a single unit, the intervals are Wilson's over nuclei.
    """

    def share(part: Floats, whole: Floats) -> tuple[int, float, tuple[float, float]]:
        n, value = whole.sum(), ratio(part.sum(), whole.sum())
        if weights is None:
            return int(n), float(value), wilson_interval(float(part.sum()), float(n))
        low, high = percentile_interval(ratio(weights @ part, weights @ whole))
        return int(n), float(value), (float(low), float(high))

    return [
        BinScore(
            *share(counts.found[:, index], counts.true[:, index]),
            *share(counts.right[:, index], counts.pred[:, index]),
        )
        for index in range(counts.true.shape[1])
    ]


def recall_at_precision(
    assessments: Sequence[Assessment],
    target: float,
    *,
    edges: Sequence[float] | None = None,
) -> tuple[float, float] | None:
    """Give recall and cut if only predictions from a score on are kept, the lowest with that precision.

    The precision is pooled over the volumes; the recall is that of the faintest bin of contrast, given its
    inner edges, else of all true nuclei. None if a prediction has no score, no score reaches the precision,
    or there is nothing to find.
    """
    once = np.ones((1, len(assessments)))
    found = resampled_recall_at_precision(assessments, target, once, edges=edges)
    if found is None or np.isnan(found[0][0]):
        return None
    return float(found[0][0]), float(found[1][0])


def resampled_recall_at_precision(
    assessments: Sequence[Assessment],
    target: float,
    weights: Floats,
    *,
    edges: Sequence[float] | None = None,
) -> tuple[Floats, Floats] | None:
    """Give the same for volumes resampled by weights (replicates, volumes), the cut chosen anew in each.

    Recall and cut, (replicates,), are nan where no score reaches the precision or there is nothing to find. A
    score of a volume that was not drawn may be the cut, which leaves the recall as it is. None if a
    prediction has no score, or there is none.
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
        faintest = np.concatenate([contrast_bin(a.true.contrast, edges) for a in assessments]) == 0
        true_score, volume_of_true = true_score[faintest], volume_of_true[faintest]
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
class Summary:
    """Scores of one method over some volumes.

    Attributes
    ----------
    pooled
        Scores of the summed counts.
    intervals
        95 % interval of each scalar of `pooled` that is no count, by name; empty if there is only one unit.
    units
        What was resampled.
    volume_mean
        Mean over volumes of each scalar that is no count, undefined ones left out.
    contrast_edges, contrast, contrast_counts
        Inner edges, scores and counts of the contrast bins, faintest first; None without images.
    depth_edges_um, depth
        Inner edges of the z bins and their scores, nearest to the first plane first.
    recall_at_precision
        Per target precision: recall of the faintest bin and of all nuclei, each with its interval, and the
        score to cut at; None where the model gives no scores, or no score reaches the precision.
    centre_um, surface_um
        Mean distance of the centres and of the surfaces of matched nuclei; nan where there are none.
    """

    pooled: Metrics
    intervals: dict[str, tuple[float, float]]
    units: Units
    volume_mean: dict[str, float]
    contrast_edges: tuple[float, ...] | None
    contrast: list[BinScore] | None
    contrast_counts: BinCounts | None
    depth_edges_um: tuple[float, ...]
    depth: list[BinScore]
    recall_at_precision: dict[str, dict[str, Any] | None]
    centre_um: float
    surface_um: float

    @property
    def recall_faint(self) -> float:
        """Recall of the faintest bin; nan without images."""
        return self.contrast[0].recall if self.contrast else float("nan")

    @property
    def recall_bright(self) -> float:
        """Recall of the brightest bin; nan without images."""
        return self.contrast[-1].recall if self.contrast else float("nan")

    def as_json(self) -> dict[str, Any]:
        """Give the summary in the shape of metrics.json."""
        return {
            **self.pooled.as_json(),
            "recall_by_contrast": bins_as_json(self.contrast, self.contrast_edges),
            "recall_faint": number_or_none(self.recall_faint),
            "recall_bright": number_or_none(self.recall_bright),
            "recall_at_precision": self.recall_at_precision,
            "recall_by_depth_um": bins_as_json(self.depth, self.depth_edges_um),
            "centre_distance_um": number_or_none(self.centre_um),
            "surface_distance_um": number_or_none(self.surface_um),
            "intervals": {name: interval_as_json(bounds) for name, bounds in self.intervals.items()},
            "intervals_over": self.units.words if self.intervals else None,
            "volume_mean": {name: number_or_none(value) for name, value in self.volume_mean.items()},
        }


def summarise(
    assessments: Sequence[Assessment],
    embryos: Sequence[str],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    contrast_edges: Sequence[float] | None = None,
    replicates: int = 1000,
    over: Literal["auto", "embryo", "time"] = "auto",
    rng: np.random.Generator,
) -> Summary:
    """Pool assessed volumes and resample them.

    Parameters
    ----------
    assessments, embryos
        One per volume; volumes of one embryo in the order of time.
    contrast_edges
        Inner edges of the contrast bins; None where contrasts were not measured.
    replicates, over
        Bootstrap replicates (0 for no intervals), and of what; see `resampling_units`.
    """
    tallies = stack_tallies([assessment.tally for assessment in assessments])
    pooled = score(tallies.total(), thresholds)
    each = score(tallies, thresholds).by_name()
    units = resampling_units(embryos, over)
    weights = None
    intervals = {}
    if replicates and units.count > 1:
        weights = bootstrap_weights(units, replicates, rng)
        for name, samples in score(tallies.total(weights), thresholds).by_name().items():
            if name not in COUNTS:
                low, high = percentile_interval(samples)
                intervals[name] = (float(low), float(high))
    counts = None if contrast_edges is None else count_by_contrast(assessments, contrast_edges)
    depth_edges = _depth_edges(assessments)
    return Summary(
        pooled=pooled,
        intervals=intervals,
        units=units,
        volume_mean={name: _mean(values) for name, values in each.items() if name not in COUNTS},
        contrast_edges=None if contrast_edges is None else tuple(float(edge) for edge in contrast_edges),
        contrast=None if counts is None else score_bins(counts, weights),
        contrast_counts=counts,
        depth_edges_um=depth_edges,
        depth=score_bins(count_by_depth(assessments, depth_edges), weights),
        recall_at_precision={
            f"{target:.2f}": _recall_at(assessments, target, contrast_edges, weights)
            for target in TARGET_PRECISIONS
        },
        centre_um=_mean(np.concatenate([assessment.centre_distance_um for assessment in assessments])),
        surface_um=_mean(np.concatenate([assessment.true.surface_um for assessment in assessments])),
    )


def by_embryo(
    assessments: Sequence[Assessment], embryos: Sequence[str], thresholds: Sequence[float]
) -> dict[str, Metrics]:
    """Pool the volumes of each embryo."""
    return {
        name: _pool([a for a, embryo in zip(assessments, embryos, strict=True) if embryo == name], thresholds)
        for name in dict.fromkeys(embryos)
    }


def by_stage(assessments: Sequence[Assessment], thresholds: Sequence[float]) -> dict[str, Metrics]:
    """Pool volumes of about as many nuclei; the names tell how many, such as ``8-31``."""
    pools = {}
    for first, after in zip(STAGES, (*STAGES[1:], None), strict=True):
        members = [
            a for a in assessments if a.tally.n_true >= first and (after is None or a.tally.n_true < after)
        ]
        if members:
            pools[f"{first}-{after - 1}" if after else f"{first}+"] = _pool(members, thresholds)
    return pools


def bins_as_json(bins: Sequence[BinScore] | None, edges: Sequence[float] | None) -> list[dict[str, Any]]:
    """Give bins with their bounds (None where open) as plain data; empty if there are none."""
    if bins is None or edges is None:
        return []
    bounds = [None, *edges, None]
    return [
        {
            "from": bounds[index],
            "to": bounds[index + 1],
            "n": scored.n,
            "recall": number_or_none(scored.recall),
            "interval": interval_as_json(scored.recall_interval),
            "n_pred": scored.n_pred,
            "precision": number_or_none(scored.precision),
            "precision_interval": interval_as_json(scored.precision_interval),
        }
        for index, scored in enumerate(bins)
    ]


def interval_as_json(bounds: tuple[float, float]) -> list[float] | None:
    """Give an interval as a list of two, or None where it is undefined."""
    return None if np.isnan(bounds).any() else [float(bounds[0]), float(bounds[1])]


def _pool(assessments: Sequence[Assessment], thresholds: Sequence[float]) -> Metrics:
    return score(stack_tallies([assessment.tally for assessment in assessments]).total(), thresholds)


def _depth_edges(assessments: Sequence[Assessment]) -> tuple[float, ...]:
    """Cut the depths of the true nuclei into bins of equal width."""
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
) -> dict[str, Any] | None:
    everywhere = recall_at_precision(assessments, target)
    if everywhere is None:
        return None
    faint = None if edges is None else recall_at_precision(assessments, target, edges=edges)

    def interval(edges: Sequence[float] | None) -> list[float] | None:
        if weights is None:
            return None
        drawn = resampled_recall_at_precision(assessments, target, weights, edges=edges)
        assert drawn is not None  # the scores are there, or there would be no recall
        low, high = percentile_interval(drawn[0])
        return interval_as_json((float(low), float(high)))

    return {
        "recall_faint": faint[0] if faint else None,
        "recall_faint_interval": interval(edges) if faint else None,
        "recall": everywhere[0],
        "recall_interval": interval(None),
        "score": everywhere[1],
    }


def _mean(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
