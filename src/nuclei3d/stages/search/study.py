"""Search for training parameters: many trainings, judged in 3D on the validation embryos."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
from optuna import Study
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from nuclei3d.config import Params
from nuclei3d.config.editing import write_values
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.stages.search.confirmation import (
    best_first,
    find_confirmations,
    queue_confirmations,
    values_over_seeds,
)
from nuclei3d.stages.search.objective import judged_on, train_and_validate
from nuclei3d.stages.search.pruning import new_pruner
from nuclei3d.stages.search.records import START, record_of
from nuclei3d.stages.search.report import write_study
from nuclei3d.stages.search.space import SearchSpace, Value, search_space
from nuclei3d.stages.search.storage import (
    StudyStorage,
    attempts,
    explained_outage,
    open_storage,
    refuse_shared_database,
)
from nuclei3d.stages.search.task import Objective, SearchTask, differences, fingerprint
from nuclei3d.stages.search.trials import Worker
from nuclei3d.stages.search.workers import run_workers
from nuclei3d.tracking.lineage import md5_of_input
from nuclei3d.tracking.store import store_uri
from nuclei3d.tracking.trials import TrialRuns, attached_runs, search_runs

PARENT_RUN = "mlflow_run"
MADE_WITH = "made_with"
MARK = "mark"


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes
    ----------
    out, study
        Folder and name of the search.
    finished, pruned, failed
        Numbers of trials; those whose process died and that were run again are among the failed.
    best_trial, best_value, best_values
        The best trial, what it reached, and its parameters by dotted name.
    start_value
        What the values of params.yaml reached; None if that trial did not finish.
    confirmed
        Per trial that was repeated with other seeds: the values reached, its own first.
    model
        Model folder of the best trial, if it is on this machine.
    applied
        Whether params.yaml was changed.
    run_id
        MLflow run of the search, if tracking is on.
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
    from its last checkpoint. The same command started several times works on one search together.

    Parameters
    ----------
    params
        The section search says what is searched and for what; the others are the fixed values.
    slices
        Folder made by prepare. It is never computed again.
    out
        Folder of the search: the study, its plots, the best models.
    trials
        Finished and pruned trials wanted in all, over all starts.
    storage
        None: a journal file in `out`, for one machine. ``postgresql://...``: a database, for many.
    workers
        Processes on this machine.
    data
        Labelled embryos for validation; None: those that the slices were cut from.
    apply, params_file
        Write the best values into this file; only then is anything outside `out` changed.
    objective
        What a trial computes; another one must be a function of a module, so that workers can be sent it.

    Raises
    ------
    InputError
        If the storage does not answer, the study in it was made with other slices or parameters, the ranges
        are unusable, or trials fail for a reason that will not go away.
    """
    _check(trials, workers, apply, params_file, out)
    if params.tracking.enabled:
        refuse_shared_database(storage, store_uri(params.tracking))
    space = search_space(params)
    if objective is train_and_validate:
        judged_on(params, slices, data)
    task = SearchTask(
        params, slices, out, data, storage, params.search.study or out.absolute().name, trials, objective
    )
    with _quiet(), explained_outage():
        result = _run_search(task, space, workers)
    if apply:
        assert params_file is not None
        result = replace(result, applied=_apply(result, space, params_file))
    _say_result(result, params_file)
    return result


def _run_search(task: SearchTask, space: SearchSpace, workers: int) -> SearchResult:
    with ExitStack() as stack:
        store = stack.enter_context(open_storage(task.storage, task.out, task.params.search))
        with store.claim():
            study = _open_study(store, task, space)
            runs = stack.enter_context(
                search_runs(
                    task.params,
                    {"slices": task.slices},
                    study.user_attrs.get(PARENT_RUN),
                    study.user_attrs[MARK],
                )
            )
            study.set_user_attr(PARENT_RUN, runs.parent_id)
        _say_plan(study, task, space)
        try:
            if workers == 1:
                _work_through(task, store, study, runs, space)
            else:
                run_workers(partial(_work, task), workers)
        finally:
            _settle(store, study, task, runs)
        return _conclude(store, study, task, runs, space)


