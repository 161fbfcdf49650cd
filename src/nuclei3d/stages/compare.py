"""The stage that says whether one evaluation is really better than another on the same volumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.outputs import whole_file
from nuclei3d.scoring.bootstrap import bootstrap_weights, percentile_interval, resampling_units
from nuclei3d.scoring.metrics import COUNTS, Tally, number_or_none, score, stack_tallies

# Fewer units than this make an interval that should not be taken literally.
_FEW_UNITS = 6


@dataclass(frozen=True)
class Difference:
    """One metric of A and of B, and B minus A with its 95 % interval.

    `real` tells whether the interval leaves out 0; it is false, and the bounds are None, where there is
    nothing to resample.
    """

    metric: str
    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    real: bool


@dataclass(frozen=True)
class CompareResult:
    """Paired differences over the volumes that both evaluations hold."""

    a: str
    b: str
    volumes: int
    resampled: str
    verdict: str
    notes: tuple[str, ...]
    differences: tuple[Difference, ...]

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class _Evaluation:
    """What the comparison needs of a metrics.json."""

    path: Path
    thresholds: tuple[str, ...]
    edges: tuple[float, ...] | None
    volumes: Mapping[str, Any]


def compare(params: Params, a: Path, b: Path, out: Path | None = None) -> CompareResult:
    """Compare two evaluations volume by volume.

    Both are pooled over the volumes that they share; whole embryos (or blocks of time, see
    `nuclei3d.scoring.bootstrap`) are drawn with replacement, the same for both, so what varies between
    embryos cancels out and small differences become visible.

    Parameters
    ----------
    a, b
        metrics.json, or the folder of an evaluation.
    out
        A ``.json`` file, or a folder to hold compare.json; None writes nothing.

    Raises
    ------
    InputError
        If a file is no metrics.json, the two share no volume, or a shared volume has another truth.
    """
    first, second = _read(a), _read(b)
    names = [name for name in first.volumes if name in second.volumes]
    if not names:
        raise InputError(f"{first.path} and {second.path} share no volume; evaluate both on the same embryos")
    _check_same_truth(first, second, names)
    notes = []
    left_out = len(set(first.volumes) ^ set(second.volumes))
    if left_out:
        notes.append(f"{left_out} volumes are in one of the two only and are left out")
    units = resampling_units([first.volumes[name]["embryo"] for name in names], params.evaluate.resample)
    weights = None
    if units.count > 1 and params.evaluate.bootstrap:
        weights = bootstrap_weights(units, params.evaluate.bootstrap, np.random.default_rng(params.seed))
        if units.count < _FEW_UNITS:
            notes.append(f"only {units.words} could be resampled: the intervals are rough")
    else:
        notes.append("there is nothing to resample, so no interval and no verdict can be given")
    values = [_values(evaluation, names, _shared(first, second), weights) for evaluation in (first, second)]
    if first.edges is not None and second.edges is not None and first.edges != second.edges:
        notes.append("the contrast bins differ, so recall by contrast is not compared")
        for table in values:
            table.pop("recall_faint", None)
            table.pop("recall_bright", None)
    differences = tuple(
        _difference(metric, values[0][metric], values[1][metric])
        for metric in values[0]
        if metric in values[1]
    )
    result = CompareResult(
        a=str(first.path),
        b=str(second.path),
        volumes=len(names),
        resampled=units.words if weights is not None else "nothing",
        verdict=_verdict(differences),
        notes=tuple(notes),
        differences=differences,
    )
    if out is not None:
        path = out if out.suffix == ".json" else out / "compare.json"
        with whole_file(path) as partial:
            partial.write_text(json.dumps(result.as_json(), indent=2) + "\n", encoding="utf-8")
    _say(result)
    return result


def _read(path: Path) -> _Evaluation:
    file = path / "metrics.json" if path.is_dir() else path
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read {file}: {error.strerror}; give the metrics.json or folder of nuclei3d evaluate"
        ) from None
    except ValueError:
        raise InputError(
            f"{file} is not valid JSON; expected the metrics.json of nuclei3d evaluate"
        ) from None
    try:
        volumes = tree["volumes"]
        for volume in volumes.values():
            Tally.from_json(volume["counts"])
            _ = volume["embryo"], volume["truth_digest"]
        edges = tree.get("contrast_edges")
        return _Evaluation(file, tuple(tree["ap"]), None if edges is None else tuple(edges), volumes)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(
            f"{file} lacks the counts per volume; write it again with nuclei3d evaluate of this version"
        ) from None


def _check_same_truth(first: _Evaluation, second: _Evaluation, names: Sequence[str]) -> None:
    for name in names:
        if first.volumes[name]["truth_digest"] != second.volumes[name]["truth_digest"]:
            raise InputError(
                f"volume {name} has other true labels in {first.path} than in {second.path}; evaluate both "
                "against the same truth"
            )


def _shared(first: _Evaluation, second: _Evaluation) -> tuple[str, ...]:
    return tuple(threshold for threshold in first.thresholds if threshold in second.thresholds)


def _values(
    evaluation: _Evaluation,
    names: Sequence[str],
    thresholds: Sequence[str],
    weights: NDArray[np.float64] | None,
) -> dict[str, tuple[float, NDArray[np.float64] | None]]:
    """Give each metric pooled over the volumes, and its bootstrap replicates."""
    tallies = stack_tallies([Tally.from_json(evaluation.volumes[name]["counts"]) for name in names])
    own = tuple(float(threshold) for threshold in evaluation.thresholds)
    pooled = score(tallies.total(), own).by_name()
    drawn = None if weights is None else score(tallies.total(weights), own).by_name()
    wanted = [
        name
        for name in pooled
        if name not in COUNTS and (name[:3] not in ("ap_", "f1_") or name[3:] in thresholds)
    ]
    values = {name: (float(pooled[name]), None if drawn is None else drawn[name]) for name in wanted}
    counts = [evaluation.volumes[name].get("contrast_counts") for name in names]
    if all(counts):
        true = np.array([count["true"] for count in counts], dtype=np.float64)
        found = np.array([count["found"] for count in counts], dtype=np.float64)
        for name, bin_index in (("recall_faint", 0), ("recall_bright", -1)):
            values[name] = _recall(found[:, bin_index], true[:, bin_index], weights)
    return values


def _recall(
    found: NDArray[np.float64], true: NDArray[np.float64], weights: NDArray[np.float64] | None
) -> tuple[float, NDArray[np.float64] | None]:
    pooled = float(found.sum() / true.sum()) if true.sum() else float("nan")
    if weights is None:
        return pooled, None
    total = weights @ true
    return pooled, np.divide(weights @ found, total, out=np.full(len(total), np.nan), where=total > 0)


def _difference(
    metric: str,
    a: tuple[float, NDArray[np.float64] | None],
    b: tuple[float, NDArray[np.float64] | None],
) -> Difference:
    difference = b[0] - a[0]
    low = high = float("nan")
    if a[1] is not None and b[1] is not None:
        bounds = percentile_interval(b[1] - a[1])
        low, high = float(bounds[0]), float(bounds[1])
    return Difference(
        metric=metric,
        a=number_or_none(a[0]),
        b=number_or_none(b[0]),
        difference=number_or_none(difference),
        low=number_or_none(low),
        high=number_or_none(high),
        real=low > 0 or high < 0,
    )


def _verdict(differences: Sequence[Difference]) -> str:
    """Say in one sentence what the comparison shows, AP at .5 first."""
    main = next((d for d in differences if d.metric == "ap_0.50"), differences[0])
    if main.difference is None or main.low is None or main.high is None:
        return "no verdict is possible"
    numbers = (
        f"{_name(main.metric)} {main.difference:+.3f}, 95 % interval {main.low:+.3f} to {main.high:+.3f}"
    )
    if not main.real:
        return f"no real difference: {numbers}, which holds 0"
    return f"B is really {'better' if main.difference > 0 else 'worse'} than A: {numbers}"


def _say(result: CompareResult) -> None:
    say(f"A: {result.a}")
    say(f"B: {result.b}")
    say(f"{result.volumes} volumes in common; resampled: {result.resampled}")
    say(f"{'':24}{'A':>8}{'B':>8}{'B - A':>9}   95 % interval")
    for d in result.differences:
        if d.metric.startswith("f1_") or (
            d.metric.startswith("ap_") and d.metric not in ("ap_0.50", "ap_0.75")
        ):
            continue
        interval = "" if d.low is None or d.high is None else f"{d.low:+.3f} to {d.high:+.3f}"
        mark = "" if not d.real else ("  B better" if (d.difference or 0) > 0 else "  A better")
        say(
            f"{_name(d.metric):24}{_number(d.a):>8}{_number(d.b):>8}{_number(d.difference, '+'):>9}"
            f"   {interval}{mark}"
        )
    for note in result.notes:
        say(f"note: {note}")
    say(result.verdict)


def _name(metric: str) -> str:
    if metric[:3] in ("ap_", "f1_"):
        return f"{metric[:2].upper()} at {metric[3:].removeprefix('0')}"
    names = {
        "pq": "PQ",
        "seg": "SEG",
        "det": "DET",
        "mucov": "MUCov",
        "true_cover": "mean best IoU of truths",
        "foreground_iou": "foreground IoU",
        "recall_faint": "recall, faintest bin",
        "recall_bright": "recall, brightest bin",
    }
    return names.get(metric, metric)


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"
