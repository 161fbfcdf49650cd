"""One MLflow run per stage, with its provenance, that works under `mlflow run`, under DVC and bare."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nuclei3d.config import Params
from nuclei3d.config.loading import flat
from nuclei3d.console import warn
from nuclei3d.errors import InputError, reason_of
from nuclei3d.experiment.provenance import environment_listing, trace_provenance
from nuclei3d.experiment.store import (
    experiment_id,
    open_store,
    show_as_training,
    store_uri,
    without_passwords,
)
from nuclei3d.outputs import write_json

if TYPE_CHECKING:
    from mlflow import ActiveRun, MlflowClient

# The sections of params.yaml whose values are logged as parameters of a stage's run; the whole file is
# always kept as an artifact.
_SECTIONS = {
    "simulate": ("simulate",),
    "prepare": ("data", "normalization", "prepare"),
    "train": ("train",),
    "predict": ("predict",),
    "evaluate": ("predict", "evaluate"),
    "register": ("tracking",),
}
_PAUSE_S = 60.0
_MAX_ENTRIES_IN_BATCH = 100
_MAX_VALUE_LENGTH = 5000
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST")
_PROCESS_TAG = "nuclei3d.process"
_JOB_TAG = "nuclei3d.job"
#: MD5 of the metrics.json that an evaluation wrote: by it a registration finds the run.
METRICS_TAG = "nuclei3d.evaluation_md5"
_FAILURE_TAG = "nuclei3d.failure"


class StageRun:
    """A thin handle on one MLflow run; a silent one (`run_id` None) when tracking is switched off.

    A server that stops answering in the middle does not take hours of computing with it: what could not be
    sent is kept and sent with the next values, and the user is told once.
    """

    def __init__(self, client: MlflowClient | None, run_id: str | None, stage: str = "") -> None:
        self.client = client
        self.stage = stage
        self._unsent: list[Callable[[], None]] = []
        self._next_try = 0.0
        self.run_id = run_id

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers under their names, as points of curves if `step` is given."""
        now = int(time.time() * 1000)
        self._log(
            "metrics", "Metric", [(name, float(value), now, step or 0) for name, value in values.items()]
        )

    def params(self, values: Mapping[str, object]) -> None:
        """Log settings; a name with a dot cannot collide with the parameters that `mlflow run` logs."""
        self._log("params", "Param", [(name, _short(value)) for name, value in values.items()])

    def tags(self, values: Mapping[str, object]) -> None:
        """Set tags."""
        self._log("tags", "RunTag", [(name, _short(value)) for name, value in values.items()])

    def note(self, text: str) -> None:
        """Set the description that the MLflow UI shows on top of the run (Markdown)."""
        self.tags({"mlflow.note.content": text})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a file, or of a folder with all it holds, under `folder` of the run's artifacts."""
        if path.is_dir():
            self._send("log_artifacts", str(path), "/".join(part for part in (folder, path.name) if part))
        else:
            self._send("log_artifact", str(path), folder or None)

    def text(self, text: str, name: str) -> None:
        """Keep a text as the artifact `name`."""
        self._send("log_text", text, name)

    def figure(self, figure: object, name: str) -> None:
        """Keep a matplotlib or plotly figure as the artifact `name`, such as ``curves.png``."""
        self._send("log_figure", figure, name)

    def finish(self) -> None:
        """Send what is still waiting; say so where that fails."""
        self._next_try = 0.0
        if self._flush():
            return
        warn(f"{len(self._unsent)} entries of run {self.run_id} never reached the tracking server")

    def _log(self, kind: str, entity: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if self.client is None:
            return
        from mlflow import entities

        made = [getattr(entities, entity)(*row) for row in rows]
        for first in range(0, len(made), _MAX_ENTRIES_IN_BATCH):
            self._send("log_batch", **{kind: made[first : first + _MAX_ENTRIES_IN_BATCH]})

    def _send(self, method: str, *values: Any, **named: Any) -> None:
        if self.client is None:
            return
        client = self.client
        self._unsent.append(lambda: getattr(client, method)(self.run_id, *values, **named))
        if not self._flush():
            warn("the tracking server stopped answering; going on, trying again with the next values")

    def _flush(self) -> bool:
        from mlflow.exceptions import MlflowException

        if time.monotonic() < self._next_try:
            return False
        while self._unsent:
            try:
                self._unsent[0]()
            except (MlflowException, OSError) as error:
                # a request that the server refused is our mistake; anything else, that it does not answer
                if getattr(error, "error_code", "") in _REFUSALS:
                    self._unsent.pop(0)
                    raise
                # each try can cost seconds, of which there must not be one per value
                self._next_try = time.monotonic() + _PAUSE_S
                return False
            self._unsent.pop(0)
        return True


# The runs of this process that are open, innermost last.
_open_runs: list[StageRun] = []


@contextmanager
def stage_run(
    stage: str,
    params: Params,
    *,
    inputs: Mapping[str, Path],
    name: str | None = None,
    job: str | None = None,
    earlier: str | None = None,
) -> Iterator[StageRun]:
    """Open the MLflow run of a stage, log where its result comes from, and close it with its outcome.

    Under `mlflow run` the first stage of the process adopts the run that MLflow made. Inside another
    `stage_run` (the pipeline) the new run is a child; inside one of the same stage it is that very run.
    Otherwise it is a run of its own in the experiment `tracking.experiment`.

    The parameters of the stage's own sections are logged, the rest is an artifact; the MD5s of `inputs`,
    files or folders that the stage reads, by name (``data``, ``slices``, ``model``), become tags. `name` is
    that of the run, where it says more than the stage's. A `job` is what tells this one from all others: the
    last run of it, unless it finished, is gone on with. So is `earlier`, the id of a run, whatever its end,
    with the parameters that it has; one that the store does not know (another tracking.uri, a deleted
    database) is replaced by a new one.
    """
    if not params.tracking.enabled:
        yield StageRun(None, None)
        return
    if _open_runs and _open_runs[-1].stage == stage:
        yield _open_runs[-1]
        return
    client = open_store(params.tracking)
    provenance = trace_provenance(params, inputs, device=_device_of(stage, params))
    close_abandoned(client)
    run_id = _begin(client, params, name or stage, job, earlier)
    run = StageRun(client, run_id, stage)
    _open_runs.append(run)
    try:
        run.tags({"nuclei3d.stage": stage, _PROCESS_TAG: _process(), **provenance.as_tags()})
        if job is not None:
            run.tags({_JOB_TAG: job})
        if run_id != earlier:
            run.params(_stage_params(stage, params))
            listing = yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False)
            run.text(without_passwords(listing), "lineage/params.yaml")
            run.text(json.dumps(asdict(provenance), indent=2), "lineage/lineage.json")
            run.text(environment_listing(), "lineage/environment.txt")
        yield run
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)
        run.tags({_FAILURE_TAG: f"{type(error).__name__}: {reason_of(error)}"})
        run.finish()
        _end("KILLED" if stopped else "FAILED")
        raise
    finally:
        _open_runs.remove(run)
    run.finish()
    _end("FINISHED")
    _write_record(stage, run_id)