def _check(trials: int, workers: int, apply: bool, params_file: Path | None, out: Path) -> None:
    if trials < 1:
        raise InputError(f"--trials is {trials}; expected at least 1")
    if workers < 1:
        raise InputError(f"--workers is {workers}; expected at least 1")
    if apply and (params_file is None or not params_file.is_file()):
        raise InputError(
            "--apply writes the best values into params.yaml, but there is none; give --params FILE"
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; expected a folder")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's own account of trials and experiments off the screen."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # this module beats the heart itself, because it must ask for trials within a claim
        warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used")
        yield


def _open_study(store: StudyStorage, task: SearchTask, space: SearchSpace) -> Study:
    """Load the study, or make it with the values of params.yaml as its first trial."""
    made_with = fingerprint(task, space, md5_of_input(task.slices))
    study = optuna.create_study(
        storage=store.backend,
        study_name=task.study,
        direction="maximize",
        load_if_exists=True,
        pruner=new_pruner(task.params.search),
    )
    known = study.user_attrs.get(MADE_WITH)
    if known is None:
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(dict(space.start), user_attrs={START: True})
        study.set_user_attr(MARK, uuid.uuid4().hex)
        study.set_user_attr(MADE_WITH, made_with)
    elif known != made_with:
        raise InputError(
            f"the study '{task.study}' was made with other settings ({differences(known, made_with)}); its "
            "trials cannot be compared with new ones: give another --out or search.study, or the old settings"
        )
    return study


def _work(task: SearchTask) -> None:
    """Join a search from another process."""
    space = search_space(task.params)
    with _quiet(), explained_outage(), open_storage(task.storage, task.out, task.params.search) as store:
        study = optuna.load_study(
            storage=store.backend, study_name=task.study, pruner=new_pruner(task.params.search)
        )
        runs = attached_runs(task.params.tracking, study.user_attrs.get(PARENT_RUN))
        _work_through(task, store, study, runs, space)


def _work_through(
    task: SearchTask, store: StudyStorage, study: Study, runs: TrialRuns, space: SearchSpace
) -> None:
    Worker(task, store, study, runs, space).work()
    if task.params.search.confirm_seeds:
        with store.claim():
            confirmations = queue_confirmations(store, study, task)
        Worker(task, store, confirmations, runs, space).work()


def _settle(store: StudyStorage, study: Study, task: SearchTask, runs: TrialRuns) -> None:
    """Make study and MLflow agree on every trial, also on those whose process died."""
    with store.claim():
        store.recover(study)
        records = [record_of(trial) for trial in study.get_trials(deepcopy=False)]
        confirmations = find_confirmations(store, study)
        if confirmations is not None:
            store.recover(confirmations)
            trials = confirmations.get_trials(deepcopy=False)
            records += [record_of(trial, confirms=True) for trial in trials]
        runs.reconcile(records)


def _conclude(
    store: StudyStorage, study: Study, task: SearchTask, runs: TrialRuns, space: SearchSpace
) -> SearchResult:
    """Choose the best trial, write and log the tables and plots."""
    confirmations = find_confirmations(store, study)
    finished = best_first(study)
    if not finished:
        raise InputError(
            "no trial finished: all were pruned; search with search.prune: false or wider ranges"
        )
    values = values_over_seeds(finished, confirmations)
    # of trials that were not repeated only the winner of the search itself can win
    candidates = [trial for trial in finished if len(values[trial.number]) > 1] or finished[:1]
    best = max(candidates, key=lambda trial: fmean(values[trial.number]))
    start = next((trial for trial in finished if trial.user_attrs.get(START)), None)
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    folder = task.out / "trials" / f"{attempts(best)[0]:04d}"
    result = SearchResult(
        out=task.out,
        study=study.study_name,
        finished=states.count(TrialState.COMPLETE),
        pruned=states.count(TrialState.PRUNED),
        failed=states.count(TrialState.FAIL),
        best_trial=best.number,
        best_value=fmean(values[best.number]),
        best_values={name: best.params[name] for name in space.distributions},
        start_value=None if start is None else fmean(values[start.number]),
        confirmed={number: found for number, found in values.items() if len(found) > 1},
        model=next(iter(sorted(path.parent for path in folder.glob("*/model.json"))), None),
        applied=False,
        run_id=runs.parent_id,
    )
    with store.claim():
        for path in [*write_study(study, confirmations, space, task.out), *store.files]:
            runs.parent.artifact(path, "search")
        runs.parent.metrics({"best": result.best_value, "finished": result.finished, "pruned": result.pruned})
        runs.parent.tags(
            {"nuclei3d.best_trial": result.best_trial}
            | {f"nuclei3d.best.{name}": value for name, value in result.best_values.items()}
        )
        runs.close_parent()
    return result


def _apply(result: SearchResult, space: SearchSpace, params_file: Path) -> bool:
    changed = {name: value for name, value in result.best_values.items() if value != space.start[name]}
    if changed:
        write_values(params_file, changed)
    return bool(changed)


def _say_plan(study: Study, task: SearchTask, space: SearchSpace) -> None:
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    done = states.count(TrialState.COMPLETE) + states.count(TrialState.PRUNED)
    names = ", ".join(space.distributions)
    say(f"search '{task.study}': {done} of {task.trials} trials done; searching {names}")


def _say_result(result: SearchResult, params_file: Path | None) -> None:
    values = ", ".join(f"{name} {value}" for name, value in result.best_values.items())
    start = (
        "" if result.start_value is None else f"; the values of params.yaml reached {result.start_value:.4f}"
    )
    say(f"best trial {result.best_trial:04d}: {result.best_value:.4f} with {values}{start}")
    if result.applied:
        say(f"wrote them into {params_file}; 'dvc repro' now makes the model")
