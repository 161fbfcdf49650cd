"""The store is found at an absolute place, and what cannot be one is told in one line."""

import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from nuclei3d.config import load_params
from nuclei3d.config.sections import TrackingParams
from nuclei3d.errors import InputError, MachineError
from nuclei3d.experiment import store
from nuclei3d.experiment.store import experiment_id, open_store, store_uri, without_passwords


def test_the_default_lies_in_the_project_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params.yaml").write_text("")
    deeper = tmp_path / "notebooks" / "old"
    deeper.mkdir(parents=True)
    monkeypatch.chdir(deeper)
    assert store_uri(TrackingParams()) == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_relative_sqlite_uri_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert store_uri(TrackingParams()) == f"sqlite:///{tmp_path}/mlflow.db"
    assert store_uri(TrackingParams(uri="http://server:5000")) == "http://server:5000"


def test_a_folder_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sqlite:////home/me/mlflow\.db"):
        store_uri(TrackingParams(uri=str(tmp_path)))


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database at all")
    with pytest.raises(InputError, match="no SQLite database"):
        open_store(load_params(None, [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]).tracking)


@pytest.fixture
def database(own_store: str) -> Path:
    return Path(own_store.partition("sqlite:///")[2])


def tracking_of(database: Path) -> TrackingParams:
    return load_params(None, [f"tracking.uri=sqlite:///{database}"]).tracking


def test_a_database_of_another_version_of_mlflow_says_how_to_bring_it_up(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("update alembic_version set version_num = 'of_long_ago'")
    with pytest.raises(InputError, match=r"another version of MLflow.*mlflow db upgrade sqlite:///") as told:
        open_store(tracking_of(database))
    assert "\n" not in str(told.value)


def test_a_locked_database_is_a_fault_of_the_machine(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_LOCKED_TIMEOUT_S", 0.1)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(MachineError, match="is locked by another process"):
            open_store(tracking_of(database))


def test_a_project_that_was_moved_names_both_places_and_the_mend(database: Path, tmp_path: Path) -> None:
    client = open_store(tracking_of(database))
    run = client.create_run(experiment_id(client, tracking_of(database))).info.run_id
    client.log_text(run, "text", "note.txt")
    moved = tmp_path / "elsewhere"
    database.parent.rename(moved)
    with pytest.raises(InputError, match="the project was moved") as told:
        open_store(tracking_of(moved / "mlflow.db"))
    assert str(database.parent / "mlartifacts") in str(told.value)
    assert str(moved / "mlartifacts") in str(told.value)
    assert not database.parent.exists(), "nothing is made anew in the old place"
    subprocess.run(str(told.value).rpartition(": ")[2], shell=True, check=True)
    client = open_store(tracking_of(moved / "mlflow.db"))
    assert [item.path for item in client.list_artifacts(run)] == ["note.txt"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("uri: postgresql://me:s3cr:et@host:5432/runs", "uri: postgresql://me:***@host:5432/runs"),
        ("https://:token@host", "https://:***@host"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
    ],
)
def test_passwords_are_blotted_out(text: str, shown: str) -> None:
    assert without_passwords(text) == shown
