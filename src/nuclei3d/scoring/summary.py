"""From assessed volumes to what a report says: pooled scores, intervals, and recall where it is hard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nuclei3d.scoring.assessment import (
    Assessment,
    BinCounts,
    BinScore,
    count_by_contrast,
    count_by_depth,
    recall_at_precision,
    resampled_recall_at_precision,
    score_bins,
)
from nuclei3d.scoring.bootstrap import Units, bootstrap_weights, percentile_interval, resampling_units
from nuclei3d.scoring.matching import Floats
from nuclei3d.scoring.metrics import COUNTS, THRESHOLDS, Metrics, number_or_none, score, stack_tallies

#: Precisions at which the recall is given where the model gives scores.
TARGET_PRECISIONS = (0.9, 0.95)
#: Stages of an embryo by its number of true nuclei: first number of each.
STAGES = (0, 8, 32, 128, 512)
_DEPTH_BINS = 5


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
