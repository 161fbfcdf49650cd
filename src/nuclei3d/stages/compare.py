"""The stage that says whether one evaluation is really better than another on the same volumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nuclei3d.config import Params
from nuclei3d.console import say, some_of, warn
from nuclei3d.errors import InputError
from nuclei3d.outputs import write_json
from nuclei3d.scoring.bootstrap import FEWEST_NUCLEI, PairedDifference
from nuclei3d.scoring.comparison import (
    Evaluations,
    compare_evaluations,
    metric_name,
    named_like,
    surely,
    tell_difference,
    tell_others,
)
from nuclei3d.scoring.metrics import number_or_none, parse_metrics
from nuclei3d.stages.assess import START_MODEL

_NUMBERS = ("a", "b", "difference", "low", "high")


@dataclass(frozen=True)
class CompareResult:
    """Paired differences by metric over the volumes that count.

    `better` and `worse` name the metrics in which B surely is; `warnings` say what makes it doubtful.
    """

    a: str
    b: str
    volumes: int
    resampled: str
    verdict: str
    better: tuple[str, ...]
    worse: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
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
        return {**vars(self), "differences": rows}


def compare(params: Params, a: Path, b: Path, out: Path | None = None) -> CompareResult:
    """Compare two evaluations, each a metrics.json or its folder, volume by volume.

    Both are pooled over the volumes that they share, but for embryos that either model was trained on; whole
    embryos (or blocks of time, see `nuclei3d.scoring.bootstrap`) are drawn with replacement, the same for
    both, so what varies between embryos cancels out and small differences become visible.
    `evaluate.primary_metric` decides. The result goes to `out`, a ``.json`` file or a folder to hold
    compare.json. InputError is raised if a file is no metrics.json, the two share no volume, a shared volume
    has another truth, or all that they share is of embryos that a model was trained on.
    """
    a, b = (path / "metrics.json" if path.is_dir() else path for path in (a, b))
    first = _read(a)
    second = named_like(first, _read(b))
    names = [name for name in first["volumes"] if name in second["volumes"]]
    if not names:
        raise InputError(f"{a} and {b} share no volume; evaluate both on the same embryos")
    for name in names:
        if first["volumes"][name]["truth_digest"] != second["volumes"][name]["truth_digest"]:
            raise InputError(
                f"volume {name} has other true labels in {a} than in {b}; evaluate both against the same "
                "truth"
            )
    found = compare_evaluations(
        first, second, replicates=params.evaluate.bootstrap, over=params.evaluate.resample, seed=params.seed
    )
    compared = found.compared
    if compared is None:
        raise InputError(
            f"one of the models was trained on the embryos of {some_of(found.trained_on)}: nothing is left "
            "to judge them on; evaluate both on embryos that neither has seen"
        )
    notes = []
    left_out = len(first["volumes"].keys() ^ second["volumes"].keys())
    if left_out:
        notes.append(f"{left_out} volumes are in one of the two only and are left out")
    if not compared.resampled:
        few = sum(first["volumes"][name]["n_true"] for name in found.volumes) < FEWEST_NUCLEI
        reason = f"there are fewer than {FEWEST_NUCLEI} nuclei" if few else "there is nothing to resample"
        notes.append(f"{reason}, so no interval and no verdict can be given")
    elif compared.units.few:
        notes.append(f"only {compared.units.words} could be resampled: the intervals are rough")
    if not found.same_bins:
        notes.append("the contrast bins differ, so recall by contrast is not compared")
    primary = params.evaluate.primary_metric
    result = CompareResult(
        a=str(a),
        b=str(b),
        volumes=len(found.volumes),
        resampled=compared.units.words if compared.resampled else "nothing",
        verdict=_verdict(compared.differences, primary),
        better=surely(compared.differences, 1),
        worse=surely(compared.differences, -1),
        notes=tuple(notes),
        warnings=tuple(_find_warnings({"A": first, "B": second}, found)),
        differences=compared.differences,
        start_models={
            side: {"name": name, **{key: scores.get(key) for key in ("ap", "seg", "pq", "behind_model")}}
            for side, evaluation in (("a", first), ("b", second))
            for name, scores in evaluation.get("baselines", {}).items()
            if name.startswith(START_MODEL) and not (left_out or found.trained_on)
        },
    )
    if out is not None:
        path = out if out.suffix == ".json" else out / "compare.json"
        write_json(path, result.as_json())
    _say(result, primary)
    return result


def _read(file: Path) -> dict[str, Any]:
    try:
        return parse_metrics(file.read_bytes(), file)
    except OSError as error:
        raise InputError(
            f"cannot read {file}: {error.strerror}; give the metrics.json or folder of nuclei3d evaluate"
        ) from None


def _find_warnings(evaluations: Mapping[str, Mapping[str, Any]], found: Evaluations) -> list[str]:
    """Say what makes the comparison doubtful: models that may know the volumes."""
    warnings = []
    if found.trained_on:
        warnings.append(
            f"{len(found.trained_on)} volumes are of embryos that one of the models was trained on and are "
            f"left out: {some_of(found.trained_on)}"
        )
    if found.chosen_on:
        warnings.append(
            f"epoch or thresholds of one of the models were chosen on {some_of(found.chosen_on)}: it looks "
            "better there than it is"
        )
    for side, metrics in evaluations.items():
        if not metrics.get("training_frames_known"):
            why = "it, or one that it started from, is of a version that did not record it"
            warnings.append(
                f"what the model of {side} was trained on is not known, so nobody can tell whether it has "
                f"seen these volumes ({why if 'model' in metrics else 'evaluate with --model'})"
            )
    return warnings


def _verdict(differences: Mapping[str, PairedDifference], primary: str) -> str:
    """Say in one sentence what the comparison shows, the primary metric first."""
    pair = differences.get(primary)
    if pair is None or np.isnan([pair.difference, pair.low, pair.high]).any():
        return "no verdict is possible"
    numbers = tell_difference(primary, pair)
    others = tell_others(differences, primary)
    if not pair.real:
        return f"no real difference in {numbers}, which holds 0" + (others and f"; but B is {others}")
    side = "better" if pair.difference > 0 else "worse"
    return f"B is really {side} than A: {numbers}" + (others and f"; also {others}")


def _say(result: CompareResult, primary: str) -> None:
    say(f"A: {result.a}")
    say(f"B: {result.b}")
    say(f"{result.volumes} volumes in common; resampled: {result.resampled}")
    say(f"{'':24}{'A':>8}{'B':>8}{'B - A':>9}   95 % interval")
    for metric, pair in result.differences.items():
        if metric[3:4] == "0" and metric not in ("ap_0.50", "ap_0.75", primary):
            continue
        interval = "" if np.isnan([pair.low, pair.high]).any() else f"{pair.low:+.3f} to {pair.high:+.3f}"
        mark = "" if not pair.real else ("  B better" if pair.difference > 0 else "  A better")
        say(
            f"{metric_name(metric):24}{_number(pair.a):>8}{_number(pair.b):>8}"
            f"{_number(pair.difference, '+'):>9}   {interval}{mark}"
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
    for warning in result.warnings:
        warn(warning)
    say(result.verdict)


def _number(value: float, sign: str = "") -> str:
    return "-" if np.isnan(value) else f"{value:{sign}.3f}"
