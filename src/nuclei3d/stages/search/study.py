"""Search for training parameters: many trainings, judged in 3D on the validation embryos."""

from __future__ import annotations

import html
import json
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import pandas as pd
from optuna import Study
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from nuclei3d.config import Params
from nuclei3d.config.loading import write_values
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.experiment.provenance import md5_of_input
from nuclei3d.experiment.runs import StageRun, stage_run
from nuclei3d.experiment.store import store_uri
from nuclei3d.experiment.trials import RecordedState, TrialRecord, TrialRuns
from nuclei3d.outputs import write_text
from nuclei3d.stages.search.objective import Objective, judged_on, train_and_validate
from nuclei3d.stages.search.space import Value, differences, fingerprint, search_space
from nuclei3d.stages.search.storage import (
    StudyStorage,
    explained_outage,
    open_storage,
    refuse_shared_database,
)
from nuclei3d.stages.search.worker import (
    COUNTED,
    START,
    SearchTask,
    Worker,
    best_first,
    counted,
    new_pruner,
    record_of,
    run_workers,
)

_PARENT_RUN = "mlflow_run"
_MADE_WITH = "made_with"
_STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}"
)
_SHOWN: tuple[RecordedState, ...] = ("finished", "pruned", "failed")


@dataclass(frozen=True)
class BestTrial:
    """The trial that won: its number, what it reached, and its values by dotted name."""

    trial: int
    value: float
    values: Mapping[str, Value]


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    `trials` counts the finished, pruned and failed ones, without those that repeat one with another seed;
    `start_value` is what the values of params.yaml reached (None: that trial did not finish), `confirmed`,
    per trial that was repeated with other seeds, the values reached, its own first, and `model` the folder of
    the best trial's model, if it is on this machine.
    """

    out: Path
    study: str
    trials: Mapping[str, int]
    best: BestTrial
    start_value: float | None
    confirmed: Mapping[int, tuple[float, ...]]
    model: Path | None
    applied: bool
    run_id: str | None


def search(
    params: Params,
    slices: Path,
    out: Path,
    trials: int,
    *,
    storage: str | None = None,
    workers: int = 1,
    data: Path | None = None,
    apply: bool = False,
    params_file: Path | None = None,
    objective: Objective = train_and_validate,
) -> SearchResult:
    """Search for the training parameters that do best in 3D on the validation embryos.

    The first trial takes the values in params.yaml. The search may be killed at any time; the same command
    goes on until `trials` trials are finished or pruned in all, and with a trial that was running from its
    last checkpoint. In PostgreSQL the same command started several times works on one search together.

    The section search of the parameters says what is searched and for what; the others are the fixed values.
    `slices`, made by prepare, are never computed again; `out` is the folder of the search: the study, its
    plots, the best models. Without `storage` the study is a journal file there, for one command at a time;
    ``postgresql://...`` is a database, for many. `data` are labelled embryos for validation; None: those that
    the slices were cut from. With `apply` the best values are written into `params_file`; only then is
    anything outside `out` changed. The `objective` is what a trial computes; another one must be a function
    of a module, so that workers can be sent it.
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
    changed = {name: value for name, value in result.best.values.items() if value != space.start[name]}
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
        # a trial that was gone on with tells again what it told before its process died
        warnings.filterwarnings("ignore", "The reported value is ignored")
        yield


def _run_search(task: SearchTask, workers: int) -> SearchResult:
    name = uuid.uuid4().hex
    with ExitStack() as stack:
        store = stack.enter_context(open_storage(task.storage, task.out, task.params.search))
        stack.enter_context(store.one_parent())
        with store.claim():
            study = _open_study(store, task)
            known = study.user_attrs.get(_PARENT_RUN)
            parent = stage_run("search", task.params, inputs={"slices": task.slices}, earlier=known)
            runs = TrialRuns(stack.enter_context(parent))
            study.set_user_attr(_PARENT_RUN, runs.parent.run_id)

        def bury(dead: str) -> None:
            with store.claim():
                store.requeue(study, dead)

        if store.journal is not None:
            # nobody else is here
            bury("")
        names = ", ".join(task.space.distributions)
        done = len(counted(study, *COUNTED))
        say(f"search '{task.study}': {done} of {task.trials} trials done; searching {names}")
        try:
            if workers == 1:
                Worker(name, task, store, study, runs).work()
            else:
                run_workers(partial(_work, task), name, workers, bury)
        finally:
            bury(name)
            with store.claim():
                runs.reconcile([record_of(trial) for trial in study.get_trials(deepcopy=False)])
        return _conclude(store, study, task, runs.parent)


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
        runs = TrialRuns.attached(task.params.tracking, study.user_attrs.get(_PARENT_RUN))
        Worker(name, task, store, study, runs).work()


