"""A search in MLflow: one parent, one child per trial, in step with the study whatever was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest
import search_toys
from mlflow.entities import Run

from nuclei3d.config import Params, load_params
from nuclei3d.experiment.runs import stage_run
from nuclei3d.experiment.trials import TrialRecord, TrialRuns
from nuclei3d.stages.search.study import SearchResult, search


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def parameters(store: str, experiment: str, *overrides: str) -> Params:
    chosen = [f"tracking.uri={store}", f"tracking.experiment={experiment}", "train.epochs=4"]
    return load_params(None, [*chosen, "search.epochs={low: 2, high: 8}", *overrides])


def run(
    folder: Path, store: str, *overrides: str, objective: Any = search_toys.bowl, trials: int
) -> SearchResult:
    (folder / "slices").mkdir(exist_ok=True)
    chosen = parameters(store, folder.name, *overrides)
    return search(chosen, folder / "slices", folder / "search", trials=trials, objective=objective)


def children(store: str, parent: str | None) -> dict[str, Run]:
    """The runs of a search's trials by their key; one for each, or this fails."""
    assert parent is not None
    client = mlflow.MlflowClient(store)
    experiment = client.get_run(parent).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    keys = [child.data.tags["nuclei3d.trial"] for child in found]
    assert len(keys) == len(set(keys))
    return dict(zip(keys, found, strict=True))


def test_every_trial_has_a_run_with_state_reason_and_curves(tmp_path: Path, store: str) -> None:
    result = run(tmp_path, store, "search.learning_rate={choices: [0.001, 0.1]}", trials=6)
    runs = children(store, result.run_id)
    assert sorted(runs) == [f"{number:04d}" for number in range(6)]
    client = mlflow.MlflowClient(store)
    states = {"finished": "FINISHED", "pruned": "KILLED"}
    for child in runs.values():
        state = child.data.tags["nuclei3d.trial_state"]
        assert child.info.status == states[state]
        curve = client.get_metric_history(child.info.run_id, "validation_loss")
        epochs = int(child.data.params["train.epochs"])
        if state == "finished":
            assert [point.step for point in curve] == list(range(1, epochs + 1))
            assert "objective" in child.data.metrics
        else:
            assert 0 < len(curve) < epochs
            assert "given up" in child.data.tags["nuclei3d.reason"]
    assert {child.info.status for child in runs.values()} == {"FINISHED", "KILLED"}
    assert result.run_id is not None
    parent = client.get_run(result.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["nuclei3d.best_trial"] == str(result.best.trial)
    kept = {item.path for item in client.list_artifacts(result.run_id, "search")}
    names = ("study.json", "study.csv", "search.html", "study.journal")
    assert kept == {f"search/{name}" for name in names}


def test_a_restart_goes_on_below_the_same_parent(tmp_path: Path, store: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, store, objective=search_toys.stopped_by_user, trials=2)
    client = mlflow.MlflowClient(store)
    (experiment,) = client.search_experiments(filter_string=f"name = '{tmp_path.name}'")
    status = {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert status == {"search": "KILLED", "trial 0000": "KILLED"}
    result = run(tmp_path, store, "search.max_failures=7", trials=2)
    runs = children(store, result.run_id)
    assert sorted(runs) == ["0000", "0001"]
    assert runs["0000"].info.status == "FINISHED"
    assert runs["0000"].data.tags["nuclei3d.trial_state"] == "finished"
    curve = client.get_metric_history(runs["0000"].info.run_id, "validation_loss")
    assert curve[0].value == 1.0, "the first epoch is that of the start that was stopped"
    assert result.run_id == next(
        run.info.run_id
        for run in client.search_runs([experiment.experiment_id])
        if run.info.run_name == "search"
    ), "a second parent"
    assert run(tmp_path, store, trials=3).run_id == result.run_id, "also after an end"
    parent = client.get_run(str(result.run_id))
    assert parent.info.status == "FINISHED"
    assert "nuclei3d.failure" not in parent.data.tags


def test_runs_left_open_are_closed_and_missing_ones_made(tmp_path: Path, store: str) -> None:
    chosen = parameters(store, tmp_path.name)
    values = {"train.epochs": 3}
    with stage_run("search", chosen, inputs={}) as opened:
        runs = TrialRuns(opened)
        runs.begin(TrialRecord("0000", "running", "", values))
        runs.begin(TrialRecord("0001", "running", "", values))
        runs.reconcile(
            [
                TrialRecord("0000", "finished", "", values, 0.5),
                TrialRecord("0001", "failed", "its process died", values),
                TrialRecord("0002", "pruned", "too slow", values, None, {125: -1.0, 250: -0.5}),
                TrialRecord("0003", "running", "", values),
                TrialRecord("0004", "waiting", "", values),
            ]
        )
        parent = opened.run_id
    found = children(store, parent)
    assert {key: child.info.status for key, child in found.items()} == {
        "0000": "FINISHED",
        "0001": "FAILED",
        "0002": "KILLED",
    }
    assert found["0001"].data.tags["nuclei3d.reason"] == "its process died"
    client = mlflow.MlflowClient(store)
    curve = client.get_metric_history(found["0002"].info.run_id, "compared")
    assert [(point.step, point.value) for point in curve] == [(125, -1.0), (250, -0.5)]
