"""Where runs and models are kept: finding, checking and opening the MLflow store."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import socket
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from nuclei3d.config.sections import TrackingParams
from nuclei3d.errors import InputError, MachineError, reason_of
from nuclei3d.outputs import whole_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
_DEFAULT_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_ANSWER_TIMEOUT_S = 5.0
_LOCKED_TIMEOUT_S = 60.0
_LOCK_TIMEOUT_S = 600.0
_KIND = ("mlflow.experimentKind", "custom_model_development")


def project_folder() -> Path:
    """Give the project directory: the nearest one upwards with an MLproject or params.yaml, else this one."""
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (folder / "MLproject").is_file() or (folder / "params.yaml").is_file():
            return folder
    return here


def store_uri(params: TrackingParams) -> str:
    """Give the URI of the store, with SQLite paths made absolute.

    Order: `tracking.uri`, then the environment variable MLFLOW_TRACKING_URI, then mlflow.db in the
    project directory.
    """
    uri = params.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    if not uri:
        return f"{SQLITE}{project_folder() / 'mlflow.db'}"
    if uri.startswith(SQLITE):
        path = Path(uri.removeprefix(SQLITE)).expanduser()
        return f"{SQLITE}{path.resolve()}"
    if "://" not in uri and not uri.startswith("databricks"):
        raise InputError(
            f"tracking.uri '{uri}' is no store that MLflow can write; give an http(s) address or a database, "
            "for example sqlite:////home/me/mlflow.db"
        )
    return uri


def open_store(params: TrackingParams) -> MlflowClient:
    """Connect MLflow to the store and give a client."""
    uri = store_uri(params)
    _check_reachable(uri)
    _quieten()
    import mlflow

    if uri.startswith(SQLITE):
        _make_database(Path(uri.removeprefix(SQLITE)))
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
        experiments = client.search_experiments()
    except Exception as error:
        # of MLflow's, SQLAlchemy's or Alembic's, and a database can make them raise nearly anything
        reason = reason_of(error)
        if "schema" in reason or "revision" in reason:
            reason = (
                "it was made by another version of MLflow; keep a copy of it and run "
                f"'mlflow db upgrade {without_passwords(uri)}', or name another with tracking.uri"
            )
        raise InputError(
            f"the tracking store {without_passwords(uri)} cannot be used: {reason[:300]}"
        ) from None
    if uri.startswith(SQLITE):
        for experiment in experiments:
            _check_moved(Path(uri.removeprefix(SQLITE)), experiment.artifact_location)
    return client


def _check_moved(database: Path, location: str) -> None:
    """Refuse a database whose files went along with it to another place than the one that it holds."""
    old = Path(unquote(urlsplit(location).path))
    new = database.parent / "mlartifacts" / old.name
    mend = ["mkdir", "-p", str(old.parent.parent)], ["ln", "-s", str(new.parent), str(old.parent)]
    if old.parent.name == "mlartifacts" and not old.parent.exists() and new.is_dir():
        raise InputError(
            f"the project was moved: by {database} the files of its runs lie in {old.parent}, which is gone; "
            f"they are in {new.parent}. Move it back, or let the old place lead to the new one: "
            + " && ".join(map(shlex.join, mend))
        )


@contextmanager
def store_lock(params: TrackingParams) -> Iterator[None]:
    """Let one process of this machine at a time decide what the registry's names point at.

    Beside a SQLite database, which all its users share, the lock is a file; a server's is kept for this
    machine. It ends with the process that holds it. MachineError is raised if another one holds it for ten
    minutes.
    """
    with _lock(store_uri(params)):
        yield


@contextmanager
def _lock(uri: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    if uri.startswith(SQLITE):
        file = Path(f"{uri.removeprefix(SQLITE)}.lock")
    else:
        digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
        file = Path(tempfile.gettempdir()) / f"nuclei3d-{os.getuid()}-{digest}.lock"
    try:
        with FileLock(file, timeout=_LOCK_TIMEOUT_S):
            yield
    except Timeout:
        raise MachineError(
            f"another process has held {file} for {_LOCK_TIMEOUT_S / 60:.0f} minutes; wait for it or end it"
        ) from None


def experiment_id(client: MlflowClient, params: TrackingParams) -> str:
    """Give the id of the experiment, made if it is new (or was deleted).

    Its artifacts lie at an absolute path, in mlartifacts/<experiment> beside a SQLite database, or in the
    project directory with a database server: MLflow's own default, mlruns in the working directory, would
    depend on where the first run was started. A tracking server has a place of its own.
    """
    from mlflow.entities import LifecycleStage
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or params.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        if experiment.lifecycle_stage == LifecycleStage.DELETED:
            client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)
    location = None
    uri = store_uri(params)
    if urlsplit(uri).scheme.partition("+")[0] in _DATABASES:
        home = Path(uri.removeprefix(SQLITE)).parent if uri.startswith(SQLITE) else project_folder()
        location = (home / "mlartifacts" / name).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location, tags=dict([_KIND])))
    except MlflowException:
        # Another process made it between our look and our creation.
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return str(experiment.experiment_id)


def show_as_training(client: MlflowClient, experiment: str) -> None:
    """Have MLflow's UI open an experiment that we did not make with its runs, not as one of chat models."""
    if _KIND[0] not in client.get_experiment(experiment).tags:
        client.set_experiment_tag(experiment, *_KIND)


