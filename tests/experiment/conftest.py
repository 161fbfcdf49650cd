"""An MLflow store for the tests: made once (that takes seconds), copied for each test."""

import shutil
from pathlib import Path

import pytest

import nuclei3d.experiment  # noqa: F401 - before mlflow: switches its telemetry off
from nuclei3d.config import Params, load_params


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nuclei3d.experiment.store import open_store

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_store(load_params(None, [f"tracking.uri=sqlite:///{path}"]).tracking)
    return path


@pytest.fixture
def params(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Parameters with a store of this test's own."""
    for variable in (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_RUN_ID",
        "MLFLOW_EXPERIMENT_NAME",
        "DVC_STAGE",
        "DVC_ROOT",
    ):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    database = tmp_path / "store" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(empty_database, database)
    return load_params(None, [f"tracking.uri=sqlite:///{database}", "train.device=cpu", "predict.device=cpu"])
