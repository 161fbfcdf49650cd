"""MLflow runs of a search: one parent, one child per trial, in step with the study whatever was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nuclei3d.config import Params
from nuclei3d.config.sections import TrackingParams
from nuclei3d.console import say
from nuclei3d.experiment.runs import StageRun, stage_run
from nuclei3d.experiment.store import experiment_id, open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

TrialState = Literal["running", "finished", "pruned", "failed"]

# MLflow knows no "pruned": such a run was ended on purpose, which is what KILLED says.
_STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
_TRIAL_TAG = "nuclei3d.trial"
_STATE_TAG = "nuclei3d.trial_state"
# The curve that pruning compares, by thousandths of the trial's epochs; written when the trial ends.
_COMPARED = "compared"
_REASON_TAG = "nuclei3d.reason"
_SEARCH_TAG = "nuclei3d.search"
_FAILURE_TAG = "nuclei3d.failure"
# MLflow's own: tags, as JSON, for every run that it creates
_BIRTH_TAGS_VARIABLE = "MLFLOW_RUN_CONTEXT"


@dataclass(frozen=True)
class TrialRecord:
    """What the study knows about one trial.

    Attributes
    ----------
    key
        Name of the trial, unique within the search, such as ``0003``.
    state, reason
        How it ended, and why.
    values
        Its parameters by dotted name.
    value
        What was maximised; None if it was never reached.
    curve
        What was compared on the way, by step.
    earlier
        Key of the attempt that this one goes on from, after its process died.
    """

    key: str
    state: TrialState
    reason: str
    values: Mapping[str, object]
    value: float | None = None
    curve: Mapping[int, float] = field(default_factory=dict)
    earlier: str | None = None


class TrialRuns:
    """The runs of a search's trials below its parent run; silent when tracking is switched off.

    Runs are made and ended through a client, never as MLflow's "active run": many workers write to one
    search, and a nested active run marks a pruned trial as failed.
    """

    def __init__(self, client: MlflowClient | None, parent: StageRun) -> None:
        self._client = client
        self.parent = parent

    @property
    def parent_id(self) -> str | None:
        """The run of the search itself."""
        return self.parent.run_id

    def begin(self, record: TrialRecord) -> StageRun:
        """Open the run of a trial, with its parameters and the curves of an attempt that it goes on from."""
        if self._client is None or self.parent_id is None:
            return StageRun(None, None)
        from mlflow.exceptions import MlflowException
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        try:
            experiment = self._client.get_run(self.parent_id).info.experiment_id
            made = self._client.create_run(
                experiment,
                run_name=f"trial {record.key}",
                tags={
                    MLFLOW_PARENT_RUN_ID: self.parent_id,
                    _TRIAL_TAG: record.key,
                    _STATE_TAG: "running",
                    "nuclei3d.stage": "search trial",
                },
            )
        except (MlflowException, OSError):
            # the run is made from the study when the search ends
            say(f"warning: the tracking server does not answer; trial {record.key} goes on without a run")
            return StageRun(None, None)
        run = StageRun(self._client, str(made.info.run_id))
        run.params(record.values)
        if record.earlier is not None:
            run.tags({"nuclei3d.goes_on_from": record.earlier})
            self._copy_curves(record.earlier, run)
        return run

    def end(self, run: StageRun, record: TrialRecord) -> None:
        """Close the run of a trial with its state, its reason and what it reached."""
        if self._client is None or run.run_id is None:
            return
        for step, value in record.curve.items():
            run.metrics({_COMPARED: value}, step=step)
        if record.value is not None:
            run.metrics({"objective": record.value})
        run.tags({_STATE_TAG: record.state, _REASON_TAG: record.reason})
        run.finish()
        with _outage_tolerated(f"the run of trial {record.key} stays open"):
            self._client.set_terminated(run.run_id, _STATUS[record.state])

    def reconcile(self, records: Sequence[TrialRecord]) -> None:
        """Make the runs agree with the study: end those left open by a kill, make those that are missing."""
        if self._client is None or self.parent_id is None:
            return
        with _outage_tolerated("the runs of trials that were killed may be missing or open"):
            known = self._known_states()
            for record in records:
                if record.state == "running":
                    continue
                if record.key not in known:
                    self.end(self.begin(record), record)
                    continue
                run_id, state = known[record.key]
                if state != record.state:
                    self.end(StageRun(self._client, run_id), record)

    def close_parent(self) -> None:
        """Mark the run of the search as finished, also where the process that opened it is gone."""
        if self._client is None or self.parent_id is None:
            return
        with _outage_tolerated("the run of the search stays open"):
            if _FAILURE_TAG in self._client.get_run(self.parent_id).data.tags:
                # of an earlier start, which this one has made good
                self._client.delete_tag(self.parent_id, _FAILURE_TAG)
            self._client.set_terminated(self.parent_id, "FINISHED")

    def _known_states(self) -> dict[str, tuple[str, str]]:
        """Give run id and state of every trial's run; a run still open says so whatever its tag says."""
        found: dict[str, tuple[str, str]] = {}
        for run in self._runs_of_trials():
            still_open = run.info.status == "RUNNING"
            state = "running" if still_open else run.data.tags.get(_STATE_TAG, "running")
            found[run.data.tags[_TRIAL_TAG]] = (str(run.info.run_id), state)
        return found

    def _copy_curves(self, key: str, run: StageRun) -> None:
        assert self._client is not None
        with _outage_tolerated(f"the curves of trial {key} are not copied"):
            for earlier in self._runs_of_trials(key):
                by_step: dict[int, dict[str, float]] = {}
                for name in set(earlier.data.metrics) - {_COMPARED}:
                    for point in self._client.get_metric_history(earlier.info.run_id, name):
                        by_step.setdefault(point.step, {})[name] = point.value
                for step, values in sorted(by_step.items()):
                    run.metrics(values, step=step)

    def _runs_of_trials(self, key: str | None = None) -> Iterator[Run]:
        """Give the runs of all trials, or of one."""
        assert self._client is not None
        assert self.parent_id is not None
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        wanted = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.parent_id}'"
        if key is not None:
            wanted += f" and tags.`{_TRIAL_TAG}` = '{key}'"
        experiment = self._client.get_run(self.parent_id).info.experiment_id
        token = None
        while True:
            page = self._client.search_runs(
                [experiment], filter_string=wanted, max_results=500, page_token=token
            )
            yield from (run for run in page if _TRIAL_TAG in run.data.tags)
            token = page.token
            if not token:
                return


