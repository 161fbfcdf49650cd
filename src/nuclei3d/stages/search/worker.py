"""Who runs the trials of a search: workers, each a process, that draw, run and end one trial after the other.

What a trial is known by beyond Optuna's own fields stands in its user attributes.
"""

from __future__ import annotations

import copy
import gc
import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna import Study, Trial, TrialPruned
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from nuclei3d.config import Params
from nuclei3d.config.sections import SearchParams
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.experiment.runs import StageRun
from nuclei3d.experiment.trials import RecordedState, TrialRecord, TrialRuns
from nuclei3d.stages.search.objective import Objective, TrialJob
from nuclei3d.stages.search.space import SearchSpace, params_with
from nuclei3d.stages.search.storage import StudyStorage

if TYPE_CHECKING:
    from nuclei3d.training.loop import EpochReport

START = "start"
CONFIRMS = "confirms"
SEED = "seed"
WORKER = "worker"
REASON = "reason"
ERROR = "error"
# What belongs to one attempt at a trial and is forgotten when the trial is run again.
_OF_ATTEMPT = (WORKER, REASON, ERROR)

# Trials are compared by the share of their own epochs that is done, in thousandths (see docs/search.md).
STEPS = 1000

_STOPPED = "stopped"
_POLL_S = 1.0
_MAX_DEATHS = 20
_FAREWELL_S = 10.0
_COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
_COMPARED = {"loss": "validation loss", "ap": "average precision in 3D"}
_STATES: Mapping[TrialState, RecordedState] = {
    TrialState.WAITING: "running",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class SearchTask:
    """What every worker of a search knows; it can be sent to another process.

    Attributes
    ----------
    storage, study
        Address of the storage (None: a journal in `out`) and name of the study in it.
    trials
        Finished and pruned trials wanted in all.
    """

    params: Params
    space: SearchSpace
    slices: Path
    out: Path
    data: Path | None
    storage: str | None
    study: str
    trials: int
    objective: Objective

    def folder_of(self, trial: FrozenTrial) -> Path:
        """Give the folder of a trial, which all its attempts share."""
        kind = "trials" if trial.user_attrs.get(CONFIRMS) is None else "confirm"
        return self.out / kind / f"{attempts(trial)[0]:04d}"

    def new_sampler(self, trials_so_far: int) -> TPESampler:
        """Make the sampler: random trials, then tree-structured Parzen estimators (Bergstra et al. 2011).

        The seed goes with the number of trials: a restarted search must not draw the same values again.
        """
        seed = int(np.random.SeedSequence([self.params.seed, trials_so_far]).generate_state(1)[0])
        random_trials = self.params.search.startup_trials or min(10, max(1, self.trials // 3))
        return TPESampler(n_startup_trials=random_trials, seed=seed)


class LivingTrialsPruner(SuccessiveHalvingPruner):
    """Asynchronous successive halving (Li et al. 2020) among the trials that live or ended well.

    A trial that is run again inherits the values of the attempt that died. Counted twice, they would fill the
    better half of every comparison with one and the same training, and the trial would race against itself.
    """

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Tell whether the trial is to be given up at its last step."""

        def living(*args: Any, **options: Any) -> list[FrozenTrial]:
            return [other for other in study.get_trials(*args, **options) if other.state != TrialState.FAIL]

        without_failed = copy.copy(study)
        without_failed.get_trials = living  # type: ignore[method-assign]
        return super().prune(without_failed, trial)


def new_pruner(search: SearchParams) -> BasePruner:
    """Make the pruner, which compares trials by the share of their epochs that is done."""
    if not search.prune:
        return NopPruner()
    first = max(1, round(STEPS * search.first_rung))
    return LivingTrialsPruner(min_resource=first, reduction_factor=search.reduction)


def attempts(trial: FrozenTrial) -> list[int]:
    """Give the numbers of a trial's attempts, the trial itself last; the first names its folder."""
    return [*trial.system_attrs.get("retry_history", ()), trial.number]


def best_first(study: Study) -> list[FrozenTrial]:
    """List the finished trials, the best one first."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    # sorted() is stable: of equal trials the earlier one, such as that of params.yaml, stays before
    return sorted(finished, key=lambda trial: -(trial.value or 0.0))


def record_of(trial: FrozenTrial) -> TrialRecord:
    """Describe a trial for MLflow and for the tables."""
    confirms = trial.user_attrs.get(CONFIRMS)
    prefix = "" if confirms is None else "confirmation "
    state = _STATES[trial.state]
    reason = trial.user_attrs.get(REASON, "")
    if state == "failed" and ERROR not in trial.user_attrs and not reason.startswith(_STOPPED):
        # perhaps between its reason for something else and its end
        reason = "its process died"
    repeated = {} if confirms is None else {SEED: trial.user_attrs.get(SEED), CONFIRMS: confirms}
    earlier = attempts(trial)[:-1]
    return TrialRecord(
        key=f"{prefix}{trial.number:04d}",
        state=state,
        reason=reason,
        values=trial.params | repeated,
        value=trial.value if state == "finished" else None,
        curve=dict(trial.intermediate_values),
        earlier=f"{prefix}{earlier[-1]:04d}" if earlier else None,
    )


def requeue(study: Study, max_retries: int, dead: str | None = None) -> None:
    """Queue the trials whose worker died, to be run again, with their values and curve so far.

    To be called within `StudyStorage.claim`. A trial that runs without a worker's name on it was left by one
    that died while it took the trial: taking and naming happen within one claim. Names of workers known to be
    dead begin with `dead`; of others only the heartbeat tells.
    """
    fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get(WORKER)
        if worker is None or (dead is not None and worker.startswith(dead)):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    retry = RetryHeartbeatStaleTrialCallback(max_retry=max_retries, inherit_intermediate_values=True)
    queued = {number for trial in study.get_trials(deepcopy=False) for number in attempts(trial)[:-1]}
    for trial in study.get_trials(states=(TrialState.FAIL,)):
        if trial.number not in queued and ERROR not in trial.user_attrs:
            # a copy, because the callback changes what it is given
            trial.user_attrs = {k: v for k, v in trial.user_attrs.items() if k not in _OF_ATTEMPT}
            retry(study, trial)


class TrialError(Exception):
    """A trial ended with an error that may be its own; the search goes on."""


class Worker:
    """Runs trials of one study until there are enough."""

    def __init__(
        self, name: str, task: SearchTask, storage: StudyStorage, study: Study, runs: TrialRuns
    ) -> None:
        self.name = name
        self.task = task
        self.storage = storage
        self.study = study
        self.runs = runs
        self._failures_before = len(self._errors())
        # of the trial at work
        self._number = -1
        self._run = StageRun(None, None)

    def work(self) -> None:
        """Run trials until as many are finished or pruned as are wanted, whoever ran them.

        Where the last ones run elsewhere, wait for them: should their worker die, this one takes them over.
        """
        while True:
            with ExitStack() as claim:
                claim.enter_context(self.storage.claim())
                requeue(self.study, self.task.params.search.max_retries)
                states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
                if self._wants_another(states):
                    self._run_next(claim, len(states))
                    continue
            if TrialState.RUNNING not in states:
                return
            time.sleep(_POLL_S)

    def _wants_another(self, states: list[TrialState]) -> bool:
        if CONFIRMS in self.study.user_attrs:
            # exactly those that were queued: a new one would repeat nothing
            return TrialState.WAITING in states
        return sum(state in (*_COUNTED, TrialState.RUNNING) for state in states) < self.task.trials

    def _run_next(self, claim: ExitStack, trials_so_far: int) -> None:
        self.study.sampler = self.task.new_sampler(trials_so_far)
        self._number = -1
        try:
            self.study.optimize(
                partial(self._attempt, claim), n_trials=1, catch=(TrialError,), callbacks=[self._close]
            )
        except InputError:
            raise
        except (UpdateFinishedTrialError, ValueError):
            if self._number < 0 or self._frozen().state != TrialState.FAIL:
                raise
            say(f"trial {self._number:04d} was taken over by another worker, which thought this one dead")

    def _attempt(self, claim: ExitStack, trial: Trial) -> float:
        """Compute what a trial is judged by; its reason, if it ends early, is on the trial."""
        self._number = trial.number
        trial.set_user_attr(WORKER, self.name)
        values = self.task.space.draw(trial)
        claim.close()
        frozen = self._frozen()
        self._run = self.runs.begin(record_of(frozen))
        params = params_with(self.task.params, values)
        if SEED in frozen.user_attrs:
            params = params.model_copy(update={"seed": frozen.user_attrs[SEED]})
        job = TrialJob(params, self.task.slices, self.task.folder_of(frozen), self.task.data)
        try:
            value = self.task.objective(job, self._reporter(trial, frozen, params.train.epochs))
            if not math.isfinite(value):
                raise TrialPruned("what is maximised came out as no number")
            return value
        except (StorageInternalError, UpdateFinishedTrialError):
            # nothing can be written, or not by this worker any more
            raise
        except KeyboardInterrupt:
            trial.set_user_attr(REASON, f"{_STOPPED} by the user")
            raise
        except Exception as error:
            worse = _why_only_worse(error)
            if worse is not None:
                trial.set_user_attr(REASON, worse)
                raise TrialPruned(worse) from error
            text = " ".join(str(error).split())
            if isinstance(error, InputError) and not self._ended(*_COUNTED):
                # what is wrong with the input of the first trial is wrong with that of all
                trial.set_user_attr(REASON, f"{_STOPPED}: {text}")
                raise
            reason = text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"
            trial.set_user_attr(REASON, reason)
            trial.set_user_attr(ERROR, True)
            raise TrialError(reason) from error

    def _reporter(self, trial: Trial, frozen: FrozenTrial, epochs: int) -> Callable[[EpochReport], None]:
        """Make the callback that passes epochs on, and gives the trial up if it is not worth going on."""
        search = self.task.params.search
        run = self._run
        may_prune = search.prune and not frozen.user_attrs.keys() & {START, CONFIRMS}
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

    def _close(self, study: Study, trial: FrozenTrial) -> None:
        """Tell how a trial ended, and make room for the next one."""
        record = record_of(trial)
        self.runs.end(self._run, record)
        finished = best_first(self.study)
        say(_outcome(record, finished))
        self._tidy(finished)
        _free_memory()
        failures = len(self._errors()) - self._failures_before
        if ERROR in trial.user_attrs and failures >= self.task.params.search.max_failures:
            raise InputError(
                f"{failures} trials failed, the last one with: {record.reason}; mend that, or raise "
                "search.max_failures, and start the search again: it goes on from here"
            )

    def _tidy(self, finished: list[FrozenTrial]) -> None:
        """Remove the folders of ended trials, but for the best ones and those that are run again."""
        models = 0 if CONFIRMS in self.study.user_attrs else self.task.params.search.keep_models
        keep = {self.task.folder_of(trial) for trial in finished[:models]}
        for trial in self.study.get_trials(deepcopy=False):
            died = trial.state == TrialState.FAIL and ERROR not in trial.user_attrs
            if died or not trial.state.is_finished():
                keep.add(self.task.folder_of(trial))
        for trial in self._ended(*_COUNTED, TrialState.FAIL):
            if self.task.folder_of(trial) not in keep:
                shutil.rmtree(self.task.folder_of(trial), ignore_errors=True)

    def _frozen(self) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[self._number]

    def _ended(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def _errors(self) -> list[FrozenTrial]:
        return [trial for trial in self._ended(TrialState.FAIL) if ERROR in trial.user_attrs]


def _why_only_worse(error: Exception) -> str | None:
    """Tell why a trial is no more than worse than others; None where it ended with a real fault."""
    text = " ".join(str(error).split())
    out_of_memory = "out of memory" in text.lower()
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and (out_of_memory or "alloc_failed" in text.lower())
    ):
        return text if out_of_memory else f"out of memory: {text}"
    # a training that was never begun has not diverged, and its module is slow to import
    training = sys.modules.get("nuclei3d.training.loop")
    diverged = training is not None and isinstance(error, training.DivergedError)
    return text if diverged or isinstance(error, TrialPruned) else None


def _free_memory() -> None:
    """Give the GPU's memory back: the next trial's batches may be of another size."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _outcome(record: TrialRecord, finished: list[FrozenTrial]) -> str:
    values = ", ".join(
        f"{name.removeprefix('train.')} {f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in record.values.items()
    )
    if record.value is None:
        return f"trial {record.key} ({values}): {record.state}: {record.reason}"
    return f"trial {record.key} ({values}): {record.value:.4f}, best {finished[0].value:.4f}"


def run_workers(work: Callable[[str], None], name: str, count: int, bury: Callable[[str], None]) -> None:
    """Run `work`, which is given the worker's name, in so many processes until all of them have ended well.

    They share the cores, and the GPUs in turn. One that dies (killed by the system for lack of memory, say)
    is buried by its name and replaced, up to twenty times. When this process dies, however it dies, they die
    too. An error of one ends all, and is raised here.
    """
    running: dict[Future[None], tuple[int, str]] = {}
    deaths = 0

    def start(index: int) -> None:
        # spawned, not forked: threads and CUDA do not survive a fork; a pool each, because a death breaks one
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(1, context, initializer=_settle_in, initargs=(index, count))
        own_name = f"{name}/{uuid.uuid4().hex}"
        running[pool.submit(work, own_name)] = (index, own_name)
        pool.shutdown(wait=False)

    try:
        for index in range(count):
            start(index)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index, own_name = running.pop(future)
                try:
                    future.result()
                except BrokenProcessPool:
                    deaths += 1
                    if deaths > _MAX_DEATHS:
                        raise
                    say(f"worker {index} was killed; another takes its place")
                    bury(own_name)
                    start(index)
    except KeyboardInterrupt:
        # a terminal interrupts them too, and they want to hand their trials back
        wait(running, timeout=_FAREWELL_S)
        raise
    finally:
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()


def _settle_in(index: int, count: int) -> None:
    """Tie a worker to its parent, and give it its part of the cores and one GPU, before torch looks there."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def die_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
    else:
        gpus = [name for name in visible.split(",") if name]
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
