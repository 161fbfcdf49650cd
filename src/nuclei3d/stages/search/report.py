"""What a search leaves to read: study.json, study.csv and search.html."""

from __future__ import annotations

import html
import json
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from nuclei3d.outputs import whole_file
from nuclei3d.stages.search.space import SearchSpace
from nuclei3d.stages.search.worker import CONFIRMS, SEED, attempts, record_of

_STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}"
)
# Below this, importances are noise.
_ENOUGH_FOR_IMPORTANCE = 4


def write_study(studies: Sequence[Study], space: SearchSpace, folder: Path) -> list[Path]:
    """Write the trials of a search and of its confirmations: study.json, study.csv and search.html."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(trial, space) for study in studies for trial in study.get_trials(deepcopy=False)]
    # whole numbers and gaps stay what they are only as objects
    table = pd.DataFrame([row | row["values"] for row in rows], dtype=object)
    table = table.drop(columns=["values", "curve", "attempts"])
    paths = [folder / "study.json", folder / "study.csv", folder / "search.html"]
    with whole_file(paths[0]) as path:
        path.write_text(json.dumps({"study": studies[0].study_name, "trials": rows}, indent=2) + "\n")
    with whole_file(paths[1]) as path:
        table.to_csv(path, index=False, lineterminator="\n")
    with whole_file(paths[2]) as path:
        columns = ["trial", "state", "value", *space.distributions, "reason"]
        path.write_text(_page(studies[0], table[columns]), encoding="utf-8")
    return paths


def _row(trial: FrozenTrial, space: SearchSpace) -> dict[str, Any]:
    record = record_of(trial)
    return {
        "trial": record.key,
        "state": record.state,
        "reason": record.reason,
        "value": record.value,
        "values": {name: trial.params.get(name) for name in space.distributions},
        "confirms": trial.user_attrs.get(CONFIRMS),
        "seed": trial.user_attrs.get(SEED),
        "attempts": attempts(trial),
        "started": _time(trial.datetime_start),
        "ended": _time(trial.datetime_complete),
        "curve": {str(step): value for step, value in sorted(record.curve.items())},
    }


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="seconds")


def _page(study: Study, table: pd.DataFrame) -> str:
    """Make one page with all plots, which needs no network: plotly's script is inside."""
    from optuna import visualization

    plots: dict[str, Callable[[Study], Any]] = {
        "History": visualization.plot_optimization_history,
        "Importance of the parameters": _importances,
        "Parameters together": visualization.plot_parallel_coordinate,
        "Values compared on the way (by share of the epochs, in thousandths)": (
            visualization.plot_intermediate_values
        ),
    }
    sections: list[str] = []
    for heading, plot in plots.items():
        sections.append(f"<h2>{html.escape(heading)}</h2>")
        try:
            with warnings.catch_warnings():
                # Optuna's remarks on studies that are still small
                warnings.simplefilter("ignore")
                figure = plot(study)
        except (ValueError, RuntimeError) as error:
            sections.append(f"<p>Not drawn: {html.escape(str(error))}</p>")
            continue
        script = not any("<script" in section for section in sections)
        sections.append(figure.to_html(full_html=False, include_plotlyjs=script))
    states = list(table["state"])
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("finished", "pruned", "failed"))
    title = f"Search {html.escape(study.study_name)}"
    trials = table.to_html(index=False, border=0, na_rep="", float_format="{:.4g}".format)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"<p>{counts}; best {study.best_value:.4f}</p>{''.join(sections)}"
        f"<h2>Trials</h2>{trials}</body></html>"
    )


def _importances(study: Study) -> Any:
    # they want several finished trials that differ
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < _ENOUGH_FOR_IMPORTANCE:
        raise ValueError(f"fewer than {_ENOUGH_FOR_IMPORTANCE} finished trials")
    return optuna.visualization.plot_param_importances(study)
