"""Every metric of the evaluation, from additive counts.

A volume is reduced to a `Tally`: sums that add up over volumes. Pooled metrics are the scores of a summed
tally, bootstrap replicates the scores of a weighted sum, so there is one formula for each metric.

Definitions
-----------
ap, f1, precision, recall, pq
    Optimal one-to-one matching at an IoU threshold: AP = TP/(TP+FP+FN), F1 = 2TP/(2TP+FP+FN),
    PQ = sum of matched IoUs / (TP + FP/2 + FN/2) (Kirillov et al. 2019). pq, precision and recall are at .5.
ap_mean
    Mean of the AP at the thresholds from .5 to .9.
seg, det
    Cell Tracking Challenge (Ulman et al. 2017; Matula et al. 2015): a prediction finds a true nucleus if it
    covers more than half of it. SEG is the mean over true nuclei of the IoU with that prediction (0 if there
    is none); DET = 1 - min(10 misses + 1 false + 5 splits, 10 n)/(10 n), a split being each further nucleus
    that one prediction finds.
mucov, true_cover
    Mean over predicted nuclei, and mean over true nuclei, of the best IoU (MUCov of Tokuoka et al. 2020).
foreground_iou
    IoU of the two foregrounds, voxel by voxel.
splits, merges
    Splits: true nuclei inside which two or more predictions lie with more than half of their own voxels.
    Merges: predictions inside which two or more true nuclei lie with more than half of theirs.

Undefined values (nothing to find and nothing found) are nan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import from_json

from nuclei3d.errors import InputError, first_problem
from nuclei3d.scoring.matching import Floats, OverlapTable, match

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)

#: IoU at which a nucleus counts as found, for precision, recall, PQ and the lists of missed and false nuclei.
MATCH_IOU = 0.5


@dataclass(frozen=True)
class Tally:
    """Additive counts of one volume, of a sum of volumes, or (with leading axes) of many of either.

    `tp` and `matched_iou` have the thresholds as last axis; all others have only the leading axes.
    `tp_half` and `matched_iou_half` are those at `MATCH_IOU`, whatever the thresholds.
    """

    n_true: Floats
    n_pred: Floats
    tp: Floats
    matched_iou: Floats
    tp_half: Floats
    matched_iou_half: Floats
    majority_iou: Floats
    missed: Floats
    false: Floats
    double: Floats
    best_true_iou: Floats
    best_pred_iou: Floats
    foreground_intersection: Floats
    foreground_union: Floats
    splits: Floats
    merges: Floats

    def total(self, weights: Floats | None = None) -> Tally:
        """Sum over the first axis, or, by weights (replicates, volumes), give the sum of each replicate."""
        if weights is None:
            return Tally(*(getattr(self, field.name).sum(axis=0) for field in fields(self)))
        return Tally(*(np.tensordot(weights, getattr(self, field.name), axes=1) for field in fields(self)))

    def as_json(self) -> dict[str, Any]:
        """Give the counts as plain numbers and lists."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    @property
    def ap_half(self) -> Floats:
        """AP at `MATCH_IOU`, whatever the thresholds."""
        return ratio(self.tp_half, self.n_true + self.n_pred - self.tp_half)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Tally:
        """Read what `as_json` wrote."""
        return cls(*(np.asarray(values[field.name], dtype=np.float64) for field in fields(cls)))


@dataclass(frozen=True)
class Metrics:
    """Scores of one tally; with leading axes, of many. See the module for the definitions.

    `ap` and `f1` have the thresholds as last axis.
    """

    thresholds: tuple[float, ...]
    ap: Floats
    f1: Floats
    pq: Floats
    seg: Floats
    det: Floats
    mucov: Floats
    true_cover: Floats
    foreground_iou: Floats
    precision: Floats
    recall: Floats
    splits: Floats
    merges: Floats
    n_true: Floats
    n_pred: Floats

    def ap_at(self, threshold: float) -> float:
        """AP at one of the thresholds, as a plain number."""
        for position, known in enumerate(self.thresholds):
            if math.isclose(known, threshold, abs_tol=1e-9):
                return float(self.ap[..., position])
        raise KeyError(f"threshold {threshold} is not among {self.thresholds}")

    @property
    def ap_mean(self) -> Floats:
        """Mean AP over the thresholds from .5 to .9; nan where there are none."""
        inside = [0.5 <= threshold <= 0.9 for threshold in self.thresholds]
        return self.ap[..., inside].mean(axis=-1) if any(inside) else np.full(self.ap.shape[:-1], np.nan)

    def by_name(self) -> dict[str, Floats]:
        """Give each scalar metric under its name; AP and F1 as ``ap_0.50``, ``f1_0.50`` and so on."""
        named: dict[str, Floats] = {}
        for name, values in (("ap", self.ap), ("f1", self.f1)):
            for position, threshold in enumerate(self.thresholds):
                named[f"{name}_{threshold:.2f}"] = values[..., position]
        return named | {name: getattr(self, name) for name in _SCALARS}

    def as_json(self) -> dict[str, Any]:
        """Give a single set of scores as metrics.json wants it: counts as integers, undefined as None."""
        tree: dict[str, Any] = {
            name: {f"{t:.2f}": number_or_none(v) for t, v in zip(self.thresholds, values, strict=True)}
            for name, values in (("ap", self.ap), ("f1", self.f1))
        }
        for name in _SCALARS:
            value = number_or_none(getattr(self, name))
            tree[name] = int(value) if name in COUNTS and value is not None else value
        return tree


# The comparison refuses NaN, too.
Count = Annotated[float, Field(ge=0, le=2**53)]
Score = Annotated[float, Field(ge=0, le=1)] | None


