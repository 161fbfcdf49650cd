"""Search for training parameters: many trainings, judged in 3D on the validation embryos.

One worker of a search: it takes trials, runs them, and tells the study and MLflow how they ended.

Several workers of a search on one machine, each a process that ends with the search.

Telling luck from merit: the best trials once more, with other seeds, in a study of their own.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import optuna
from optuna import Study, Trial, TrialPruned
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from nuclei3d.config import Params
from nuclei3d.config.loading import write_values
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.experiment.provenance import md5_of_input
from nuclei3d.experiment.runs import StageRun
from nuclei3d.experiment.store import store_uri
from nuclei3d.experiment.trials import TrialRecord, TrialRuns, attached_runs, search_runs
from nuclei3d.stages.search.objective import (
    STEPS,
    Objective,
    SearchTask,
    TrialJob,
    differences,
    fingerprint,
    judged_on,
    new_pruner,
    new_sampler,
    train_and_validate,
)
from nuclei3d.stages.search.report import CONFIRMS, SEED, START, outcome_line, record_of, write_study
from nuclei3d.stages.search.space import SearchSpace, Value, params_with, search_space
from nuclei3d.stages.search.storage import (
    ERROR,
    StudyStorage,
    attempts,
    explained_outage,
    open_storage,
    refuse_shared_database,
)

if TYPE_CHECKING:
    from nuclei3d.training.state import EpochReport

_POLL_S = (0.2, 5.0)
_COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
_COMPARED = {"loss": "validation loss", "ap": "average precision in 3D"}


class Worker:
    """Runs trials of one study until there are enough."""

    def __init__(
        self, task: SearchTask, storage: StudyStorage, study: Study, runs: TrialRuns, space: SearchSpace
    ) -> None:
        self.task = task
        self.storage = storage
        self.study = study
        self.runs = runs
        self.space = space
        self._failures_before = len(self._errors())

    def work(self) -> None:
        """Run trials until as many are finished or pruned as are wanted, whoever ran them.

        Where the last ones run elsewhere, wait for them: should their worker die, this one takes them over.

        Raises
        ------
        InputError
            If trials fail for a reason that will not go away.
        """
        pause, longest = _POLL_S
        while True:
            trial, done = self._next()
            if trial is not None:
                self._run(trial)
                pause = _POLL_S[0]
            elif done:
                return
            else:
                time.sleep(pause)
                pause = min(2 * pause, longest)

    def _next(self) -> tuple[Trial | None, bool]:
        """Take a trial if one is wanted; also tell whether all are done."""
        with self.storage.claim():
            self.storage.recover(self.study)
            trials = self.study.get_trials(deepcopy=False)
            states = [trial.state for trial in trials]
            counted = sum(states.count(state) for state in _COUNTED)
            running = states.count(TrialState.RUNNING)
            if not self._wants(counted, running, states.count(TrialState.WAITING)):
                return None, running == 0
            self.study.sampler = new_sampler(
                self.task.params.search, self.task.trials, self.task.seed_of(len(trials))
            )
            trial = self.study.ask(fixed_distributions=dict(self.space.distributions))
            self.storage.take(trial._trial_id)
            return trial, False

    def _wants(self, counted: int, running: int, waiting: int) -> bool:
        if self.is_confirming:
            # exactly those that were queued: a new one would repeat nothing
            return waiting > 0
        return counted + running < self.task.trials

    @property
    def is_confirming(self) -> bool:
        """Whether this study repeats trials of another with other seeds."""
        return self.study.user_attrs.get(CONFIRMS) is not None

    def _run(self, trial: Trial) -> None:
        frozen = self.storage.backend.get_trial(trial._trial_id)
        run = self.runs.begin(self._record(frozen))
        failure: Exception | None = None
        try:
            job = self._job(frozen)
            with self.storage.heartbeat(trial._trial_id, self.task.params.search.heartbeat_s):
                value = self.task.objective(job, self._reporter(trial, frozen, job, run))
            if not math.isfinite(value):
                raise TrialPruned("what is maximised came out as no number")
            self.study.tell(trial, value, skip_if_finished=True)
        except StorageInternalError:
            # nothing can be written; the trial is run again like that of a worker that died
            raise
        except UpdateFinishedTrialError:
            say(f"trial {frozen.number:04d} was taken over by another worker, which thought this one dead")
        except TrialPruned as pruned:
            self._tell(frozen, TrialState.PRUNED, str(pruned))
        except InputError as error:
            if not self.study.get_trials(deepcopy=False, states=_COUNTED):
                # what is wrong with the input of the first trial is wrong with that of all
                self._give_back(run, frozen, f"stopped: {error}")
                raise
            failure = error
            self._tell(frozen, TrialState.FAIL, _in_one_line(error))
        except Exception as error:
            reason = _why_pruned(error)
            if reason is None:
                failure = error
                self._tell(frozen, TrialState.FAIL, _in_one_line(error))
            else:
                self._tell(frozen, TrialState.PRUNED, reason)
        except BaseException:
            self._give_back(run, frozen, "stopped by the user")
            raise
        self._close(run, frozen)
        self._tidy()
        _free_memory()
        if failure is not None:
            self._stop_if_hopeless(failure)

    def _give_back(self, run: StageRun, trial: FrozenTrial, reason: str) -> None:
        """End a trial that is to be run again at the next start."""
        with self.storage.claim():
            self.storage.give_back(self.study, trial, reason)
        self._close(run, trial)

    def _job(self, trial: FrozenTrial) -> TrialJob:
        values = {name: trial.params[name] for name in self.space.distributions}
        params = params_with(self.task.params, values)
        seed = trial.user_attrs.get(SEED)
        if seed is not None:
            params = params.model_copy(update={"seed": seed})
        return TrialJob(params, self.task.slices, self._folder(trial), self.task.data)

    def _folder(self, trial: FrozenTrial) -> Path:
        kind = "confirm" if self.is_confirming else "trials"
        return self.task.out / kind / f"{attempts(trial)[0]:04d}"

    def _reporter(
        self, trial: Trial, frozen: FrozenTrial, job: TrialJob, run: StageRun
    ) -> Callable[[EpochReport], None]:
        """Make the callback that passes epochs on, and gives the trial up if it is not worth going on."""
        search = self.task.params.search
        epochs = job.params.train.epochs
        may_prune = search.prune and not self.is_confirming and not frozen.user_attrs.get(START)
        known = set(frozen.intermediate_values)

        def report(epoch: EpochReport) -> None:
            run.metrics(epoch.metrics(), step=epoch.epoch)
            value = epoch.volume_ap if search.prune_on == "ap" else -epoch.validation_loss
            if math.isnan(value):
                return
            step = round(STEPS * epoch.epoch / epochs)
            if step not in known:
                known.add(step)
                trial.report(value, step)
            # a trial that is at its end is judged by what it reached
            if epoch.epoch < epochs and trial.should_prune() and may_prune:
                raise TrialPruned(
                    f"given up after epoch {epoch.epoch} of {epochs}: its {_COMPARED[search.prune_on]} of "
                    f"{abs(value):.4g} was not among the best at this point"
                )

        return report

    def _tell(self, trial: FrozenTrial, state: TrialState, reason: str) -> None:
        try:
            self.storage.explain(trial, reason, is_error=state == TrialState.FAIL)
            self.study.tell(trial.number, state=state, skip_if_finished=True)
        except UpdateFinishedTrialError:
            say(f"trial {trial.number:04d} was taken over by another worker, which thought this one dead")

    def _close(self, run: StageRun, trial: FrozenTrial) -> None:
        record = self._record(self.storage.backend.get_trial(trial._trial_id))
        self.runs.end(run, record)
        say(outcome_line(record, self._best_value()))

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        return record_of(trial, confirms=self.is_confirming)

    def _best_value(self) -> float | None:
        values = [trial.value for trial in self._finished() if trial.value is not None]
        return max(values) if values else None

    def _finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def _errors(self) -> list[FrozenTrial]:
        failed = self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        return [trial for trial in failed if trial.user_attrs.get(ERROR)]

    def _tidy(self) -> None:
        """Remove the folders of ended trials, but for the best ones and those that are run again."""
        if self.is_confirming:
            keep: set[Path] = set()
        else:
            best = sorted(self._finished(), key=lambda trial: trial.value or 0.0, reverse=True)
            keep = {self._folder(trial) for trial in best[: self.task.params.search.keep_models]}
        trials = self.study.get_trials(deepcopy=False)
        keep |= {self._folder(trial) for trial in trials if not trial.state.is_finished()}
        for trial in trials:
            died = trial.state == TrialState.FAIL and not trial.user_attrs.get(ERROR)
            if trial.state.is_finished() and not died and self._folder(trial) not in keep:
                shutil.rmtree(self._folder(trial), ignore_errors=True)

    def _stop_if_hopeless(self, error: Exception) -> None:
        failures = len(self._errors()) - self._failures_before
        if failures >= self.task.params.search.max_failures:
            raise InputError(
                f"{failures} trials failed, the last one with: {_in_one_line(error)}; mend that, or raise "
                "search.max_failures, and start the search again: it goes on from here"
            ) from error


def _why_pruned(error: Exception) -> str | None:
    """Tell why a trial that ended with an error is only worse than others; None if it is a real fault."""
    text = " ".join(str(error).split())
    if _is_out_of_memory(error):
        return text if "out of memory" in text.lower() else f"out of memory: {text}"
    return text if _has_diverged(error) else None


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "alloc_failed" in text)
    )


def _free_memory() -> None:
    """Give the GPU's memory back: the next trial's batches may be of another size."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _has_diverged(error: Exception) -> bool:
    if "nuclei3d.training.loop" not in sys.modules:
        return False
    from nuclei3d.training.loop import DivergedError

    return isinstance(error, DivergedError)


