"""What a search leaves to read: study.json, study.csv and search.html.

Trials as the reader sees them: in MLflow, in tables and on the screen.
"""

from __future__ import annotations

import csv
import html
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from nuclei3d.experiment.trials import TrialRecord
from nuclei3d.outputs import whole_file
from nuclei3d.stages.search.space import SearchSpace, Value
from nuclei3d.stages.search.storage import DIED, REASON, attempts

# Attributes of trials in the study.
START = "start"
CONFIRMS = "confirms"
SEED = "seed"

_STATES: Mapping[TrialState, Literal["running", "finished", "pruned", "failed"]] = {
    TrialState.WAITING: "running",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


def record_of(trial: FrozenTrial, *, confirms: bool = False) -> TrialRecord:
    """Describe a trial for MLflow and for the tables."""
    reason = trial.user_attrs.get(REASON, "")
    state = _STATES[trial.state]
    tries = attempts(trial)
    if state == "failed" and not reason:
        reason = DIED
    values: dict[str, object] = dict(trial.params)
    if confirms:
        values |= {SEED: trial.user_attrs.get(SEED), CONFIRMS: trial.user_attrs.get(CONFIRMS)}
    return TrialRecord(
        key=_key(trial.number, confirms),
        state=state,
        reason=reason,
        values=values,
        value=trial.value if state == "finished" else None,
        curve=dict(trial.intermediate_values),
        earlier=None if len(tries) == 1 else _key(tries[-2], confirms),
    )


def _key(number: int, confirms: bool) -> str:
    return ("confirmation " if confirms else "") + f"{number:04d}"


def outcome_line(record: TrialRecord, best: float | None) -> str:
    """Say in one line how a trial ended, beside the best value of the search so far."""
    values = ", ".join(
        f"{name.removeprefix('train.')} {_short(value)}" for name, value in record.values.items()
    )
    if record.value is not None:
        outcome = f"{record.value:.4f}, best {best:.4f}"
    else:
        outcome = f"{record.state}: {record.reason}"
    return f"trial {record.key} ({values}): {outcome}"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


_STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}"
)


# Below this, importances are noise.
_ENOUGH_FOR_IMPORTANCE = 4


def write_study(study: Study, confirmations: Study | None, space: SearchSpace, folder: Path) -> list[Path]:
    """Write the trials as study.json and study.csv, and the plots as search.html; give their paths."""
    rows = [_row(trial, space, confirms=False) for trial in study.get_trials(deepcopy=False)]
    if confirmations is not None:
        rows += [_row(trial, space, confirms=True) for trial in confirmations.get_trials(deepcopy=False)]
    paths = [folder / "study.json", folder / "study.csv", folder / "search.html"]
    with whole_file(paths[0]) as path:
        path.write_text(json.dumps({"study": study.study_name, "trials": rows}, indent=2) + "\n")
    with whole_file(paths[1]) as path:
        _write_csv(path, rows)
    with whole_file(paths[2]) as path:
        path.write_text(_page(study, rows), encoding="utf-8")
    return paths


def _row(trial: FrozenTrial, space: SearchSpace, *, confirms: bool) -> dict[str, Any]:
    record = record_of(trial, confirms=confirms)
    values: Mapping[str, Value] = {name: trial.params.get(name) for name in space.distributions}
    return {
        "trial": record.key,
        "state": record.state,
        "reason": record.reason,
        "value": record.value,
        "values": values,
        "confirms": trial.user_attrs.get(CONFIRMS),
        "seed": trial.user_attrs.get(SEED),
        "attempts": attempts(trial),
        "started": _time(trial.datetime_start),
        "ended": _time(trial.datetime_complete),
        "curve": {str(step): value for step, value in sorted(record.curve.items())},
    }


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="seconds")


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    plain = [name for name in rows[0] if name not in ("values", "curve", "attempts")] if rows else []
    searched = list(rows[0]["values"]) if rows else []
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*plain, *searched])
        for row in rows:
            writer.writerow([*(row[name] for name in plain), *(row["values"][name] for name in searched)])


def _page(study: Study, rows: Sequence[Mapping[str, Any]]) -> str:
    """Make one page with all plots, which needs no network: plotly's script is inside."""
    from optuna import visualization

    plots: dict[str, Callable[[Study], Any]] = {
        "History": visualization.plot_optimization_history,
        "Importance of the parameters": visualization.plot_param_importances,
        "Parameters together": visualization.plot_parallel_coordinate,
        "Values compared on the way (by share of the epochs, in thousandths)": (
            visualization.plot_intermediate_values
        ),
    }
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(finished) < _ENOUGH_FOR_IMPORTANCE:
        plots["Importance of the parameters"] = _too_few
    sections = []
    for title, plot in plots.items():
        sections.append(f"<h2>{html.escape(title)}</h2>")
        try:
            with _quiet():
                figure = plot(study)
        except (ValueError, RuntimeError) as error:
            # importances, for one, want several finished trials that differ
            sections.append(f"<p>Not drawn: {html.escape(str(error))}</p>")
            continue
        script = not any("<script" in section for section in sections)
        sections.append(figure.to_html(full_html=False, include_plotlyjs=script))
    states = ("finished", "pruned", "failed")
    counts = ", ".join(f"{sum(row['state'] == state for row in rows)} {state}" for state in states)
    title = f"Search {html.escape(study.study_name)}"
    best = max((trial.value for trial in finished if trial.value is not None), default=float("nan"))
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><p>{counts}; best {best:.4f}</p>"
        + "".join(sections)
        + _table(rows)
        + "</body></html>"
    )


def _too_few(study: Study) -> Any:
    raise ValueError(f"fewer than {_ENOUGH_FOR_IMPORTANCE} finished trials")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's remarks on studies that are still small off the screen."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    searched = list(rows[0]["values"]) if rows else []
    head = "".join(
        f"<th>{html.escape(name)}</th>" for name in ("trial", "state", "value", *searched, "reason")
    )
    lines = []
    for row in rows:
        cells = [row["trial"], row["state"], row["value"], *row["values"].values(), row["reason"]]
        shown = (
            f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in cells
        )
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in shown) + "</tr>")
    return f"<h2>Trials</h2><table><tr>{head}</tr>{''.join(lines)}</table>"
