"""What kinds of errors segmentations make, frame by frame, and what mending each kind would be worth.

    python benchmarks/errors.py --truth DIR --pred DIR --images DIR [--least N] [--set NAME=VALUE] [--json]

A true nucleus whose best IoU is above .5 is found. Else it is *merged* (one prediction covers most of it and
of another), *split* (several predictions lie in it for the most part and cover half of it), *off* (a
prediction overlaps it by an IoU of .2 or more), or *missed*: *deep* in the third of its frame, along z, at
whose end nuclei are fainter, else *faint* (of the faintest fifth of all), else *elsewhere*. A prediction that
overlaps no true nucleus by .2 is *false*. A kind is mended as an oracle would: what is merged is cut and what
is split joined where the truth says so, what is off or found gets the true outline, what is missed is found
(above .75 as often as those that are found), what is false is dropped. --least N counts frames of so many
true nuclei or more.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nuclei3d.scoring.contrast import contrast_edges, nucleus_contrast
from nuclei3d.scoring.matching import OverlapTable, overlap_table
from nuclei3d.stages.pairing import pair_volumes
from shared import markdown, new_parser, params_of

KINDS = ("merged", "split", "off", "missed deep", "missed faint", "missed elsewhere", "false")
_TOUCH = 0.2


@dataclass(frozen=True)
class Errors:
    """One frame: counts of its errors by kind, and (hits at .5, hits at .75, predictions) mended by kind.

    `faint` counts those of the faintest fifth. The kind "" stands for nothing mended.
    """

    n_true: int
    counts: Mapping[str, int]
    faint: Mapping[str, int]
    mended: Mapping[str, NDArray[np.float64]]


def sort_errors(table: OverlapTable, deep: NDArray[np.bool_], faint: NDArray[np.bool_]) -> Errors:
    """Sort the errors of a frame; `deep` and `faint` are by the positions of the table's true nuclei."""
    rows, columns, overlaps = table.rows, table.columns, table.overlaps
    true_iou, pred_iou = table.best_true_iou, table.best_pred_iou
    lost = true_iou <= 0.5
    covering = table.true_cover > 0.5
    held = np.bincount(columns[covering], minlength=table.n_pred)
    inside = (table.pred_cover > 0.5) & (table.true_cover > 0.05)
    pieces = np.bincount(rows[inside], minlength=table.n_true)
    pieced = np.bincount(rows[inside], overlaps[inside], minlength=table.n_true) / table.true_sizes
    kind = np.full(table.n_true, "missed elsewhere", object)
    kind[faint] = "missed faint"
    kind[deep] = "missed deep"
    kind[true_iou >= _TOUCH] = "off"
    kind[(pieces > 1) & (pieced > 0.5)] = "split"
    kind[rows[covering & (held[columns] > 1)]] = "merged"
    kind[~lost] = ""
    false = pred_iou < _TOUCH
    counts = Counter(kind[lost]) | {"false": int(false.sum())}

    def hits(true_ious: NDArray[np.float64], predictions: float) -> NDArray[np.float64]:
        return np.array([(true_ious > 0.5).sum(), (true_ious > 0.75).sum(), predictions], float)

    plain = hits(true_iou, table.n_pred)
    mended = {"": plain, "false": plain - (0, 0, counts["false"])}
    often = plain[1] / max(plain[0], 1)
    for each in KINDS[3:6]:
        mended[each] = plain + np.array([1, often, 1]) * counts.get(each, 0)
    mended["off"] = hits(np.where((kind == "off") | ~lost, 1.0, true_iou), table.n_pred)
    # joined pieces: what they share with the nucleus, over the union of all
    joined, parts = true_iou.copy(), 0
    for row in np.flatnonzero(kind == "split"):
        own = inside & (rows == row)
        shared, sizes = overlaps[own].sum(), table.pred_sizes[columns[own]].sum()
        joined[row] = shared / (table.true_sizes[row] + sizes - shared)
        parts += own.sum() - 1
    mended["split"] = hits(joined, table.n_pred - parts)
    # a cut nucleus takes its share of what lies on none of those that were merged
    cut, more = true_iou.copy(), 0
    for column in np.flatnonzero(held > 1):
        own = covering & (columns == column)
        shared = overlaps[own]
        rest = (table.pred_sizes[column] - shared.sum()) * shared / shared.sum()
        cut[rows[own]] = np.maximum(cut[rows[own]], shared / (table.true_sizes[rows[own]] + rest))
        more += own.sum() - 1
    mended["merged"] = hits(cut, table.n_pred + more)
    return Errors(table.n_true, counts, Counter(kind[lost & faint]), mended)