# Spawned, not forked: threads and CUDA do not survive a fork.
_CONTEXT = multiprocessing.get_context("spawn")
_MAX_DEATHS = 20
_FAREWELL_S = 10.0


def run_workers(work: Callable[[], None], count: int) -> None:
    """Run `work` in so many processes until all of them have ended well.

    A process that was killed (by the system for lack of memory, say) is replaced, up to twenty times. When
    this process dies, however it dies, they die too.

    Parameters
    ----------
    work
        Can be pickled; ends when nothing is left to do.
    count
        Number of processes. They share the cores, and the GPUs in turn.

    Raises
    ------
    InputError
        If one of them ended with an error.
    """
    errors: SimpleQueue[str] = _CONTEXT.SimpleQueue()
    running: dict[SpawnProcess, int] = {}
    deaths = 0

    def start(index: int) -> None:
        process = _CONTEXT.Process(target=_serve, args=(work, index, count, errors), name=f"worker {index}")
        process.start()
        running[process] = index

    try:
        for index in range(count):
            start(index)
        while running:
            wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                index = running.pop(process)
                if process.exitcode == 0:
                    continue
                if not errors.empty():
                    raise InputError(errors.get())
                deaths += 1
                if process.exitcode is None or process.exitcode > 0 or deaths > _MAX_DEATHS:
                    raise RuntimeError(f"worker {index} ended with exit code {process.exitcode}; see above")
                say(f"worker {index} was killed by signal {-process.exitcode}; another takes its place")
                start(index)
    except KeyboardInterrupt:
        # a terminal interrupts them too, and they want to hand their trials back
        wait_until = time.monotonic() + _FAREWELL_S
        for process in running:
            process.join(max(0.0, wait_until - time.monotonic()))
        raise
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()


