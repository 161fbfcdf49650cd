"""A registered model is a version that loads anywhere; only a better one becomes champion."""

import base64
import io
import json
import os
import shutil
import site
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import tifffile
import torch

from nuclei3d.config import Params
from nuclei3d.console import warned
from nuclei3d.errors import InputError
from nuclei3d.experiment import packing, registry
from nuclei3d.experiment.packing import request_example
from nuclei3d.experiment.provenance import md5_of_input
from nuclei3d.experiment.registry import (
    champions,
    fetch_model,
    register,
    roll_back,
)
from nuclei3d.experiment.runs import METRICS_TAG, stage_run
from nuclei3d.experiment.store import open_store
from nuclei3d.images.frames import find_frames
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import ModelInfo, digest_of_weights, load_model, save_model, scored_model
from nuclei3d.scoring.watershed import OTSU
from nuclei3d.segmentation.segmenter import Segmenter
from scores_fixture import metrics_of

NAME = "nuclei_3d"


@pytest.fixture(autouse=True)
def _without_example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare MLflow the prediction of the example, which the slow test does."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(packing, "request_example", lambda info: None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    info = ModelInfo(
        name=NAME, diameter_px=17.0, nucleus_diameter_um=10.0, lineage={"data_md5": "d", "slices_md5": "s"}
    )
    save_model(tmp_path / "models" / NAME, new_network(17.0, seed=0), info, "# A card")
    return tmp_path / "models" / NAME


def variant(model: Path, name: object) -> Path:
    """Give another model than `model`: one with another card."""
    folder = model.parent / str(name)
    if not folder.exists():
        shutil.copytree(model, folder)
        (folder / "README.md").write_text(f"Card {name}")
    return folder


def write_metrics(path: Path, missed: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(metrics_of([missed] * 4)))
    return path


def version_of(params: Params, alias: str) -> str:
    return str(open_store(params.tracking).get_model_version_by_alias(NAME, alias).version)


def test_the_champion_moves_only_to_a_better_model_and_back(params, model, tmp_path):
    def register_with(missed: int, **options: bool) -> tuple[str, str, str]:
        metrics = write_metrics(tmp_path / f"evaluation{missed}" / "metrics.json", missed)
        made = register(params, variant(model, missed), metrics, **options)
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
    better = register(params, variant(model, "b"), write_metrics(tmp_path / "metrics.json", 2))
    assert (better.version, better.champion) == ("2", "2")
    # by force it comes back as what it is
    metrics = write_metrics(tmp_path / "metrics.json", 4)
    forced = register(params, model, metrics, force=True)
    assert (forced.version, forced.champion) == ("1", "1")
    assert register(params, model, metrics).reason.startswith("forced")
    assert len(open_store(params.tracking).search_model_versions(f"name = '{NAME}'")) == 2


def test_a_model_evaluated_anew_is_the_same_version_judged_by_its_new_scores(params, model, tmp_path):
    register(params, model, write_metrics(tmp_path / "metrics.json", 6))
    other = variant(model, "b")
    worse = register(params, other, write_metrics(tmp_path / "metrics.json", 8))
    assert (worse.version, worse.champion) == ("2", "1")
    better = register(params, other, write_metrics(tmp_path / "metrics.json", 2))
    assert (better.version, better.champion) == ("2", "2")
    # the next one is compared with the new scores: 3 of 16 missed is worse than 2
    third = register(params, variant(model, "c"), write_metrics(tmp_path / "metrics.json", 3))
    assert (third.version, third.champion) == ("3", "2")
    assert "0.8125 against 0.8750" in third.reason


