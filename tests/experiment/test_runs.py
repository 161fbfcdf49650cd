"""A stage leaves one MLflow run that says what it did, from what, and how it ended."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nuclei3d.config import Params, load_params
from nuclei3d.errors import InputError
from nuclei3d.experiment.runs import stage_run
from nuclei3d.experiment.store import open_store


def run_of(params: Params, run_id: str | None):
    assert run_id is not None
    return open_store(params.tracking).get_run(run_id)


def artifacts_of(params: Params, run_id: str | None) -> set[str]:
    client = open_store(params.tracking)
    return {item.path for folder in ("", "lineage") for item in client.list_artifacts(run_id, folder)}


def test_a_run_carries_its_lineage_and_its_parameters(params: Params, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (tmp_path / "data.dvc").write_text("outs:\n- md5: 0123abc.dir\n  path: data\n")
    with stage_run("train", params, inputs={"data": data}, name="train nuclei_3d") as run:
        run.metrics({"loss/train": 0.5}, step=1)
        run.metrics({"loss/train": 0.25}, step=2)
    found = run_of(params, run.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "train nuclei_3d"
    assert found.data.metrics == {"loss/train": 0.25}
    assert found.data.tags["nuclei3d.stage"] == "train"
    assert found.data.tags["nuclei3d.data_md5"] == "0123abc.dir"
    assert found.data.tags["nuclei3d.seed"] == "0"
    assert found.data.tags["nuclei3d.device"] == "cpu"
    assert "torch" in found.data.tags["nuclei3d.environment"]
    assert found.data.params["train.epochs"] == "20"
    assert found.data.params["train.augment.flips"] == "True"
    assert "prepare.step_xy" not in found.data.params
    assert {"lineage/params.yaml", "lineage/lineage.json", "lineage/environment.txt"} <= artifacts_of(
        params, run.run_id
    )
    history = open_store(params.tracking).get_metric_history(run.run_id, "loss/train")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.25)]


def test_a_stage_inside_another_is_its_child(params: Params) -> None:
    with stage_run("pipeline", params, inputs={}) as job:
        with stage_run("prepare", params, inputs={}) as first:
            pass
        with stage_run("train", params, inputs={}) as second:
            pass
    for child in (first, second):
        assert run_of(params, child.run_id).data.tags["mlflow.parentRunId"] == job.run_id
    assert len({job.run_id, first.run_id, second.run_id}) == 3
    assert run_of(params, job.run_id).info.run_name == "pipeline"


def test_the_run_that_mlflow_run_made_is_adopted(params, tmp_path, monkeypatch):
    # the experiment is MLflow's own: its artifacts go to mlruns in the working directory
    monkeypatch.chdir(tmp_path)
    client = open_store(params.tracking)
    experiment = client.create_experiment("chosen by mlflow run")
    outer = client.create_run(experiment).info.run_id
    client.log_param(outer, "learning_rate", "1e-3")
    monkeypatch.setenv("MLFLOW_RUN_ID", outer)
    with stage_run("pipeline", params, inputs={}) as job, stage_run("train", params, inputs={}) as child:
        pass
    assert job.run_id == outer
    assert run_of(params, child.run_id).info.experiment_id == experiment
    assert run_of(params, child.run_id).data.tags["mlflow.parentRunId"] == outer
    assert run_of(params, outer).data.params["learning_rate"] == "1e-3"


def test_failures_and_interrupts_show_in_the_status(params: Params) -> None:
    with pytest.raises(ValueError), stage_run("train", params, inputs={}) as failed:
        raise ValueError("loss is\nnan")
    assert run_of(params, failed.run_id).info.status == "FAILED"
    assert run_of(params, failed.run_id).data.tags["nuclei3d.failure"] == "ValueError: loss is nan"
    with pytest.raises(KeyboardInterrupt), stage_run("train", params, inputs={}) as stopped:
        raise KeyboardInterrupt
    assert run_of(params, stopped.run_id).info.status == "KILLED"


def test_nothing_is_recorded_when_tracking_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    params = load_params(None, ["tracking.enabled=false"])
    with stage_run("train", params, inputs={}) as run:
        run.metrics({"loss": 1.0})
        run.tags({"a": 1})
        run.artifact(tmp_path)
        run.text("a", "b.txt")
    assert run.run_id is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "postgresql://me:secret@127.0.0.1:9/runs"])
def test_a_server_that_does_not_answer_is_one_clear_line(uri: str) -> None:
    params = load_params(None, [f"tracking.uri={uri}"])
    with pytest.raises(InputError, match="does not answer") as caught, stage_run("train", params, inputs={}):
        pass
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_values_wait_while_the_server_is_away(params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    with stage_run("train", params, inputs={}) as run:
        client = run.client
        assert client is not None
        real = client.log_batch

        def away(*_: object, **__: object) -> None:
            raise OSError("connection refused")

        client.log_batch = away  # type: ignore[method-assign]
        run.metrics({"loss": 3.0}, step=1)
        run.metrics({"loss": 2.0}, step=2)
        client.log_batch = real  # type: ignore[method-assign]
        run.metrics({"loss": 1.0}, step=3)
    history = open_store(params.tracking).get_metric_history(run.run_id, "loss")
    assert [point.value for point in history] == [3.0, 2.0, 1.0]
    assert capsys.readouterr().err.count("stopped answering") == 1


def test_under_dvc_the_run_id_is_left_for_dvc(params, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "evaluate")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    ids = {}
    for stage in ("predict", "evaluate"):
        with stage_run(stage, params, inputs={}) as run:
            ids[stage] = run.run_id
    assert json.loads((tmp_path / "runs" / "dvc" / "evaluate.json").read_text()) == ids


def test_a_job_that_was_killed_is_closed_and_its_parent_goes_on(params: Params, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal\n"
        "from nuclei3d.config import load_params\n"
        "from nuclei3d.experiment.runs import stage_run\n"
        f"uri = 'tracking.uri={params.tracking.uri}'\n"
        "params = load_params(None, [uri, 'train.device=cpu', 'predict.device=cpu'])\n"
        "with stage_run('pipeline', params, inputs={}, job='mine') as job:\n"
        "    with stage_run('prepare', params, inputs={}) as child:\n"
        "        print(job.run_id, child.run_id, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == -9, done.stderr
    job, child = done.stdout.split()
    with stage_run("pipeline", params, inputs={}, job="another") as other:
        pass
    with stage_run("pipeline", params, inputs={}, job="mine") as again:
        pass
    with stage_run("pipeline", params, inputs={}, job="mine") as anew:
        pass
    assert again.run_id == job
    assert len({job, other.run_id, anew.run_id}) == 3
    assert run_of(params, job).info.status == "FINISHED"
    assert "nuclei3d.failure" not in run_of(params, job).data.tags, "the second start made it good"
    assert run_of(params, child).info.status == "KILLED"
