"""Who runs the trials of a search: workers, each a process, that draw, run and end one trial after the other.

What a trial is known by beyond Optuna's own fields stands in its user attributes.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from optuna import Study, Trial, TrialPruned
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState

from nuclei3d.config import Params
from nuclei3d.config.sections import SearchParams
from nuclei3d.console import say
from nuclei3d.errors import InputError, reason_of
from nuclei3d.experiment.runs import StageRun
from nuclei3d.experiment.trials import RecordedState, TrialRecord, TrialRuns
from nuclei3d.stages import end_children
from nuclei3d.stages.search.objective import Objective, TrialJob
from nuclei3d.stages.search.space import SearchSpace, params_with
from nuclei3d.stages.search.storage import WORKER, StudyStorage
from nuclei3d.worker import tie_to_parent

if TYPE_CHECKING:
    from nuclei3d.training.loop import EpochReport

START = "start"
CONFIRMS = "confirms"
SEED = "seed"
REASON = "reason"
ATTEMPTS = "attempts"

# Trials are compared by the share of their own epochs that is done, in thousandths (see docs/search.md).
STEPS = 1000

_POLL_S = 1.0
_MAX_DEATHS = 20
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
_COMPARED = {"loss": "validation loss", "ap": "average precision in 3D"}
_STATES: Mapping[TrialState, RecordedState] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class SearchTask:
    """What every worker of a search knows; it can be sent to another process.

    `storage` is the address of the storage (None: a journal in `out`), `study` the name of the study in it,
    and `trials` how many are wanted, finished and pruned, in all.
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
        """Give the folder of a trial."""
        return self.out / "trials" / f"{trial.number:04d}"

    def new_sampler(self, trials_so_far: int) -> TPESampler:
        """Make the sampler: random trials, then tree-structured Parzen estimators (Bergstra et al. 2011).

        The seed goes with the number of trials: a restarted search must not draw the same values again.
        """
        seed = int(np.random.SeedSequence([self.params.seed, trials_so_far]).generate_state(1)[0])
        random_trials = self.params.search.startup_trials or min(10, max(1, self.trials // 3))
        return TPESampler(n_startup_trials=random_trials, seed=seed)


def new_pruner(search: SearchParams) -> BasePruner:
    """Make the pruner: asynchronous successive halving (Li et al. 2020) by the share of epochs done."""
    if not search.prune:
        return NopPruner()
    first = max(1, round(STEPS * search.first_rung))
    return SuccessiveHalvingPruner(min_resource=first, reduction_factor=search.reduction)


def counted(study: Study, *states: TrialState) -> list[FrozenTrial]:
    """List the trials in any of these states, without those that repeat another one with its own seed."""
    trials = study.get_trials(deepcopy=False, states=states)
    return [trial for trial in trials if CONFIRMS not in trial.user_attrs]


def best_first(study: Study) -> list[FrozenTrial]:
    """List the finished trials, the best one first."""
    # sorted() is stable: of equal trials the earlier one, such as that of params.yaml, stays before
    return sorted(counted(study, TrialState.COMPLETE), key=lambda trial: -(trial.value or 0.0))


def record_of(trial: FrozenTrial) -> TrialRecord:
    """Describe a trial for MLflow and for the tables."""
    state = _STATES[trial.state]
    return TrialRecord(
        trial=f"{trial.number:04d}",
        state=state,
        # a trial that was gone on with may still have the reason of the attempt before
        reason=trial.user_attrs.get(REASON, "") if state in ("pruned", "failed") else "",
        values=trial.params,
        value=trial.value if state == "finished" else None,
        curve=dict(sorted(trial.intermediate_values.items())),
        confirms=trial.user_attrs.get(CONFIRMS),
        seed=trial.user_attrs.get(SEED),
        attempts=trial.user_attrs.get(ATTEMPTS, 0),
        started=_time(trial.datetime_start),
        ended=_time(trial.datetime_complete),
    )


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="seconds")


class TrialError(Exception):
    """A trial ended with an error that may be its own; the search goes on."""


class _Left(BaseException):
    """The worker leaves a trial that is not at its end, by reason of its cause; None: it is another's now.

    No Exception, for after these Optuna ends the trial as failed.
    """


@dataclass
class Worker:
    """Runs trials of a study until there are enough."""

    name: str
    task: SearchTask
    store: StudyStorage
    study: Study
    runs: TrialRuns

    def __post_init__(self) -> None:
        self.search = self.task.params.search
        self._failures_before = self._failures()
        # of the trial at work
        self._run = StageRun(None, None)

    def work(self) -> None:
        """Run trials until as many are finished or pruned as are wanted, whoever ran them; then confirm.

        Where the last ones run elsewhere, wait for them: should their worker die, this one takes them over.
        """
        while True:
            with ExitStack() as claim:
                claim.enter_context(self.store.claim())
                self.store.requeue(self.study)
                searching = len(counted(self.study, *COUNTED, TrialState.RUNNING)) < self.task.trials
                running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
                if not searching and not running:
                    self._queue_confirmations()
                waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
                if searching or any(CONFIRMS in trial.user_attrs for trial in waiting):
                    self._run_next(claim)
                    continue
            if not running:
                return
            time.sleep(_POLL_S)

    def _queue_confirmations(self) -> None:
        """Queue the best trials, and the one of params.yaml, with other seeds: they tell luck from merit."""
        attrs = [trial.user_attrs for trial in self.study.get_trials(deepcopy=False)]
        queued = {(known.get(CONFIRMS), known.get(SEED)) for known in attrs}
        best = best_first(self.study)
        chosen = best[: self.search.confirm_top]
        chosen += [trial for trial in best if trial.user_attrs.get(START) and trial not in chosen]
        first = self.task.params.seed + 1
        for trial in chosen:
            for seed in range(first, first + self.search.confirm_seeds):
                if (trial.number, seed) not in queued:
                    repeat = {CONFIRMS: trial.number, SEED: seed}
                    self.study.enqueue_trial(dict(trial.params), user_attrs=repeat)

    def _run_next(self, claim: ExitStack) -> None:
        self.study.sampler = self.task.new_sampler(len(self.study.get_trials(deepcopy=False)))
        try:
            self.study.optimize(
                partial(self._attempt, claim),
                n_trials=1,
                catch=(TrialError,),
                callbacks=[self._close],
                gc_after_trial=True,
            )
        except _Left as left:
            if left.__cause__ is not None:
                raise left.__cause__ from None
            say("a trial was taken over by another worker, which thought this one dead")

    def _attempt(self, claim: ExitStack, trial: Trial) -> float:
        """Compute what a trial is judged by; its reason, if it ends early, is on the trial."""
        attrs = trial.user_attrs
        try:
            trial.set_user_attr(WORKER, self.name)
            trial.set_user_attr(ATTEMPTS, attrs.get(ATTEMPTS, 0) + 1)
            params = params_with(self.task.params, self.task.space.draw(trial))
            if SEED in attrs:
                params = params.model_copy(update={"seed": attrs[SEED]})
            self.store.beat(trial._trial_id)
            claim.close()
            frozen = self._frozen(trial)
            self._run = self.runs.begin(record_of(frozen))
            if attrs.get(ATTEMPTS, 0) > self.search.max_retries:
                raise TrialError(f"its process died {attrs[ATTEMPTS]} times")
            job = TrialJob(params, self.task.slices, self.task.folder_of(frozen), self.task.data)
            value = self.task.objective(job, self._reporter(trial, params.train.epochs))
            self._leave_if_taken_over(trial)
            if not math.isfinite(value):
                raise TrialPruned("what is maximised came out as no number")
            return value
        except UpdateFinishedTrialError:
            raise _Left from None
        except (StorageInternalError, KeyboardInterrupt) as error:
            raise _Left from error
        except Exception as error:
            worse = _why_only_worse(error)
            text = worse or reason_of(error)
            if worse is None and isinstance(error, InputError) and not counted(self.study, *COUNTED):
                # what is wrong with the input of the first trial is wrong with that of all
                raise _Left from error
            if worse is None and not isinstance(error, InputError | TrialError):
                text = f"{type(error).__name__}: {text}"
            trial.set_user_attr(REASON, text)
            raise (TrialError if worse is None else TrialPruned)(text) from error

    def _reporter(self, trial: Trial, epochs: int) -> Callable[[EpochReport], None]:
        """Make the callback that passes epochs on, and gives the trial up if it is not worth going on."""
        run, compared = self._run, CONFIRMS not in trial.user_attrs

        def report(epoch: EpochReport) -> None:
            self._leave_if_taken_over(trial)
            run.metrics(epoch.metrics(), step=epoch.epoch)
            value = epoch["volume_ap"] if self.search.prune_on == "ap" else -epoch["validation_loss"]
            if math.isnan(value):
                return
            trial.report(value, round(STEPS * epoch.epoch / epochs))
            # a trial that is at its end is judged by what it reached
            if epoch.epoch < epochs and compared and trial.should_prune() and START not in trial.user_attrs:
                raise TrialPruned(
                    f"given up after epoch {epoch.epoch} of {epochs}: its {_COMPARED[self.search.prune_on]} "
                    f"of {abs(value):.4g} was not among the best at this point"
                )

        return report

    def _leave_if_taken_over(self, trial: Trial) -> None:
        if self._frozen(trial).user_attrs.get(WORKER) != self.name:
            raise _Left

    def _close(self, study: Study, trial: FrozenTrial) -> None:
        """Tell how a trial ended, and make room for the next one."""
        record = record_of(trial)
        self.runs.end(self._run, record)
        finished = best_first(study)
        say(_outcome(record, finished))
        keep = {self.task.folder_of(trial) for trial in finished[: self.search.keep_models]}
        for ended in study.get_trials(deepcopy=False):
            if ended.state.is_finished() and self.task.folder_of(ended) not in keep:
                shutil.rmtree(self.task.folder_of(ended), ignore_errors=True)
        if "torch" in sys.modules:
            # the next trial's batches may be of another size
            sys.modules["torch"].cuda.empty_cache()
        failures = self._failures() - self._failures_before
        if trial.state == TrialState.FAIL and failures >= self.search.max_failures:
            raise InputError(
                f"{failures} trials failed, the last one with: {record.reason}; mend that, or raise "
                "search.max_failures, and start the search again: it goes on from here"
            )

    def _failures(self) -> int:
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,)))

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[trial.number]


def _why_only_worse(error: Exception) -> str | None:
    """Tell why a trial is no more than worse than others; None where it ended with a real fault."""
    text = reason_of(error)
    out_of_memory = "out of memory" in text.lower()
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and (out_of_memory or "alloc_failed" in text.lower())
    ):
        return text if out_of_memory else f"out of memory: {text}"
    # a training that was never begun has not diverged, and its module is slow to import
    training = sys.modules.get("nuclei3d.training.loop")
    diverged = training is not None and isinstance(error, training.DivergedError)
    return text if diverged or isinstance(error, TrialPruned) else None


def _outcome(record: TrialRecord, finished: list[FrozenTrial]) -> str:
    values = ", ".join(
        f"{name.removeprefix('train.')} {f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in record.values.items()
    )
    if record.value is None:
        return f"trial {record.trial} ({values}): {record.state}: {record.reason}"
    return f"trial {record.trial} ({values}): {record.value:.4f}, best {finished[0].value:.4f}"


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
    finally:
        end_children()


def _settle_in(index: int, count: int) -> None:
    """Tie a worker to its parent, and give it its part of the cores and one GPU, before torch looks there."""
    tie_to_parent()
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
    else:
        gpus = [name for name in visible.split(",") if name]
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
