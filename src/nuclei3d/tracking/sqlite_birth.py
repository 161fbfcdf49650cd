"""Making MLflow's SQLite database whole or not at all."""

from __future__ import annotations

import fcntl
from pathlib import Path

from nuclei3d.volumes.whole import whole_file


def make_sqlite_store(path: Path) -> None:
    """Make the database of a new store; one that is there is left alone.

    MLflow makes its tables in dozens of steps that are not one transaction. A process that is killed among
    them leaves a database that MLflow refuses for ever after, and two that begin together trip over each
    other. So it is made aside, under a lock, and renamed.
    """
    if path.exists() and path.stat().st_size > 0:
        return
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() and path.stat().st_size > 0:
            return
        with whole_file(path) as new:
            _make_tables(f"sqlite:///{new.absolute()}")
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)


def _make_tables(uri: str) -> None:
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)
