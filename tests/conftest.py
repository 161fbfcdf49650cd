"""Fixtures that several test modules share."""

import os
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nuclei3d.console import warned

# What MLflow leaves in the environment for the processes that it starts, as it is before any test.
_LEFT = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID")
MLFLOW_ENVIRONMENT = {name: os.environ.get(name) for name in _LEFT}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that are marked "gpu" where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first: processes that share the files then end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def bbbc050() -> Path:
    """Folder of the real mouse embryos (BBBC050); tests that need it are skipped where it is absent."""
    named = os.environ.get("NUCLEI3D_BBBC050")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data" / "bbbc050"
    if not folder.is_dir():
        pytest.skip(f"real embryos not found at {folder}; set NUCLEI3D_BBBC050 to their folder")
    return folder


@pytest.fixture(autouse=True)
def _nothing_warned_of() -> None:
    """Begin as a command does: what a test before has warned of is said again."""
    warned.clear()


@pytest.fixture(autouse=True)
def _no_store_left_behind() -> Iterator[None]:
    """Have MLflow forget the store of a test: else those after it, and their processes, would write there."""
    yield
    mlflow = sys.modules.get("mlflow")
    if mlflow is not None:
        while mlflow.active_run() is not None:
            mlflow.end_run()
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database, made once: that takes seconds."""
    from nuclei3d.config import load_params
    from nuclei3d.experiment.store import open_store

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_store(load_params(None, [f"tracking.uri=sqlite:///{path}"]).tracking)
    return path


@pytest.fixture
def own_store(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The override that names an MLflow store of this test's own; the environment says nothing of one."""
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
    return f"tracking.uri=sqlite:///{database}"


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Let no file grow beyond 64 kB: the system then refuses to write as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
