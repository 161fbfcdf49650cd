"""`serve` says in one line what keeps it from starting, and MLflow's own server serves the same model."""

import base64
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
import tifffile

from nuclei3d.client import RemoteModel
from nuclei3d.config import Params, load_params
from nuclei3d.errors import InputError
from nuclei3d.experiment.packing import log_served_model, request_example
from nuclei3d.experiment.registry import load_served_model
from nuclei3d.experiment.runs import stage_run
from nuclei3d.experiment.store import open_store
from nuclei3d.images.frames import find_frames
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import ModelInfo, save_model
from nuclei3d.stages.predict import predict
from nuclei3d.stages.serve import serve

INFO = ModelInfo(name="nuclei_3d", diameter_px=17.0, nucleus_diameter_um=10.0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "nuclei_3d"
    save_model(folder, new_network(17.0, seed=0), INFO, "# A card")
    return folder


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_port_in_use_is_told(taken: int, model: Path) -> None:
    with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{taken}.*--port"):
        serve(load_params(None, [f"serve.port={taken}"]), str(model))


def test_a_missing_model_or_root_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model folder"):
        serve(load_params(None, ["serve.port=0"]), str(tmp_path / "absent"))
    with pytest.raises(InputError, match="is no folder"):
        serve(load_params(None, ["serve.port=0", f"serve.root={tmp_path}/absent"]), str(tmp_path))


def test_the_port_is_free_again_after_a_failure(tmp_path: Path) -> None:
    port = free_port()
    for _ in range(2):
        with pytest.raises(InputError, match="no model folder"):
            serve(load_params(None, [f"serve.port={port}"]), str(tmp_path / "absent"))


def test_the_version_of_a_served_model_is_that_of_its_weights_and_settings(
    model: Path, tmp_path: Path
) -> None:
    def version(folder: Path, *wishes: str) -> tuple[str, str]:
        served = load_served_model(str(folder), load_params(None, wishes)).version
        return served["weights_sha256"], served["settings_sha256"]

    weights, settings = version(model)
    assert weights == hashlib.sha256((model / "nuclei_3d").read_bytes()).hexdigest()
    assert version(model) == (weights, settings)
    save_model(tmp_path / "b", new_network(17.0, seed=1), INFO, "# A card")
    assert version(tmp_path / "b")[0] != weights
    assert version(tmp_path / "b")[1] == settings
    save_model(model, new_network(17.0, seed=0), INFO.model_copy(update={"score_threshold": 0.7}), "# A card")
    assert version(model)[0] == weights
    calibrated = version(model)[1]
    assert len({settings, calibrated, version(model, "predict.flip_average=true")[1]}) == 3


def wait_until_up(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        try:
            if requests.get(f"{url}/ping", timeout=1).status_code == 200:
                return
        except requests.RequestException:
            assert process.poll() is None, "the server ended before it was up"
        time.sleep(0.1)
    raise AssertionError("the server never came up")


def expected_labels(model: Path) -> np.ndarray:
    """The masks of the input example, made here."""
    frame, _ = request_example(INFO)
    served = load_served_model(str(model), Params())
    answer = served.answer({"volume": frame["volume"][0]}, {"mode": "ortho"})
    return np.asarray(tifffile.imread(io.BytesIO(base64.b64decode(answer["labels"]))))


@pytest.mark.slow  # a process of its own that imports torch and compiles kernels
def test_the_service_ends_well_when_told_to(model: Path, tmp_path: Path) -> None:
    port = free_port()
    code = (
        "from nuclei3d.config import load_params; from nuclei3d.stages.serve import serve; "
        f"serve(load_params(None, ['serve.port={port}']), {str(model)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    try:
        wait_until_up(f"http://127.0.0.1:{port}", process)
        frame, _ = request_example(INFO)
        file = tmp_path / "example.ome.tif"
        file.write_bytes(frame["volume"][0])
        (volume,) = find_frames(file)
        remote_model = RemoteModel(f"http://127.0.0.1:{port}")
        found = remote_model.segment(volume.read(), volume.require_voxel_size())
        np.testing.assert_array_equal(found.labels, expected_labels(model))
        assert found.model == remote_model.served_model()
        # And the client writes the very files that local prediction writes.
        local, remote = tmp_path / "local", tmp_path / "remote"
        predict(Params(), [file], str(model), local)
        predict(Params(), [file], f"http://127.0.0.1:{port}", remote)
        for name in ("example_masks.ome.tif", "example_nuclei.csv"):
            assert (remote / name).read_bytes() == (local / name).read_bytes()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
        assert log.splitlines()[-1] == b"stopped"
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow  # starts MLflow's server, which imports torch and compiles kernels
def test_mlflow_models_serve_answers_a_real_request(model: Path, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/mlflow.db"
    params = load_params(None, [f"tracking.uri={database}", "predict.device=cpu"])
    metrics = tmp_path / "metrics.json"
    metrics.write_text("{}")
    with stage_run("register", params, inputs={}):
        logged = log_served_model(model, metrics, INFO, params.predict)
    client = open_store(params.tracking)
    client.create_registered_model("nuclei_3d")
    client.create_model_version("nuclei_3d", logged.model_uri, model_id=logged.model_id)
    client.set_registered_model_alias("nuclei_3d", "champion", "1")

    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {
        "MLFLOW_TRACKING_URI": database,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # What MLflow offers for settings of a served model: here the folder of files that may be named.
        "SERVING_MODEL_CONFIG": json.dumps({"root": str(tmp_path / "root")}),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]]),
    }
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/nuclei_3d@champion"]
    command += ["--env-manager", "local", "-h", "127.0.0.1", "-p", str(port), "-t", "600"]
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_up(url, process)
        frame, _ = request_example(INFO)
        volume = base64.b64encode(frame["volume"][0]).decode()
        body = {"dataframe_split": {"columns": ["volume"], "data": [[volume]]}, "params": {"mode": "ortho"}}
        response = requests.post(f"{url}/invocations", json=body, timeout=300)
        assert response.status_code == 200, response.text[:500]
        (answer,) = response.json()["predictions"]
        labels = tifffile.imread(io.BytesIO(base64.b64decode(answer["labels"])))
        np.testing.assert_array_equal(labels, expected_labels(model))
        named = {"name": "nuclei_3d", "registered_name": "nuclei_3d", "version": "1"}
        assert answer["model"].items() >= named.items()
        weights = (model / "nuclei_3d").read_bytes()
        assert answer["model"]["weights_sha256"] == hashlib.sha256(weights).hexdigest()
        assert answer["parameters"]["mode"] == "ortho"

        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "example.ome.tif").write_bytes(frame["volume"][0])
        named = {"dataframe_records": [{"path": "example.ome.tif"}]}
        response = requests.post(f"{url}/invocations", json=named, timeout=300)
        assert response.json()["predictions"][0]["labels"] == answer["labels"]
        named = {"dataframe_records": [{"path": "../mlflow.db"}]}
        assert requests.post(f"{url}/invocations", json=named, timeout=60).status_code == 400

        bad = {"dataframe_records": [{"volume": base64.b64encode(b"no tiff").decode()}]}
        refused = requests.post(f"{url}/invocations", json=bad, timeout=60)
        assert refused.status_code == 400
        assert "not a TIFF" in json.loads(refused.text)["message"]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