@contextmanager
def search_runs(
    params: Params, inputs: Mapping[str, Path], parent_id: str | None, mark: str
) -> Iterator[TrialRuns]:
    """Open the parent run of a search, or go on with the one that an earlier start made.

    Parameters
    ----------
    params, inputs
        As for `stage_run`.
    parent_id
        The run that the study remembers; None for a new study. A run that is not in this store (another
        tracking.uri, a deleted database) is replaced by a new one.
    mark
        A text that tells this search from all others. It is on the parent run from its first moment, so that
        a run whose process was killed before the study could remember it is found and closed.
    """
    if not params.tracking.enabled:
        yield TrialRuns(None, StageRun(None, None))
        return
    client = open_store(params.tracking)
    if parent_id is None or not _is_known(client, parent_id):
        _close_orphans(client, params.tracking, mark)
        with ExitStack() as stack:
            with _tags_at_birth({_SEARCH_TAG: mark}):
                parent = stack.enter_context(stage_run("search", params, inputs=inputs))
            yield TrialRuns(client, parent)
        return
    parent = StageRun(client, parent_id)
    client.update_run(parent_id, status="RUNNING")
    outer = os.environ.get("MLFLOW_RUN_ID")
    if outer and outer != parent_id and _is_known(client, outer):
        # `mlflow run` made a run for this start, too; it says where the results are
        client.set_tag(outer, "nuclei3d.continues", parent_id)
    try:
        yield TrialRuns(client, parent)
    except BaseException as error:
        parent.tags({_FAILURE_TAG: f"{type(error).__name__}: {' '.join(str(error).split())}"})
        parent.finish()
        client.set_terminated(parent_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    parent.finish()


def attached_runs(params: TrackingParams, parent_id: str | None) -> TrialRuns:
    """Join the runs of a search from another worker, which leaves the parent run's status alone."""
    if not params.enabled or parent_id is None:
        return TrialRuns(None, StageRun(None, None))
    client = open_store(params)
    return TrialRuns(client, StageRun(client, parent_id))


def _is_known(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException:
        return False


@contextmanager
def _outage_tolerated(consequence: str) -> Iterator[None]:
    """Go on without a tracking server that does not answer: what was computed counts for more."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError):
        say(f"warning: the tracking server does not answer; {consequence}")


@contextmanager
def _tags_at_birth(tags: Mapping[str, str]) -> Iterator[None]:
    """Have MLflow put tags on the runs that it creates, in one step with their creation."""
    before = os.environ.get(_BIRTH_TAGS_VARIABLE)
    os.environ[_BIRTH_TAGS_VARIABLE] = json.dumps(dict(tags))
    try:
        yield
    finally:
        if before is None:
            del os.environ[_BIRTH_TAGS_VARIABLE]
        else:
            os.environ[_BIRTH_TAGS_VARIABLE] = before


def _close_orphans(client: MlflowClient, params: TrackingParams, mark: str) -> None:
    found = client.search_runs(
        [experiment_id(client, params)], f"tags.`{_SEARCH_TAG}` = '{mark}' and attributes.status = 'RUNNING'"
    )
    for run in found:
        client.set_tag(run.info.run_id, _REASON_TAG, "killed before the search began")
        client.set_terminated(run.info.run_id, "KILLED")
