"""One worker of a search: it takes trials, runs them, and tells the study and MLflow how they ended."""

from __future__ import annotations

import gc
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from optuna import Study, Trial, TrialPruned
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.stages.search.records import CONFIRMS, SEED, START, outcome_line, record_of
from nuclei3d.stages.search.space import SearchSpace, params_with
from nuclei3d.stages.search.storage import ERROR, StudyStorage, attempts
from nuclei3d.stages.search.task import STEPS, SearchTask, TrialJob, new_sampler
from nuclei3d.tracking.runs import StageRun
from nuclei3d.tracking.trials import TrialRecord, TrialRuns

if TYPE_CHECKING:
    from nuclei3d.core.training.state import EpochReport

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
    if "nuclei3d.core.training.loop" not in sys.modules:
        return False
    from nuclei3d.core.training.loop import DivergedError

    return isinstance(error, DivergedError)
