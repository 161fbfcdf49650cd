"""The store is found at an absolute place, and what cannot be one is told in one line."""

from pathlib import Path

import pytest

from nuclei3d.config import load_params
from nuclei3d.config.sections import TrackingParams
from nuclei3d.errors import InputError
from nuclei3d.experiment.store import open_store, store_uri, without_passwords


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
