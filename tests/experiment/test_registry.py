"""A registered model is a version that loads anywhere; only a better one becomes champion."""

import base64
import io
import json
import os
import site
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import tifffile

from nuclei3d.config import Params
from nuclei3d.errors import InputError
from nuclei3d.experiment.registry import (
    champions,
    fetch_model,
    judge,
    register,
    request_example,
    roll_back,
)
from nuclei3d.experiment.store import open_store
from nuclei3d.images.frames import find_frames
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import ModelInfo, load_model, save_model
from nuclei3d.scoring.matching import overlap_table
from nuclei3d.scoring.metrics import score, tally_of
from nuclei3d.segmentation.segmenter import Segmenter

NAME = "nuclei_3d"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    info = ModelInfo(
        name=NAME, diameter_px=17.0, nucleus_diameter_um=10.0, lineage={"data_md5": "d", "slices_md5": "s"}
    )
    save_model(tmp_path / "models" / NAME, new_network(17.0, seed=0), info, "# A card")
    return tmp_path / "models" / NAME


def metrics_of(missed: Sequence[int], digest: str = "d") -> dict[str, Any]:
    """metrics.json of frames of one embryo; of its 16 nuclei each misses the first so many."""
    volumes = {}
    for frame, count in enumerate(missed):
        truth = np.kron(np.arange(1, 17, dtype=np.uint32).reshape(4, 4), np.ones((4, 4), np.uint32))[None]
        tally = tally_of(overlap_table(truth, np.where(truth > count, truth, 0)))
        volumes[f"E/{frame}"] = {
            **score(tally).as_json(),
            "embryo": "E",
            "truth_digest": f"{digest}{frame}",
            "counts": tally.as_json(),
        }
    return {"ap": {"0.50": 1 - sum(missed) / (16 * len(missed))}, "f1": {}, "volumes": volumes}


def write_metrics(path: Path, missed: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(metrics_of([missed] * 4)))
    return path


def version_of(params: Params, alias: str) -> str:
    return str(open_store(params.tracking).get_model_version_by_alias(NAME, alias).version)


def test_the_champion_moves_only_to_a_better_model_and_back(params, model, tmp_path):
    def register_with(missed: int, **options: bool) -> tuple[str, str, str]:
        metrics = write_metrics(tmp_path / f"evaluation{missed}" / "metrics.json", missed)
        made = register(params, model, metrics, **options)
        assert version_of(params, "challenger") == made.version
        assert version_of(params, "champion") == made.champion
        return made.version, str(made.champion), made.reason

    assert register_with(4)[:2] == ("1", "1")
    assert champions(params) == ["1"]
    version, champion, reason = register_with(5)
    assert (version, champion) == ("2", "1")
    assert "not better" in reason
    version, champion, reason = register_with(2)
    assert (version, champion) == ("3", "3")
    assert "better than the champion (version 1)" in reason
    version, champion, reason = register_with(8, force=True)
    assert (version, champion) == ("4", "4")
    assert reason.startswith("forced")
    assert champions(params) == ["4", "3", "1"]

    noted = open_store(params.tracking).get_model_version(NAME, "3")
    assert "better than the champion" in noted.tags["nuclei3d.reason"]
    assert "better than the champion" in noted.description
    assert noted.tags["nuclei3d.data_md5"] == "d"
    assert noted.tags["ap_0.50"] == "0.8750"

    assert roll_back(params).champion == "3"
    assert roll_back(params).champion == "1"
    with pytest.raises(InputError, match="no earlier champion"):
        roll_back(params)
    assert roll_back(params, "2").champion == "2"
    with pytest.raises(InputError, match="no version 9; known: 1, 2, 3, 4"):
        roll_back(params, "9")
    assert version_of(params, "champion") == "2"


def test_the_same_model_with_the_same_scores_is_registered_once(params, model, tmp_path):
    metrics = write_metrics(tmp_path / "metrics.json", 4)
    first = register(params, model, metrics)
    # what stands beside the model in the report is no part of its scores
    metrics.write_text(json.dumps({**metrics_of([4] * 4), "baselines": {}}))
    again = register(params, model, metrics)
    assert again == replace(first, done_before=True)
    better = register(params, model, write_metrics(tmp_path / "metrics.json", 2))
    assert (better.version, better.champion) == ("2", "2")
    # by force it comes back as what it is
    metrics = write_metrics(tmp_path / "metrics.json", 4)
    forced = register(params, model, metrics, force=True)
    assert (forced.version, forced.champion) == ("1", "1")
    assert register(params, model, metrics).reason.startswith("forced")
    assert len(open_store(params.tracking).search_model_versions(f"name = '{NAME}'")) == 2