@pytest.mark.parametrize(
    ("naive", "crowned", "told"),
    [
        ({"ap": dict.fromkeys(("0.50", "0.90"), 0.8)}, False, "not better than the naive baseline"),
        ({"ap": dict.fromkeys(("0.50", "0.90"), 0.7)}, True, "better than the naive baseline"),
        (None, False, "does not hold it"),
        (
            {"ap": {"0.50": 0.7}, "behind_model": {"metrics": {"ap_mean": {"interval": [-0.1, 0.2]}}}},
            False,
            "not surely better than the naive baseline",
        ),
        (
            {"ap": {"0.50": 0.7}, "behind_model": {"metrics": {"ap_mean": {"interval": [0.01, 0.1]}}}},
            True,
            "surely better than the naive baseline",
        ),
    ],
)
def test_a_first_version_is_champion_only_if_it_beats_the_naive_baseline(
    params: Params, model: Path, tmp_path: Path, naive: dict[str, Any] | None, crowned: bool, told: str
) -> None:
    baselines = {} if naive is None else {OTSU: naive}
    metrics = tmp_path / "metrics.json"
    # 4 of 16 nuclei missed, none invented: AP .75 at every IoU
    metrics.write_text(json.dumps({**metrics_of([4] * 4), "baselines": baselines}))
    made = register(params, model, metrics)
    assert made.version == "1"
    assert (made.champion == "1") == crowned
    assert told in made.reason
    assert crowned or "--force" in made.reason
    assert register(params, model, metrics, force=True).champion == "1"


def test_nobody_is_judged_on_frames_that_a_model_was_trained_on(params, model, tmp_path):
    def with_frames(name: str, **frames: Any) -> Path:
        folder = variant(model, name)
        info = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps({**info, "frames": frames}))
        return folder

    def evaluated(missed: int) -> Path:
        tree = metrics_of([missed] * 4)
        tree["model"] = scored_model(load_model(model).info, digest_of_weights(model))
        for number, volume in enumerate(tree["volumes"].values()):
            volume["frame_digest"] = f"image{number}-labels{number}"
        (tmp_path / "metrics.json").write_text(json.dumps(tree))
        return tmp_path / "metrics.json"

    stranger = with_frames("stranger", train={"other/t0": "a-b"})
    clean = register(params, stranger, evaluated(6))
    assert (clean.champion, [*warned]) == ("1", [])
    # the same image with corrected labels, in another folder, is still a frame that it knows
    knows = register(params, with_frames("knows", train={"X/7": "image2-corrected"}), evaluated(0))
    assert (knows.version, knows.champion) == ("2", "1")
    assert "trained on the embryos of E/0, E/1" in knows.reason
    chosen = register(params, with_frames("chosen", train={}, validation={"X/7": "b-labels1"}), evaluated(2))
    assert chosen.champion == "3"
    assert "chosen on E/1" in next(iter(warned))
    warned.clear()
    unknown = register(params, model, evaluated(0))
    assert unknown.champion == "4"
    assert "cannot be checked" in next(iter(warned))
    # nor where the champion knows them
    forced = register(params, variant(model, "knows"), evaluated(0), force=True)
    assert forced.champion == "2"
    last = register(params, with_frames("new", train={}), evaluated(0))
    assert last.champion == "2"
    assert "trained on the embryos of" in last.reason


def test_version_and_runs_name_each_other(params, model, tmp_path):
    with stage_run("train", params, inputs={}) as trained:
        pass
    metrics = write_metrics(tmp_path / "metrics.json", 4)
    with stage_run("evaluate", params, inputs={}) as evaluated:
        evaluated.tags({METRICS_TAG: md5_of_input(metrics)})
    info = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**info, "lineage": {"run_id": trained.run_id}}))
    made = register(params, model, metrics)
    client = open_store(params.tracking)
    tags = client.get_model_version(NAME, "1").tags
    assert tags["nuclei3d.train_run"] == trained.run_id
    assert tags["nuclei3d.evaluate_run"] == evaluated.run_id
    for run in (trained, evaluated):
        assert client.get_run(run.run_id).data.tags["nuclei3d.registered"] == "nuclei_3d version 1"
    assert client.get_run(made.run_id).info.run_name == "register nuclei_3d: version 1, champion"


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


def slow_comparison(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None]) -> list[str | None]:
    """Have something happen while a registration compares; gives the champions that were compared with."""
    real, champions = registry._compare_with_champion, []

    def compare(client: Any, name: str, champion: str | None, *others: Any) -> Any:
        champions.append(champion)
        verdict = real(client, name, champion, *others)
        meanwhile()
        return verdict

    monkeypatch.setattr(registry, "_compare_with_champion", compare)
    return champions


