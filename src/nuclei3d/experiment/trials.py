"""MLflow runs of a search: one parent, one child per trial, in step with the study whatever was killed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from nuclei3d.config.sections import TrackingParams
from nuclei3d.console import warn
from nuclei3d.experiment.runs import StageRun
from nuclei3d.experiment.store import open_store

if TYPE_CHECKING:
    from mlflow.entities import Run

RecordedState = Literal["waiting", "running", "finished", "pruned", "failed"]

# MLflow knows no "pruned": such a run was ended on purpose, which is what KILLED says.
_STATUS = {"waiting": "KILLED", "finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
_TRIAL_TAG = "nuclei3d.trial"
_STATE_TAG = "nuclei3d.trial_state"
_PARENT_TAG = "mlflow.parentRunId"
# The most that MLflow gives at once; no search has as many trials.
_ALL = 50_000


@dataclass(frozen=True)
class TrialRecord:
    """What the study knows about one trial: a row of its tables, and what its run says.

    `trial` is its name, such as ``0003``; `value` what was maximised (None: never reached); `curve` what was
    compared on the way, by thousandths of its epochs; `confirms` the number of the trial that this one
    repeats with another `seed` (None: none); `attempts` how often it was begun, for after its process died it
    goes on.
    """

    trial: str
    state: RecordedState
    reason: str
    values: Mapping[str, object]
    value: float | None = None
    curve: Mapping[int, float] = field(default_factory=dict)
    confirms: int | None = None
    seed: int | None = None
    attempts: int = 0
    started: str | None = None
    ended: str | None = None


class TrialRuns:
    """The runs of a search's trials below its parent run; silent when tracking is switched off.

    Runs are made and ended through a client, never as MLflow's "active run": many workers write to one
    search, and a nested active run marks a pruned trial as failed.
    """

    def __init__(self, parent: StageRun) -> None:
        self.parent = parent

    @classmethod
    def attached(cls, params: TrackingParams, parent_id: str | None) -> TrialRuns:
        """Join the runs of a search from another worker, which leaves the parent run's status alone."""
        return cls(StageRun(open_store(params) if parent_id else None, parent_id))

    def begin(self, record: TrialRecord) -> StageRun:
        """Open the run of a trial, the one that it has already if it was begun before.

        Without a server that answers the run is made from the study when the search ends.
        """
        client, run = self.parent.client, StageRun(None, None)
        if client is None:
            return run
        with _outage_tolerated(f"trial {record.trial} goes on without a run"):
            known = self._known().get(record.trial)
            if known is None:
                tags = {_PARENT_TAG: self.parent.run_id, _TRIAL_TAG: record.trial}
                tags["nuclei3d.stage"] = "search trial"
                known = client.create_run(self._experiment(), run_name=f"trial {record.trial}", tags=tags)
            else:
                client.update_run(known.info.run_id, status="RUNNING")
            run = StageRun(client, str(known.info.run_id))
        repeats = {} if record.confirms is None else {"confirms": record.confirms, "seed": record.seed}
        run.params({**record.values, **repeats})
        run.tags({_STATE_TAG: "running"})
        return run

    def end(self, run: StageRun, record: TrialRecord) -> None:
        """Close the run of a trial with its state, its reason and what it reached."""
        if run.client is None or run.run_id is None:
            return
        for step, value in record.curve.items():
            run.metrics({"compared": value}, step=step)
        if record.value is not None:
            run.metrics({"objective": record.value})
        run.tags({_STATE_TAG: record.state, "nuclei3d.reason": record.reason})
        run.finish()
        with _outage_tolerated(f"the run of trial {record.trial} stays open"):
            run.client.set_terminated(run.run_id, _STATUS[record.state])

    def reconcile(self, records: Sequence[TrialRecord]) -> None:
        """Make the runs agree with the study: end those left open by a kill, make those that are missing."""
        if self.parent.client is None:
            return
        with _outage_tolerated("the runs of trials that were killed may be missing or open"):
            known = self._known()
            for record in records:
                run = known.get(record.trial)
                if record.state == "running":
                    continue
                if run is None:
                    if record.state != "waiting":
                        self.end(self.begin(record), record)
                elif run.info.status == "RUNNING" or run.data.tags.get(_STATE_TAG) != record.state:
                    self.end(StageRun(self.parent.client, str(run.info.run_id)), record)

    def _known(self) -> dict[str, Run]:
        assert self.parent.client is not None
        children = f"tags.`{_PARENT_TAG}` = '{self.parent.run_id}'"
        found = self.parent.client.search_runs([self._experiment()], children, max_results=_ALL)
        return {run.data.tags[_TRIAL_TAG]: run for run in found if _TRIAL_TAG in run.data.tags}

    def _experiment(self) -> str:
        assert self.parent.client is not None
        return str(self.parent.client.get_run(str(self.parent.run_id)).info.experiment_id)


@contextmanager
def _outage_tolerated(consequence: str) -> Iterator[None]:
    """Go on without a tracking server that does not answer: what was computed counts for more."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError):
        warn(f"the tracking server does not answer; {consequence}")