def without_passwords(text: str) -> str:
    """Blot out the passwords of addresses such as ``postgresql://me:secret@host/runs``."""
    return re.sub(r"(://[^:/@\s]*):[^@/\s]+@", r"\1:***@", text)


def _check_reachable(uri: str) -> None:
    """Fail within seconds where MLflow itself would go on trying for minutes."""
    if uri.startswith(SQLITE):
        _check_sqlite(Path(uri.removeprefix(SQLITE)))
        return
    parts = urlsplit(uri)
    port = parts.port or _DEFAULT_PORTS.get(parts.scheme.partition("+")[0])
    if parts.hostname is None or port is None:
        return
    try:
        socket.create_connection((parts.hostname, port), timeout=_ANSWER_TIMEOUT_S).close()
        if parts.scheme in ("http", "https"):
            import requests

            # Any answer will do, also "401": the question is only whether somebody is there.
            requests.get(uri, timeout=_ANSWER_TIMEOUT_S, stream=True).close()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(
            f"the tracking server {without_passwords(uri)} does not answer ({reason}); start it, correct "
            "tracking.uri or MLFLOW_TRACKING_URI, or run with --set tracking.enabled=false"
        ) from None


def _check_sqlite(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=_LOCKED_TIMEOUT_S)) as database:
            database.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise InputError(f"the tracking store {path} cannot be written ({error})") from None
        raise MachineError(
            f"the tracking store {path} is locked by another process; wait for it or end it, then start again"
        ) from None
    except (OSError, sqlite3.Error) as error:
        raise InputError(
            f"the tracking store {path} is no SQLite database that can be written ({error}); "
            "tracking.uri must name a file such as mlflow.db"
        ) from None


def _make_database(path: Path) -> None:
    """Make MLflow's database unless it is there.

    MLflow makes its tables in dozens of steps that are not one transaction. A process that is killed among
    them leaves a database that MLflow refuses for ever after, and two that begin together trip over each
    other. So it is made aside, under a lock, and renamed.
    """
    from mlflow import MlflowClient

    if _has_content(path):
        return
    with _lock(f"{SQLITE}{path}"):
        if _has_content(path):
            return
        with whole_file(path) as new:
            uri = f"{SQLITE}{new.absolute()}"
            MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _quieten() -> None:
    """Keep MLflow's and Alembic's accounts of their database migrations off the user's screen."""
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking", "mlflow.models", "mlflow.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