@pytest.mark.parametrize("step", ["_describe", "_promote", "set_model_version_tag"])
def test_a_registration_that_was_killed_goes_on_with_its_version(params, model, tmp_path, monkeypatch, step):
    metrics = write_metrics(tmp_path / "metrics.json", 4)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if step.startswith("_"):
            patched.setattr(f"nuclei3d.experiment.registry.{step}", die)
        else:
            real = mlflow.MlflowClient.set_model_version_tag

            def die_at_the_end(client: Any, name: str, version: str, key: str, value: str) -> None:
                if key == "nuclei3d.complete":
                    raise KeyboardInterrupt
                real(client, name, version, key, value)

            patched.setattr(mlflow.MlflowClient, step, die_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            register(params, model, metrics)
    made = register(params, model, metrics)
    assert (made.version, made.champion) == ("1", "1")
    assert "first version" in made.reason
    assert len(open_store(params.tracking).search_model_versions(f"name = '{NAME}'")) == 1


def test_better_on_every_frame_is_better() -> None:
    verdict = judge(metrics_of([6, 5, 6, 7, 6, 5]), metrics_of([2, 2, 1, 2, 3, 2]), "champion", seed=0)
    assert verdict.better
    # 35 and 12 of 96 nuclei missed and none invented: AP is the share found.
    assert verdict.difference is not None
    np.testing.assert_allclose(verdict.difference, (35 - 12) / 96)
    assert verdict.low is not None
    assert verdict.low > 0
    assert "better than the champion" in verdict.reason


@pytest.mark.parametrize(
    ("before", "now", "difference"),
    [
        ([3, 2, 4, 3, 2, 3], [3, 2, 4, 3, 2, 3], 0),
        ([1] * 6, [5] * 6, -1),
        # better here and worse there
        ([8, 0, 8, 0, 8, 0], [0, 0, 0, 7, 8, 8], 1),
    ],
)
def test_what_is_not_surely_better_is_not_better(before: list[int], now: list[int], difference: int) -> None:
    verdict = judge(metrics_of(before), metrics_of(now), "champion", seed=0)
    assert not verdict.better
    assert np.sign(verdict.difference) == difference


def test_other_embryos_settle_nothing() -> None:
    verdict = judge(metrics_of([6] * 6), metrics_of([0] * 6, digest="other"), "champion", seed=0)
    assert not verdict.better
    assert "same held-out volumes" in verdict.reason
    assert not judge(metrics_of([6] * 6), metrics_of([0] * 5), "champion", seed=0).better


def test_what_cannot_be_registered_is_told_and_leaves_nothing(params, model, tmp_path):
    metrics = write_metrics(tmp_path / "metrics.json", 4)
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"ap": 1}')
    for folder, file, told in (
        (tmp_path / "absent", metrics, "no model folder"),
        (model, tmp_path / "absent.json", "cannot read the metrics"),
        (model, wrong, "'volumes'"),
    ):
        with pytest.raises(InputError, match=told):
            register(params, folder, file)
    client = open_store(params.tracking)
    assert client.search_registered_models() == []
    assert client.search_runs([item.experiment_id for item in client.search_experiments()]) == []


def test_an_unknown_model_is_told_with_the_known_ones(params: Params) -> None:
    for uri in ("models:/nuclei_3d@champion", "models:/nuclei_3d/7", "models:/a b"):
        with pytest.raises(InputError, match="registered models: none"):
            fetch_model(uri, params)
    with pytest.raises(InputError, match="has no model"):
        roll_back(params)


# Loads the model and answers the input example, in a process that cannot import the installed package: -S
# leaves out the .pth file of the editable installation, and nothing else has the package.
ALONE = """
import importlib.util, json, sys
assert importlib.util.find_spec("nuclei3d") is None, "the package must not be importable here"
import mlflow
model = mlflow.pyfunc.load_model("models:/nuclei_3d@champion")
import nuclei3d
frame = model.input_example
answer = model.predict(frame, params={"mode": "ortho"})[0]
others = {"mode": "stitch", "min_volume_um3": 5.0, "voxel_size_um": [2.0, 1.0, 1.0]}
again = model.predict(frame, params=others)[0]
print(json.dumps({"code": nuclei3d.__file__, "answer": answer, "again": again["parameters"]}))
"""


@pytest.mark.slow  # another process compiles the package's kernels anew
def test_it_loads_and_predicts_where_the_package_is_not_installed(params, model, tmp_path):
    register(params, model, write_metrics(tmp_path / "metrics.json", 4))
    uri = params.tracking.uri
    assert uri is not None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(site.getsitepackages()),
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-S", "-c", ALONE],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert "/code/nuclei3d/" in told["code"]
    assert told["answer"]["model"] == {"name": NAME, "registered_name": NAME, "version": "1"}
    assert told["again"]["mode"] == "stitch"
    assert told["again"]["voxel_size_um"] == [2.0, 1.0, 1.0]
    assert told["again"]["min_volume_um3"] == 5.0

    # The same masks as the package makes here, from the same file.
    frame, _ = request_example(load_model(model).info)
    file = tmp_path / "example.ome.tif"
    file.write_bytes(frame["volume"][0])
    (volume,) = find_frames(file)
    segmenter = Segmenter(fetch_model("models:/nuclei_3d/1", params), params.predict, "cpu")
    expected = segmenter.segment(volume.read(), volume.require_voxel_size())
    found = tifffile.imread(io.BytesIO(base64.b64decode(told["answer"]["labels"])))
    np.testing.assert_array_equal(found, expected.labels)
    assert len(told["answer"]["nuclei"]) == len(expected.nuclei)