def _conclude(store: StudyStorage, study: Study, task: SearchTask, run: StageRun) -> SearchResult:
    finished = best_first(study)
    if not finished:
        raise InputError(
            "no trial finished: all were pruned; search with search.prune: false or wider ranges"
        )
    records = [record_of(trial) for trial in study.get_trials(deepcopy=False)]
    # what each finished trial reached: with the seed of params.yaml, then with the others
    values = {trial.number: [trial.value or 0.0] for trial in finished}
    for record in records:
        if record.confirms is not None and record.value is not None:
            values[record.confirms].append(record.value)
    # of trials that were not repeated only the winner of the search itself can win
    candidates = [trial for trial in finished if len(values[trial.number]) > 1] or finished[:1]
    best = max(candidates, key=lambda trial: fmean(values[trial.number]))
    start = next((trial for trial in finished if trial.user_attrs.get(START)), None)
    states = [record.state for record in records if record.confirms is None]
    models = sorted(path.parent for path in task.folder_of(best).glob("*/model.json"))
    result = SearchResult(
        out=task.out,
        study=study.study_name,
        trials={state: states.count(state) for state in _SHOWN},
        best=BestTrial(
            best.number,
            fmean(values[best.number]),
            {name: best.params[name] for name in task.space.distributions},
        ),
        start_value=None if start is None else fmean(values[start.number]),
        confirmed={number: tuple(found) for number, found in values.items() if len(found) > 1},
        model=models[0] if models else None,
        applied=False,
        run_id=run.run_id,
    )
    with store.claim():
        written = _write_study(study, records, task)
        for path in written if store.journal is None else [*written, store.journal]:
            run.artifact(path, "search")
        run.metrics({"best": result.best.value} | {state: states.count(state) for state in _SHOWN[:2]})
        run.tags(
            {"nuclei3d.best_trial": best.number}
            | {f"nuclei3d.best.{name}": value for name, value in result.best.values.items()}
        )
    return result


def _write_study(study: Study, records: Sequence[TrialRecord], task: SearchTask) -> list[Path]:
    searched = optuna.create_study(study_name=study.study_name, direction="maximize")
    searched.add_trials(counted(study, *TrialState))
    rows = [asdict(record) for record in records]
    # whole numbers and gaps stay what they are only as objects
    table = pd.DataFrame([row | row["values"] for row in rows], dtype=object)
    table = table.drop(columns=["values", "curve", "attempts"])
    shown = table[["trial", "state", "value", *task.space.distributions, "reason"]]
    texts = {
        "study.json": json.dumps({"study": study.study_name, "trials": rows}, indent=2) + "\n",
        "study.csv": table.to_csv(index=False, lineterminator="\n"),
        "search.html": _page(searched, shown),
    }
    for name, text in texts.items():
        write_text(task.out / name, text)
    return [task.out / name for name in texts]


def _page(study: Study, table: pd.DataFrame) -> str:
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
    counts = ", ".join(f"{(table['state'] == state).sum()} {state}" for state in _SHOWN)
    title = f"Search {html.escape(study.study_name)}"
    trials = table.to_html(index=False, border=0, na_rep="", float_format="{:.4g}".format)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"<p>{counts}; best {study.best_value:.4f}</p>{''.join(sections)}"
        f"<h2>Trials</h2>{trials}</body></html>"
    )


def _say_result(result: SearchResult, params_file: Path | None) -> None:
    values = ", ".join(f"{name} {value}" for name, value in result.best.values.items())
    start = (
        "" if result.start_value is None else f"; the values of params.yaml reached {result.start_value:.4f}"
    )
    say(f"best trial {result.best.trial:04d}: {result.best.value:.4f} with {values}{start}")
    if result.applied:
        say(f"wrote them into {params_file}; 'dvc repro' now makes the model")