def deep_third(
    truth: NDArray[np.uint32], table: OverlapTable, contrast: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Say which true nuclei lie in the third of their frame, along z, at whose end they are fainter."""
    planes = np.broadcast_to(np.arange(len(truth))[:, None, None], truth.shape)
    z = np.bincount(truth.ravel(), planes.ravel())[table.true_labels] / table.true_sizes
    known = np.isfinite(contrast)
    if np.cov(z[known], np.log(np.maximum(contrast[known], 0.1)))[0, 1] > 0:
        z = -z
    return np.asarray(z > z.min() + 2 / 3 * np.ptp(z))


def average_precisions(errors: Sequence[Errors], kind: str = "") -> tuple[float, float]:
    """Give AP .5 and AP .75 with a kind mended, counts pooled over frames."""
    tp, tp75, predictions = np.sum([each.mended[kind] for each in errors], axis=0)
    union = sum(each.n_true for each in errors) + predictions
    return tp / (union - tp), tp75 / (union - tp75)


def main() -> None:
    """Read the command line, sort the errors of every frame, print the tables."""
    parser = new_parser(__doc__, whole=True, params=Path(__file__).with_name("released_model.yaml"))
    for name in ("truth", "pred", "images"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--least", type=int, default=0, help="true nuclei of the frames that count")
    args = parser.parse_args()
    params = params_of(args)
    counted = params.evaluate.model_copy(update={"min_true_volume_um3": params.prepare.min_volume_um3})
    params = params.model_copy(update={"evaluate": counted})
    seen, contrasts = {}, []
    for pair in pair_volumes(params, args.truth, args.pred, args.images, {}).pairs:
        truth, _ = pair.read_truth()
        image = pair.read_image()
        assert image is not None
        table = overlap_table(truth, pair.read_prediction(pair.pred, truth.shape))
        contrast = nucleus_contrast(image, truth, pair.voxel_size)[table.true_labels]
        contrasts.append(contrast)
        if table.n_true >= args.least:
            seen[pair.name] = table, deep_third(truth, table, contrast), contrast
    faintest = contrast_edges(np.concatenate(contrasts))[0]
    errors = {name: sort_errors(table, deep, c < faintest) for name, (table, deep, c) in seen.items()}
    every = list(errors.values())
    frames = {
        name: [str(each.n_true), *(str(each.counts.get(kind, 0)) for kind in KINDS)]
        for name, each in errors.items()
    }
    ap, ap75 = average_precisions(every)
    gains = {
        kind: [
            str(sum(each.counts.get(kind, 0) for each in every)),
            str(sum(each.faint.get(kind, 0) for each in every)),
            *(f"{gain:+.3f}" for gain in np.subtract(average_precisions(every, kind), (ap, ap75))),
        ]
        for kind in KINDS
    }
    if args.json:
        print(json.dumps({"ap_0.50": ap, "ap_0.75": ap75, "frames": frames, "mended": gains}))
        return
    print(markdown(["nuclei", *KINDS], frames, "frame"))
    print(f"\nAP .5 {ap:.3f}, AP .75 {ap75:.3f}; mended:\n")
    print(markdown(["number", "of the faintest fifth", "AP .5", "AP .75"], gains, "kind"))


if __name__ == "__main__":
    main()
