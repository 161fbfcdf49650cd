"""MLflow runs of a search: one parent, one child per trial, in step with the study whatever was killed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nuclei3d.config import Params
from nuclei3d.config.sections import TrackingParams
from nuclei3d.console import say
from nuclei3d.experiment.runs import StageRun, is_known, stage_run
from nuclei3d.experiment.store import open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RecordedState = Literal["running", "finished", "pruned", "failed"]

# MLflow knows no "pruned": such a run was ended on purpose, which is what KILLED says.
_STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
_TRIAL_TAG = "nuclei3d.trial"
_STATE_TAG = "nuclei3d.trial_state"
_REASON_TAG = "nuclei3d.reason"
_FAILURE_TAG = "nuclei3d.failure"
# The curve that pruning compares, by thousandths of the trial's epochs; written when the trial ends.
_COMPARED = "compared"
# The most that MLflow gives at once; no search has as many trials.
_ALL = 50_000


@dataclass(frozen=True)
class TrialRecord:
    """What the study knows about one trial.

    Attributes
    ----------
    key
        Name of the trial, unique within the search, such as ``0003``.
    value
        What was maximised; None if it was never reached.
    curve
        What was compared on the way, by step.
    earlier
        Key of the attempt that this one goes on from, after its process died.
    """

    key: str
    state: RecordedState
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
        self._client = client if parent.run_id is not None else None
        self.parent = parent

    @property
    def parent_id(self) -> str | None:
        """The run of the search itself."""
        return self.parent.run_id

    def begin(self, record: TrialRecord) -> StageRun:
        """Open the run of a trial, with its parameters and the curves of an attempt that it goes on from.

        Without a server that answers the run is made from the study when the search ends.
        """
        run = StageRun(None, None)
        if self._client is None:
            return run
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        tags = {
            MLFLOW_PARENT_RUN_ID: str(self.parent_id),
            _TRIAL_TAG: record.key,
            _STATE_TAG: "running",
            "nuclei3d.stage": "search trial",
        }
        with _outage_tolerated(f"trial {record.key} goes on without a run"):
            made = self._client.create_run(self._experiment(), run_name=f"trial {record.key}", tags=tags)
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
        if self._client is None:
            return
        with _outage_tolerated("the runs of trials that were killed may be missing or open"):
            known = self._runs_of_trials()
            for record in records:
                run = known.get(record.key)
                if record.state == "running":
                    continue
                if run is None:
                    self.end(self.begin(record), record)
                elif run.info.status == "RUNNING" or run.data.tags.get(_STATE_TAG) != record.state:
                    self.end(StageRun(self._client, str(run.info.run_id)), record)

    def _copy_curves(self, key: str, run: StageRun) -> None:
        assert self._client is not None
        with _outage_tolerated(f"the curves of trial {key} are not copied"):
            earlier = self._runs_of_trials().get(key)
            if earlier is None:
                return
            by_step: dict[int, dict[str, float]] = {}
            for name in set(earlier.data.metrics) - {_COMPARED}:
                for point in self._client.get_metric_history(earlier.info.run_id, name):
                    by_step.setdefault(point.step, {})[name] = point.value
            for step, values in sorted(by_step.items()):
                run.metrics(values, step=step)

    def _runs_of_trials(self) -> dict[str, Run]:
        assert self._client is not None
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        children = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.parent_id}'"
        found = self._client.search_runs([self._experiment()], filter_string=children, max_results=_ALL)
        return {run.data.tags[_TRIAL_TAG]: run for run in found if _TRIAL_TAG in run.data.tags}

    def _experiment(self) -> str:
        assert self._client is not None
        return str(self._client.get_run(str(self.parent_id)).info.experiment_id)


@contextmanager
def search_runs(params: Params, inputs: Mapping[str, Path], parent_id: str | None) -> Iterator[TrialRuns]:
    """Open the parent run of a search, or go on with the one that an earlier start made.

    The study remembers its id; a run that is not in this store (another tracking.uri, a deleted database) is
    replaced by a new one.
    """
    if not params.tracking.enabled:
        yield TrialRuns(None, StageRun(None, None))
        return
    client = open_store(params.tracking)
    if parent_id is None or not is_known(client, parent_id):
        with stage_run("search", params, inputs=inputs) as parent:
            yield TrialRuns(client, parent)
        return
    parent = StageRun(client, parent_id)
    client.update_run(parent_id, status="RUNNING")
    outer = os.environ.get("MLFLOW_RUN_ID")
    if outer and outer != parent_id and is_known(client, outer):
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
    with _outage_tolerated("the run of the search stays open"):
        if _FAILURE_TAG in client.get_run(parent_id).data.tags:
            # of an earlier start, which this one has made good
            client.delete_tag(parent_id, _FAILURE_TAG)
        client.set_terminated(parent_id, "FINISHED")


def attached_runs(params: TrackingParams, parent_id: str | None) -> TrialRuns:
    """Join the runs of a search from another worker, which leaves the parent run's status alone."""
    if not params.enabled or parent_id is None:
        return TrialRuns(None, StageRun(None, None))
    client = open_store(params)
    return TrialRuns(client, StageRun(client, parent_id))


@contextmanager
def _outage_tolerated(consequence: str) -> Iterator[None]:
    """Go on without a tracking server that does not answer: what was computed counts for more."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError):
        say(f"warning: the tracking server does not answer; {consequence}")