def test_two_at_once_on_an_empty_registry_are_compared(
    params: Params, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    champions = slow_comparison(monkeypatch, lambda: time.sleep(0.5))
    files = [
        (variant(model, missed), write_metrics(tmp_path / str(missed) / "metrics.json", missed))
        for missed in (4, 5)
    ]
    open_store(params.tracking)
    both = [threading.Thread(target=register, args=(params, *of_one)) for of_one in files]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert champions == [None, "1"]
    reasons = [
        version.tags["nuclei3d.reason"]
        for version in open_store(params.tracking).search_model_versions(f"name = '{NAME}'")
    ]
    assert sum("first version" in reason for reason in reasons) == 1


def test_a_champion_that_another_machine_made_meanwhile_is_compared_with(
    params: Params, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(params, model, write_metrics(tmp_path / "metrics.json", 6))
    register(params, variant(model, 7), write_metrics(tmp_path / "metrics.json", 7))
    client = open_store(params.tracking)

    def crown_the_other() -> None:
        client.set_registered_model_alias(NAME, "champion", "2")

    champions = slow_comparison(monkeypatch, crown_the_other)
    made = register(params, variant(model, 2), write_metrics(tmp_path / "metrics.json", 2))
    assert champions == ["1", "2"]
    assert "better than the champion (version 2)" in made.reason
    assert made.champion == "3"


def test_a_champion_whose_scores_were_lost_gives_way_by_force_alone(
    params: Params, model: Path, tmp_path: Path
) -> None:
    register(params, model, write_metrics(tmp_path / "metrics.json", 6))
    for kept in (tmp_path / "store" / "mlartifacts").rglob("metrics.json"):
        kept.write_text('{"ap": {"0.50": 1}, "f1": {}, "volumes": {"E/0": {"counts": {}}}}')
    metrics = write_metrics(tmp_path / "metrics.json", 2)
    model = variant(model, "other")
    made = register(params, model, metrics)
    assert (made.version, made.champion) == ("2", "1")
    assert "has no metrics to compare with" in made.reason
    assert "--force" in made.reason
    assert register(params, model, metrics, force=True).champion == "2"


def test_scores_of_another_model_are_refused(params, model, tmp_path, capsys):
    loaded, metrics = load_model(model), tmp_path / "metrics.json"
    other = scored_model(loaded.info, "0" * 64)
    metrics.write_text(json.dumps({**metrics_of([0] * 4), "model": other}))
    with pytest.raises(InputError, match=rf"{metrics} holds the scores of another model"):
        register(params, model, metrics)
    assert champions(params) == []
    own = scored_model(loaded.info, digest_of_weights(model))
    metrics.write_text(json.dumps({**metrics_of([0] * 4), "model": own}))
    register(params, model, metrics)
    assert "does not say of which model" not in capsys.readouterr().err
    own["thresholds"]["score_threshold"] = 0.9
    metrics.write_text(json.dumps({**metrics_of([1] * 4), "model": own}))
    register(params, model, metrics)
    assert f"was scored with other thresholds than {model} has" in capsys.readouterr().err


def test_what_cannot_be_registered_is_told_and_leaves_nothing(params, model, tmp_path):
    metrics = write_metrics(tmp_path / "metrics.json", 4)
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"ap": 1}')
    rubbish, blown_up = tmp_path / "rubbish", tmp_path / "blown_up"
    shutil.copytree(model, rubbish)
    (rubbish / NAME).write_bytes(b"rubbish")
    network = new_network(17.0, seed=0)
    with torch.no_grad():
        network.get_parameter("output.2.weight").fill_(3e38)
    save_model(blown_up, network, load_model(model).info, "# A card")
    for folder, file, told in (
        (tmp_path / "absent", metrics, "no model folder"),
        (model, tmp_path / "absent.json", "cannot read the metrics"),
        (model, wrong, r"wrong\.json is no metrics\.json of nuclei3d evaluate of this version: ap"),
        (rubbish, metrics, "not a weights file"),
        (blown_up, metrics, "NaN or infinite"),
    ):
        with pytest.raises(InputError, match=told):
            register(params, folder, file, force=True)
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
    which = told["answer"]["model"]
    assert which.items() >= {"name": NAME, "registered_name": NAME, "version": "1"}.items()
    assert len(which["weights_sha256"]) == len(which["settings_sha256"]) == 64
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