class _VolumeScores(BaseModel):
    """What a comparison needs of one volume in metrics.json; the rest may be anything."""

    embryo: str
    truth_digest: str
    frame_digest: str = ""
    n_true: Annotated[int, Field(ge=0)]
    counts: dict[str, Count | list[Count]]
    contrast_counts: dict[str, list[Count]] | None = None

    @model_validator(mode="after")
    def _check_counts(self) -> _VolumeScores:
        for field in fields(Tally):
            value = self.counts.get(field.name)
            if value is None or isinstance(value, list) != (field.name in ("tp", "matched_iou")):
                raise ValueError(f"counts.{field.name} is missing or of another kind")
        return self


class _Scores(BaseModel):
    """What a comparison needs of metrics.json."""

    ap: Annotated[dict[Annotated[str, Field(pattern=r"^0\.[0-9]+$")], Score], Field(min_length=1)]
    f1: dict[str, Score]
    recall_faint: Score = None
    volumes: Annotated[dict[str, _VolumeScores], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_thresholds(self) -> _Scores:
        for name, volume in self.volumes.items():
            for counts in ("tp", "matched_iou"):
                values = volume.counts[counts]
                if not isinstance(values, list) or len(values) != len(self.ap):
                    raise ValueError(f"volumes.{name}.counts.{counts} has not one count per threshold of ap")
        return self


def parse_metrics(content: bytes, where: object) -> dict[str, Any]:
    """Give the content of a metrics.json; an InputError names the file, `where`, and what is wrong in it."""
    try:
        tree = from_json(content)
        _Scores.model_validate(tree)
    except ValidationError as error:
        field, _, fault = first_problem(error)
        reason = f"{field}: {fault}" if field else fault
    except ValueError:
        reason = "it is not valid JSON"
    else:
        return dict(tree)
    raise InputError(f"{where} is no metrics.json of nuclei3d evaluate of this version: {reason}")


COUNTS = ("splits", "merges", "n_true", "n_pred")
_SCALARS = (
    "ap_mean",
    "pq",
    "seg",
    "det",
    "mucov",
    "true_cover",
    "foreground_iou",
    "precision",
    "recall",
    *COUNTS,
)


def tally_of(table: OverlapTable, thresholds: Sequence[float] = THRESHOLDS) -> Tally:
    """Reduce the table of overlaps of one volume to additive counts."""
    matchings = [match(table, threshold) for threshold in (*thresholds, MATCH_IOU)]
    tp = np.array([matching.tp for matching in matchings], dtype=np.float64)
    matched_iou = np.array([matching.ious.sum() for matching in matchings], dtype=np.float64)
    majority = table.true_cover > 0.5
    shared = table.overlaps.sum()
    found_by = np.bincount(table.columns[majority], minlength=table.n_pred)
    parts_of = np.bincount(table.rows[table.pred_cover > 0.5], minlength=table.n_true)
    return Tally(
        n_true=_number(table.n_true),
        n_pred=_number(table.n_pred),
        tp=tp[:-1],
        matched_iou=matched_iou[:-1],
        tp_half=tp[-1],
        matched_iou_half=matched_iou[-1],
        majority_iou=_number(table.ious[majority].sum()),
        missed=_number(table.n_true - np.count_nonzero(majority)),
        false=_number(np.count_nonzero(found_by == 0)),
        double=_number(np.maximum(found_by - 1, 0).sum()),
        best_true_iou=_number(table.best_true_iou.sum()),
        best_pred_iou=_number(table.best_pred_iou.sum()),
        foreground_intersection=_number(shared),
        foreground_union=_number(table.true_sizes.sum() + table.pred_sizes.sum() - shared),
        splits=_number(np.count_nonzero(parts_of > 1)),
        merges=_number(np.count_nonzero(found_by > 1)),
    )


def stack_tallies(tallies: Sequence[Tally]) -> Tally:
    """Put the tallies of volumes along a first axis, ready for `Tally.total`."""
    return Tally(*(np.stack([getattr(tally, field.name) for tally in tallies]) for field in fields(Tally)))


def score(tally: Tally, thresholds: Sequence[float] = THRESHOLDS) -> Metrics:
    """Turn counts into metrics; leading axes are kept."""
    n_true, n_pred = tally.n_true, tally.n_pred
    both = n_true + n_pred
    penalty = 10 * tally.missed + tally.false + 5 * tally.double
    return Metrics(
        thresholds=tuple(thresholds),
        ap=ratio(tally.tp, both[..., None] - tally.tp),
        f1=ratio(2 * tally.tp, np.broadcast_to(both[..., None], tally.tp.shape)),
        pq=ratio(2 * tally.matched_iou_half, both),
        seg=ratio(tally.majority_iou, n_true),
        det=1 - ratio(np.minimum(penalty, 10 * n_true), 10 * n_true),
        # Nuclei there are and none predicted: the mean over no predictions is 0, not undefined.
        mucov=np.where((n_pred == 0) & (n_true > 0), 0.0, ratio(tally.best_pred_iou, n_pred)),
        true_cover=ratio(tally.best_true_iou, n_true),
        foreground_iou=ratio(tally.foreground_intersection, tally.foreground_union),
        precision=ratio(tally.tp_half, n_pred),
        recall=ratio(tally.tp_half, n_true),
        splits=tally.splits,
        merges=tally.merges,
        n_true=n_true,
        n_pred=n_pred,
    )


def number_or_none(value: Any) -> float | None:
    """Turn a numpy scalar into a float, and nan, which JSON does not have, into None."""
    number = float(value)
    return None if math.isnan(number) else number


def _number(value: Any) -> Floats:
    return np.asarray(value, dtype=np.float64)


def ratio(part: Floats, whole: Floats) -> Floats:
    """Divide; nan where there is nothing to divide by."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
