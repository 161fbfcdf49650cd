"""The search with its study in PostgreSQL, and MLflow's store there too: a private server on loopback."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import search_toys
from optuna.trial import FrozenTrial, TrialState

from nuclei3d.config import load_params
from nuclei3d.config.sections import SearchParams
from nuclei3d.errors import InputError
from nuclei3d.stages.search.objective import TrialJob
from nuclei3d.stages.search.storage import WORKER, open_storage
from nuclei3d.stages.search.study import SearchResult, search

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def find_server() -> Path | None:
    """The folder of the newest initdb and pg_ctl; Debian keeps them off the PATH."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(folders, key=lambda path: int(path.parent.name), default=None)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of a server of our own, without the name of a database."""
    programs = find_server()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    # the server refuses to run as root
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    user = "postgres" if as_user else getpass.getuser()
    if as_user and shutil.which("runuser") is None:
        pytest.skip("root cannot start PostgreSQL itself, and runuser is not installed")
    folder = Path(tempfile.mkdtemp(prefix="nuclei3d-pg"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        if as_user:
            shutil.chown(folder, user)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        data = str(folder / "data")
        for command in (
            [programs / "initdb", "-D", data, "-U", user, "--auth=trust", "--no-sync"],
            [programs / "pg_ctl", "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start"],
        ):
            subprocess.run([*as_user, *map(str, command)], check=True, stdout=subprocess.DEVNULL, cwd=folder)
        yield f"postgresql://{user}@127.0.0.1:{port}"
        stop = [*as_user, str(programs / "pg_ctl"), "-D", data, "-m", "immediate", "stop"]
        subprocess.run(stop, check=True, stdout=subprocess.DEVNULL, cwd=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_database(server: str) -> str:
    import psycopg

    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
    return f"{server}/{name}"


@pytest.fixture
def database(server: str) -> str:
    """Address of a new, empty database."""
    return new_database(server)


OVERRIDES = [
    "tracking.enabled=false",
    "train.epochs=4",
    "search.epochs={low: 2, high: 8}",
    "search.heartbeat_s=1",
    "search.grace_s=3",
    "search.study=shared",
]


def run(folder: Path, storage: str, *overrides: str, **options: Any) -> SearchResult:
    """Search in a folder of its own, as if on another machine, in a study of all."""
    (folder / "slices").mkdir(parents=True, exist_ok=True)
    return search(
        load_params(None, [*OVERRIDES, *overrides]),
        folder / "slices",
        folder / "search",
        storage=storage,
        **({"trials": 6, "objective": search_toys.bowl} | options),
    )


def start_elsewhere(folder: Path, storage: str, trials: int, epoch_s: float) -> subprocess.Popen[bytes]:
    code = "import sys, pathlib; from test_search_postgresql import run; "
    code += "run(pathlib.Path(sys.argv[1]), sys.argv[2], trials=int(sys.argv[3]))"
    return search_toys.start_elsewhere(code, folder, storage, trials, epoch_s=epoch_s)


def open_database(storage: str) -> str:
    return storage.replace("postgresql://", "postgresql+psycopg://")


def trials(storage: str) -> list[FrozenTrial]:
    return optuna.load_study(study_name="shared", storage=open_database(storage)).get_trials()


def states(storage: str) -> list[TrialState]:
    return [trial.state for trial in trials(storage)]


def test_the_same_command_on_other_machines_adds_workers(tmp_path: Path, database: str) -> None:
    others = [start_elsewhere(tmp_path / name, database, 9, 0.02) for name in ("b", "c")]
    result = run(tmp_path / "a", database, trials=9)
    assert [other.wait(120) for other in others] == [0, 0]
    assert result.trials["finished"] + result.trials["pruned"] == 9
    assert len(states(database)) == 9, "no worker took a trial too many"


def test_a_trial_of_a_machine_that_died_is_run_again_after_the_grace(tmp_path: Path, database: str) -> None:
    other = start_elsewhere(tmp_path / "b", database, 4, 0.5)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if TrialState.RUNNING in states(database):
                break
        except Exception:
            # neither tables nor study yet
            time.sleep(0.1)
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    before = [trial for trial in trials(database) if trial.state == TrialState.RUNNING]
    # from here the other machine cannot be seen: only its heartbeat tells
    result = run(tmp_path / "a", database, trials=4)
    assert result.trials["finished"] + result.trials["pruned"] == 4
    assert result.trials["failed"] == 0
    after = trials(database)
    assert len(after) == 4
    for died in before:
        again = after[died.number]
        assert died.params.items() <= again.params.items()
        # the kill may have come before the trial had the name of its worker
        assert again.user_attrs[WORKER] != died.user_attrs.get(WORKER)


def test_a_trial_whose_worker_died_while_taking_it_does_not_wait(tmp_path: Path, database: str) -> None:
    """Taking and naming happen within one claim, so a trial without a name has nobody who could beat."""
    with open_storage(database, tmp_path, SearchParams(grace_s=1000)) as store:
        study = optuna.create_study(storage=store.backend, study_name="shared")
        study.ask()
        named = study.ask()
        named.set_user_attr(WORKER, "elsewhere")
        with store.claim():
            store.requeue(study)
    assert states(database) == [TrialState.WAITING, TrialState.RUNNING]


def test_a_worker_that_was_thought_dead_leaves_its_trial_alone(tmp_path: Path, database: str) -> None:
    def taken_over(job: TrialJob, report: search_toys.Report) -> float:
        study = optuna.load_study(study_name="shared", storage=open_database(database))
        (trial,) = [trial for trial in study.get_trials() if trial.state == TrialState.RUNNING]
        if trial.number == 0 and trial.user_attrs["attempts"] == 1:
            study._storage.set_trial_user_attr(trial._trial_id, WORKER, None)
            study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
            report(search_toys.ToyEpoch(1, 1.0))
            raise AssertionError("it went on")
        return 1.0

    result = run(tmp_path, database, trials=2, objective=taken_over)
    assert (result.trials["finished"], result.trials["failed"]) == (2, 0)
    assert [trial.user_attrs["attempts"] for trial in trials(database)] == [2, 1]


def test_mlflow_keeps_its_runs_in_postgresql(tmp_path, server, database, monkeypatch):
    import mlflow

    project = tmp_path / "project"
    project.mkdir()
    (project / "MLproject").write_text("name: mine\n")
    monkeypatch.chdir(project)
    store = new_database(server)
    tracked = ["tracking.enabled=true", f"tracking.uri={store}"]
    result = run(tmp_path, database, *tracked, trials=3)
    client = mlflow.MlflowClient(store)
    assert result.run_id is not None
    parent = client.get_run(result.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.info.artifact_uri.startswith((project / "mlartifacts").as_uri())
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{result.run_id}'"
    )
    assert sorted(child.data.tags["nuclei3d.trial"] for child in children) == ["0000", "0001", "0002"]


def test_optuna_and_mlflow_do_not_share_a_database(tmp_path: Path, database: str) -> None:
    shared = database.replace("postgresql://", "postgresql+psycopg://")
    with pytest.raises(InputError, match="a database of its own"):
        run(tmp_path, database, "tracking.enabled=true", f"tracking.uri={shared}")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("postgresql://nobody:secret@127.0.0.1:1/none", "cannot use the storage"),
        ("sqlite:///study.db", "postgresql://user@host/database"),
        ("postgresql:nonsense", "no address of a database"),
    ],
)
def test_unusable_storages_are_explained(tmp_path: Path, address: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run(tmp_path, address)
    assert "secret" not in str(caught.value)