def is_known(client: MlflowClient, run_id: str) -> bool:
    """Tell whether the store has a run."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException:
        return False


def close_abandoned(client: MlflowClient) -> None:
    """Mark the runs that killed processes of this machine left open as KILLED."""
    import psutil

    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    prefix = f"{socket.gethostname()}:"
    found = client.search_runs(
        experiments, f"attributes.status = 'RUNNING' AND tags.`{_PROCESS_TAG}` LIKE '{prefix}%'"
    )
    for run in found:
        pid, _, started = run.data.tags[_PROCESS_TAG].removeprefix(prefix).partition("@")
        try:
            alive = f"{psutil.Process(int(pid)).create_time():.0f}" == started
        except (psutil.Error, ValueError):
            alive = False
        if not alive:
            client.set_tag(run.info.run_id, _FAILURE_TAG, "its process was killed")
            client.set_terminated(run.info.run_id, "KILLED")


def _process() -> str:
    """Name this process so that another one can tell whether it still lives (process ids are used again)."""
    import psutil

    return f"{socket.gethostname()}:{os.getpid()}@{psutil.Process().create_time():.0f}"


def _unfinished_run(client: MlflowClient, params: Params, job: str | None) -> str | None:
    if job is None:
        return None
    found = client.search_runs(
        [experiment_id(client, params.tracking)],
        f"tags.`{_JOB_TAG}` = '{job}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return next((str(run.info.run_id) for run in found if run.info.status != "FINISHED"), None)


def _begin(client: MlflowClient, params: Params, name: str, job: str | None, earlier: str | None) -> str:
    import mlflow

    around = mlflow.active_run()
    adopted = os.environ.get("MLFLOW_RUN_ID")
    if earlier is not None and is_known(client, earlier):
        if adopted and adopted != earlier and is_known(client, adopted):
            # `mlflow run` made a run for this start, too; it says where the results are
            client.set_tag(adopted, "nuclei3d.continues", earlier)
        run = _go_on(client, earlier)
    elif around is not None:
        # parent_run_id is given although MLflow could find it: nested runs under `mlflow run` have been
        # seen to overwrite their parent (mlflow#15713).
        run = mlflow.start_run(
            experiment_id=around.info.experiment_id,
            run_name=name,
            nested=True,
            parent_run_id=around.info.run_id,
        )
    elif adopted:
        # The run was made by `mlflow run`, in the experiment of its choice: no set_experiment here.
        if not is_known(client, adopted):
            raise InputError(
                f"the run {adopted} that `mlflow run` made is not in the store "
                f"{without_passwords(store_uri(params.tracking))}; "
                "name one store for both: export MLFLOW_TRACKING_URI=sqlite:////absolute/path/mlflow.db"
            )
        run = mlflow.start_run()
        client.set_tag(run.info.run_id, "mlflow.runName", name)
        show_as_training(client, run.info.experiment_id)
    elif unfinished := _unfinished_run(client, params, job):
        run = _go_on(client, unfinished)
    else:
        run = mlflow.start_run(experiment_id=experiment_id(client, params.tracking), run_name=name)
    return str(run.info.run_id)


def _go_on(client: MlflowClient, run_id: str) -> ActiveRun:
    import mlflow

    run = mlflow.start_run(run_id=run_id, nested=True)
    if _FAILURE_TAG in run.data.tags:
        # of an earlier start, which this one makes good
        client.delete_tag(run_id, _FAILURE_TAG)
    return run


def _end(status: str) -> None:
    """Close the run; a server that no longer answers leaves it open there, but not here."""
    import mlflow

    try:
        mlflow.end_run(status)
    except (mlflow.exceptions.MlflowException, OSError):
        warn("the tracking server does not answer; the run stays marked as running there")


def _stage_params(stage: str, params: Params) -> dict[str, object]:
    tree = params.model_dump(mode="json", exclude={"seed"})
    values = flat({name: tree[name] for name in _SECTIONS.get(stage, tree)})
    shown = {name: without_passwords(v) if isinstance(v, str) else v for name, v in values.items()}
    return {"run.seed": params.seed, **shown}


def _device_of(stage: str, params: Params) -> str | None:
    if stage == "train":
        return params.train.device
    if stage in ("predict", "search", "pipeline"):
        return params.predict.device
    return None


def _write_record(stage: str, run_id: str) -> None:
    """Under DVC, leave the run's id in runs/dvc/<stage>.json.

    dvc.yaml declares that file as an output that is not cached. So DVC leads to the MLflow run, and DVC
    does not fill a stage from its run cache, which would leave MLflow without a run.
    """
    dvc_stage = os.environ.get("DVC_STAGE")
    root = os.environ.get("DVC_ROOT")
    if not dvc_stage or not root:
        return
    record = Path(root) / "runs" / "dvc" / f"{dvc_stage.rpartition(':')[2]}.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    write_json(record, {**known, stage: run_id})


def _short(value: object) -> str:
    return str(value)[:_MAX_VALUE_LENGTH]
