"""The stage that says whether one evaluation is really better than another on the same volumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.outputs import whole_file
from nuclei3d.scoring.bootstrap import PairedDifference, Statistics, compare_paired
from nuclei3d.scoring.matching import Floats
from nuclei3d.scoring.metrics import COUNTS, Tally, number_or_none, parse_metrics, ratio, score, stack_tallies
from nuclei3d.stages.assess import START_MODEL

_NAMES = {
    "pq": "PQ",
    "seg": "SEG",
    "det": "DET",
    "mucov": "MUCov",
    "true_cover": "mean best IoU of truths",
    "foreground_iou": "foreground IoU",
    "recall_faint": "recall, faintest bin",
    "recall_bright": "recall, brightest bin",
}
_NUMBERS = ("a", "b", "difference", "low", "high")


@dataclass(frozen=True)
class CompareResult:
    """Paired differences over the volumes that both evaluations hold, by metric."""

    a: str
    b: str
    volumes: int
    resampled: str
    verdict: str
    notes: tuple[str, ...]
    differences: dict[str, PairedDifference]
    start_models: dict[str, dict[str, Any]]
    """What A and B started from, as far as their evaluations have it as a baseline."""

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        rows = [
            {
                "metric": metric,
                **{name: number_or_none(getattr(pair, name)) for name in _NUMBERS},
                "real": pair.real,
            }
            for metric, pair in self.differences.items()
        ]
        return {**vars(self), "notes": list(self.notes), "differences": rows}


def compare(params: Params, a: Path, b: Path, out: Path | None = None) -> CompareResult:
    """Compare two evaluations, each a metrics.json or its folder, volume by volume.

    Both are pooled over the volumes that they share; whole embryos (or blocks of time, see
    `nuclei3d.scoring.bootstrap`) are drawn with replacement, the same for both, so what varies between
    embryos cancels out and small differences become visible. The result goes to `out`, a ``.json`` file or a
    folder to hold compare.json.

    Raises
    ------
    InputError
        If a file is no metrics.json, the two share no volume, or a shared volume has another truth.
    """
    a, b = (path / "metrics.json" if path.is_dir() else path for path in (a, b))
    first, second = _read(a), _read(b)
    names = [name for name in first["volumes"] if name in second["volumes"]]
    if not names:
        raise InputError(f"{a} and {b} share no volume; evaluate both on the same embryos")
    for name in names:
        if first["volumes"][name]["truth_digest"] != second["volumes"][name]["truth_digest"]:
            raise InputError(
                f"volume {name} has other true labels in {a} than in {b}; evaluate both against the same "
                "truth"
            )
    notes = []
    left_out = len(first["volumes"].keys() ^ second["volumes"].keys())
    if left_out:
        notes.append(f"{left_out} volumes are in one of the two only and are left out")
    edges = [evaluation.get("contrast_edges") for evaluation in (first, second)]
    same_bins = None in edges or edges[0] == edges[1]
    thresholds = [threshold for threshold in first["ap"] if threshold in second["ap"]]
    compared = compare_paired(
        _statistics(first, names, thresholds, same_bins),
        _statistics(second, names, thresholds, same_bins),
        [first["volumes"][name]["embryo"] for name in names],
        replicates=params.evaluate.bootstrap,
        over=params.evaluate.resample,
        rng=np.random.default_rng(params.seed),
    )
    if not compared.resampled:
        notes.append("there is nothing to resample, so no interval and no verdict can be given")
    elif compared.units.few:
        notes.append(f"only {compared.units.words} could be resampled: the intervals are rough")
    if not same_bins:
        notes.append("the contrast bins differ, so recall by contrast is not compared")
    result = CompareResult(
        a=str(a),
        b=str(b),
        volumes=len(names),
        resampled=compared.units.words if compared.resampled else "nothing",
        verdict=_verdict(compared.differences),
        notes=tuple(notes),
        differences=compared.differences,
        start_models={
            side: {"name": name, **{key: scores.get(key) for key in ("ap", "seg", "pq", "behind_model")}}
            for side, evaluation in (("a", first), ("b", second))
            for name, scores in evaluation.get("baselines", {}).items()
            if name.startswith(START_MODEL) and not left_out
        },
    )
    if out is not None:
        path = out if out.suffix == ".json" else out / "compare.json"
        with whole_file(path) as partial:
            partial.write_text(json.dumps(result.as_json(), indent=2) + "\n", encoding="utf-8")
    _say(result)
    return result


def _read(file: Path) -> dict[str, Any]:
    try:
        return parse_metrics(file.read_bytes(), file)
    except OSError as error:
        raise InputError(
            f"cannot read {file}: {error.strerror}; give the metrics.json or folder of nuclei3d evaluate"
        ) from None


def _statistics(
    evaluation: Mapping[str, Any], names: Sequence[str], thresholds: Sequence[str], bins: bool
) -> Statistics:
    """Pool each metric over the volumes, and with `bins` the recall of the outer bins of contrast."""
    volumes = [evaluation["volumes"][name] for name in names]
    tallies = stack_tallies([Tally.from_json(volume["counts"]) for volume in volumes])
    own = [float(threshold) for threshold in evaluation["ap"]]
    counts = [volume.get("contrast_counts") for volume in volumes]

    def pool(weights: Floats | None) -> dict[str, Floats]:
        values = {
            name: value
            for name, value in score(tallies.total(weights), own).by_name().items()
            if name not in COUNTS and (name[:3] not in ("ap_", "f1_") or name[3:] in thresholds)
        }
        if bins and all(counts):
            true, found = (np.array([count[part] for count in counts]) for part in ("true", "found"))
            once = np.ones(len(names)) if weights is None else weights
            for name, place in (("recall_faint", 0), ("recall_bright", -1)):
                values[name] = ratio(once @ found[:, place], once @ true[:, place])
        return values

    return pool


def _verdict(differences: Mapping[str, PairedDifference]) -> str:
    """Say in one sentence what the comparison shows, AP at .5 first."""
    metric = "ap_0.50" if "ap_0.50" in differences else next(iter(differences))
    pair = differences[metric]
    if np.isnan([pair.difference, pair.low, pair.high]).any():
        return "no verdict is possible"
    numbers = f"{_name(metric)} {pair.difference:+.3f}, 95 % interval {pair.low:+.3f} to {pair.high:+.3f}"
    if not pair.real:
        return f"no real difference: {numbers}, which holds 0"
    return f"B is really {'better' if pair.difference > 0 else 'worse'} than A: {numbers}"


def _say(result: CompareResult) -> None:
    say(f"A: {result.a}")
    say(f"B: {result.b}")
    say(f"{result.volumes} volumes in common; resampled: {result.resampled}")
    say(f"{'':24}{'A':>8}{'B':>8}{'B - A':>9}   95 % interval")
    for metric, pair in result.differences.items():
        if metric[:3] in ("ap_", "f1_") and metric not in ("ap_0.50", "ap_0.75"):
            continue
        interval = "" if np.isnan([pair.low, pair.high]).any() else f"{pair.low:+.3f} to {pair.high:+.3f}"
        mark = "" if not pair.real else ("  B better" if pair.difference > 0 else "  A better")
        say(
            f"{_name(metric):24}{_number(pair.a):>8}{_number(pair.b):>8}{_number(pair.difference, '+'):>9}"
            f"   {interval}{mark}"
        )
    for side, start in result.start_models.items():
        words = f"{start['name']} of {side.upper()}: AP at .5 {start['ap']['0.50']:.3f}"
        if lead := start["behind_model"]:
            low, high = lead["interval"]
            words += (
                f"; {side.upper()} leads by {lead['ap_0.50']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
            )
        say(words)
    for note in result.notes:
        say(f"note: {note}")
    say(result.verdict)


def _name(metric: str) -> str:
    if metric[:3] in ("ap_", "f1_"):
        return f"{metric[:2].upper()} at {metric[3:].removeprefix('0')}"
    return _NAMES.get(metric, metric)


def _number(value: float, sign: str = "") -> str:
    return "-" if np.isnan(value) else f"{value:{sign}.3f}"
