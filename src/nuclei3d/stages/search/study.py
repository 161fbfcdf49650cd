"""Search for training parameters: many trainings, judged in 3D on the validation embryos."""

from __future__ import annotations

import html
import json
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import pandas as pd
from optuna import Study
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from nuclei3d.config import Params
from nuclei3d.config.loading import write_values
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.experiment.provenance import md5_of_input
from nuclei3d.experiment.store import store_uri
from nuclei3d.experiment.trials import TrialRuns, attached_runs, search_runs
from nuclei3d.outputs import whole_file
from nuclei3d.stages.search.objective import Objective, judged_on, train_and_validate
from nuclei3d.stages.search.space import SearchSpace, Value, differences, fingerprint, search_space
from nuclei3d.stages.search.storage import (
    StudyStorage,
    explained_outage,
    open_storage,
    refuse_shared_database,
)
from nuclei3d.stages.search.worker import (
    CONFIRMS,
    SEED,
    START,
    SearchTask,
    Worker,
    attempts,
    best_first,
    new_pruner,
    record_of,
    requeue,
    run_workers,
)

_PARENT_RUN = "mlflow_run"
_MADE_WITH = "made_with"
_STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}"
)
# Below this, importances are noise.
_ENOUGH_FOR_IMPORTANCE = 4


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes
    ----------
    finished, pruned, failed
        Numbers of trials; those whose process died and that were run again are among the failed.
    best_values
        By dotted name.
    start_value
        What the values of params.yaml reached; None if that trial did not finish.
    confirmed
        Per trial that was repeated with other seeds: the values reached, its own first.
    model
        Model folder of the best trial, if it is on this machine.
    """

    out: Path
    study: str
    finished: int
    pruned: int
    failed: int
    best_trial: int
    best_value: float
    best_values: Mapping[str, Value]
    start_value: float | None
    confirmed: Mapping[int, tuple[float, ...]]
    model: Path | None
    applied: bool
    run_id: str | None

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        return {
            "out": str(self.out),
            "study": self.study,
            "trials": {"finished": self.finished, "pruned": self.pruned, "failed": self.failed},
            "best": {"trial": self.best_trial, "value": self.best_value, "values": dict(self.best_values)},
            "start_value": self.start_value,
            "confirmed": {str(trial): list(values) for trial, values in self.confirmed.items()},
            "model": None if self.model is None else str(self.model),
            "applied": self.applied,
            "run_id": self.run_id,
        }


def search(
    params: Params,
    slices: Path,
    out: Path,
    *,
    trials: int,
    storage: str | None = None,
    workers: int = 1,
    data: Path | None = None,
    apply: bool = False,
    params_file: Path | None = None,
    objective: Objective = train_and_validate,
) -> SearchResult:
    """Search for the training parameters that do best in 3D on the validation embryos.

    The first trial takes the values in params.yaml. The search may be killed at any time; the same command
    goes on until `trials` trials are finished or pruned in all, and a trial that was running is run again,
    from its last checkpoint. In PostgreSQL the same command started several times works on one
    search together.

    Parameters
    ----------
    params
        The section search says what is searched and for what; the others are the fixed values.
    slices
        Folder made by prepare. It is never computed again.
    out
        Folder of the search: the study, its plots, the best models.
    storage
        None: a journal file in `out`, for one command at a time. ``postgresql://...``: a database, for many.
    data
        Labelled embryos for validation; None: those that the slices were cut from.
    apply, params_file
        Write the best values into this file; only then is anything outside `out` changed.
    objective
        What a trial computes; another one must be a function of a module, so that workers can be sent it.
    """
    for option, count in (("trials", trials), ("workers", workers)):
        if count < 1:
            raise InputError(f"--{option} is {count}; expected at least 1")
    if apply and (params_file is None or not params_file.is_file()):
        raise InputError(
            "--apply writes the best values into params.yaml, but there is none; give --params FILE"
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; expected a folder")
    if params.tracking.enabled:
        refuse_shared_database(storage, store_uri(params.tracking))
    space = search_space(params)
    if objective is train_and_validate:
        judged_on(params, slices, data)
    name = params.search.study or out.absolute().name
    task = SearchTask(params, space, slices, out, data, storage, name, trials, objective)
    with _quiet(), explained_outage():
        result = _run_search(task, workers)
    changed = {name: value for name, value in result.best_values.items() if value != space.start[name]}
    if apply and changed and params_file is not None:
        write_values(params_file, changed)
        result = replace(result, applied=True)
    _say_result(result, params_file)
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's own account of trials and experiments off the screen."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def _run_search(task: SearchTask, workers: int) -> SearchResult:
    name = uuid.uuid4().hex
    with ExitStack() as stack:
        store = stack.enter_context(open_storage(task.storage, task.out, task.params.search))
        stack.enter_context(store.one_parent())
        with store.claim():
            study = _open_study(store, task)
            runs = stack.enter_context(
                search_runs(task.params, {"slices": task.slices}, study.user_attrs.get(_PARENT_RUN))
            )
            study.set_user_attr(_PARENT_RUN, runs.parent_id)

        def bury(dead: str) -> None:
            with store.claim():
                for each in _studies(store, study):
                    requeue(each, task.params.search.max_retries, dead)

        if store.journal is not None:
            # nobody else is here
            bury("")
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        done = states.count(TrialState.COMPLETE) + states.count(TrialState.PRUNED)
        names = ", ".join(task.space.distributions)
        say(f"search '{task.study}': {done} of {task.trials} trials done; searching {names}")
        try:
            if workers == 1:
                _work_through(name, task, store, study, runs)
            else:
                run_workers(partial(_work, task), name, workers, bury)
        finally:
            bury(name)
            with store.claim():
                trials = [trial for each in _studies(store, study) for trial in each.get_trials()]
                runs.reconcile([record_of(trial) for trial in trials])
        return _conclude(store, study, task, runs)


def _open_study(store: StudyStorage, task: SearchTask) -> Study:
    """Load the study, or make it with the values of params.yaml as its first trial."""
    made_with = fingerprint(task.params, task.space, md5_of_input(task.slices))
    study = optuna.create_study(
        storage=store.backend,
        study_name=task.study,
        direction="maximize",
        load_if_exists=True,
        pruner=new_pruner(task.params.search),
    )
    known = study.user_attrs.get(_MADE_WITH)
    if known is None:
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(dict(task.space.start), user_attrs={START: True})
        study.set_user_attr(_MADE_WITH, made_with)
    elif known != made_with:
        raise InputError(
            f"the study '{task.study}' was made with other settings ({differences(known, made_with)}); its "
            "trials cannot be compared with new ones: give another --out or search.study, or the old settings"
        )
    return study


def _work(task: SearchTask, name: str) -> None:
    with _quiet(), explained_outage(), open_storage(task.storage, task.out, task.params.search) as store:
        study = optuna.load_study(
            storage=store.backend, study_name=task.study, pruner=new_pruner(task.params.search)
        )
        runs = attached_runs(task.params.tracking, study.user_attrs.get(_PARENT_RUN))
        _work_through(name, task, store, study, runs)


def _work_through(name: str, task: SearchTask, store: StudyStorage, study: Study, runs: TrialRuns) -> None:
    Worker(name, task, store, study, runs).work()
    if task.params.search.confirm_seeds:
        with store.claim():
            confirmations = _queue_confirmations(store, study, task)
        Worker(name, task, store, confirmations, runs).work()


def _queue_confirmations(store: StudyStorage, study: Study, task: SearchTask) -> Study:
    """Queue the best trials, and the one of params.yaml, with other seeds; those queued before are left.

    They tell luck from merit, in a study of their own.
    """
    confirmations = optuna.create_study(
        storage=store.backend,
        study_name=_confirming(study),
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.NopPruner(),
    )
    confirmations.set_user_attr(CONFIRMS, study.study_name)
    queued = {
        (trial.user_attrs[CONFIRMS], trial.user_attrs[SEED])
        for trial in confirmations.get_trials(deepcopy=False)
    }
    best = best_first(study)
    chosen = best[: task.params.search.confirm_top]
    chosen += [trial for trial in best if trial.user_attrs.get(START) and trial not in chosen]
    first = task.params.seed + 1
    for trial in chosen:
        for seed in range(first, first + task.params.search.confirm_seeds):
            if (trial.number, seed) not in queued:
                confirmations.enqueue_trial(
                    dict(trial.params), user_attrs={CONFIRMS: trial.number, SEED: seed}
                )
    return confirmations


def _confirming(study: Study) -> str:
    return f"{study.study_name}-confirm"


def _studies(store: StudyStorage, study: Study) -> list[Study]:
    """Give the study and, if there is one, that of its confirmations."""
    if _confirming(study) not in optuna.get_all_study_names(store.backend):
        return [study]
    return [study, optuna.load_study(storage=store.backend, study_name=_confirming(study))]


def _conclude(store: StudyStorage, study: Study, task: SearchTask, runs: TrialRuns) -> SearchResult:
    finished = best_first(study)
    if not finished:
        raise InputError(
            "no trial finished: all were pruned; search with search.prune: false or wider ranges"
        )
    studies = _studies(store, study)
    # what each finished trial reached: with the seed of params.yaml, then with the others
    values = {trial.number: [trial.value or 0.0] for trial in finished}
    for confirmations in studies[1:]:
        for trial in confirmations.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            values[trial.user_attrs[CONFIRMS]].append(trial.value or 0.0)
    # of trials that were not repeated only the winner of the search itself can win
    candidates = [trial for trial in finished if len(values[trial.number]) > 1] or finished[:1]
    best = max(candidates, key=lambda trial: fmean(values[trial.number]))
    start = next((trial for trial in finished if trial.user_attrs.get(START)), None)
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    models = sorted(path.parent for path in task.folder_of(best).glob("*/model.json"))
    result = SearchResult(
        out=task.out,
        study=study.study_name,
        finished=states.count(TrialState.COMPLETE),
        pruned=states.count(TrialState.PRUNED),
        failed=states.count(TrialState.FAIL),
        best_trial=best.number,
        best_value=fmean(values[best.number]),
        best_values={name: best.params[name] for name in task.space.distributions},
        start_value=None if start is None else fmean(values[start.number]),
        confirmed={number: tuple(found) for number, found in values.items() if len(found) > 1},
        model=models[0] if models else None,
        applied=False,
        run_id=runs.parent_id,
    )
    with store.claim():
        written = _write_study(studies, task.space, task.out)
        for path in written if store.journal is None else [*written, store.journal]:
            runs.parent.artifact(path, "search")
        runs.parent.metrics({"best": result.best_value, "finished": result.finished, "pruned": result.pruned})
        runs.parent.tags(
            {"nuclei3d.best_trial": result.best_trial}
            | {f"nuclei3d.best.{name}": value for name, value in result.best_values.items()}
        )
    return result


def _write_study(studies: Sequence[Study], space: SearchSpace, folder: Path) -> list[Path]:
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
    from optuna import visualization

    # they want several finished trials that differ
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < _ENOUGH_FOR_IMPORTANCE:
        raise ValueError(f"fewer than {_ENOUGH_FOR_IMPORTANCE} finished trials")
    return visualization.plot_param_importances(study)


def _say_result(result: SearchResult, params_file: Path | None) -> None:
    values = ", ".join(f"{name} {value}" for name, value in result.best_values.items())
    start = (
        "" if result.start_value is None else f"; the values of params.yaml reached {result.start_value:.4f}"
    )
    say(f"best trial {result.best_trial:04d}: {result.best_value:.4f} with {values}{start}")
    if result.applied:
        say(f"wrote them into {params_file}; 'dvc repro' now makes the model")