def _serve(work: Callable[[], None], index: int, count: int, errors: SimpleQueue[str]) -> None:
    _die_with_parent()
    _share_machine(index, count)
    try:
        work()
    except InputError as error:
        errors.put(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _share_machine(index: int, count: int) -> None:
    """Give this process its part of the cores and one GPU; before torch is imported, which looks here."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
    else:
        gpus = [name for name in visible.split(",") if name]
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]


def queue_confirmations(store: StudyStorage, study: Study, task: SearchTask) -> Study:
    """Queue the best trials, and the one of params.yaml, with other seeds; those queued before are left."""
    confirmations = optuna.create_study(
        storage=store.backend,
        study_name=f"{study.study_name}-confirm",
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


def find_confirmations(store: StudyStorage, study: Study) -> Study | None:
    """Load the study of the confirmations; None if there is none."""
    name = f"{study.study_name}-confirm"
    if name not in optuna.get_all_study_names(store.backend):
        return None
    return optuna.load_study(storage=store.backend, study_name=name)


def best_first(study: Study) -> list[FrozenTrial]:
    """List the finished trials, the best one first."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    # sorted() is stable: of equal trials the earlier one, such as that of params.yaml, stays before
    return sorted(finished, key=lambda trial: -(trial.value or 0.0))


def values_over_seeds(
    finished: list[FrozenTrial], confirmations: Study | None
) -> dict[int, tuple[float, ...]]:
    """Give what each finished trial reached: with the seed of params.yaml, then with the others."""
    values = {trial.number: [trial.value] for trial in finished if trial.value is not None}
    if confirmations is not None:
        for trial in confirmations.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            number = trial.user_attrs[CONFIRMS]
            if number in values and trial.value is not None:
                values[number].append(trial.value)
    return {number: tuple(found) for number, found in values.items()}


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
