"""What is predicted beside the model: another champion, and Cellpose's own fusion."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from nuclei3d.config import Params, load_params
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import ModelInfo, save_model
from nuclei3d.networks.planning import plan_architecture
from nuclei3d.networks.unet3d import VolumeSpec
from nuclei3d.stages.assess import predict_baselines

FRAMES = {"c": [Path("data/c/images/t0.tif")]}


SPEC = VolumeSpec(plan_architecture(2.2, "small"), 2.2, (24, 64, 64))


def write_model(folder: Path, weights: str, **info: Any) -> Path:
    folder.mkdir()
    (folder / "nuclei_3d").write_text(weights)
    (folder / "model.json").write_text(ModelInfo(diameter_px=17, **info).model_dump_json())
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Path]]:
    """Note model, mode and folder of each prediction instead of making it."""
    made: list[tuple[str, str, Path]] = []

    def predict(params: Params, inputs: list[Path], model: str, out: Path) -> None:
        assert inputs == FRAMES["c"]
        out.mkdir(parents=True)
        made.append((model, params.predict.mode, out))

    monkeypatch.setattr("nuclei3d.stages.predict.predict", predict)
    return made


def crown(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    versions = [] if folder is None else ["4"]
    monkeypatch.setattr("nuclei3d.experiment.registry.champions", lambda params: versions)
    monkeypatch.setattr("nuclei3d.experiment.registry.fetch_model", lambda uri, params: folder)


def test_another_model_that_is_champion_is_a_baseline(calls, monkeypatch, tmp_path):
    crown(monkeypatch, write_model(tmp_path / "champion", "old"))
    model = write_model(tmp_path / "model", "new")
    out = tmp_path / "baselines"
    (out / "champion_3" / "c").mkdir(parents=True)
    mine = [out / "champion_3" / "c" / "t0_masks.ome.tif", out / "stardist" / "notes.txt"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    made = predict_baselines(
        load_params(None, ["predict.mode=stitch", "evaluate.baselines=[champion]"]), FRAMES, str(model), out
    )
    assert made == {"champion (version 4)": out / "champion_4"}
    assert calls == [("models:/nuclei_3d/4", "stitch", out / "champion_4" / "c")]
    # what is not known to be predicted is laid aside, what is no baseline of ours stays
    assert not mine[0].exists()
    (kept,) = (out / "champion_3" / "c" / ".predicted" / "changed").iterdir()
    assert (kept.read_text(), mine[1].read_text()) == ("mine", "mine")


def test_a_champion_in_3d_is_run_in_3d_and_one_in_2d_is_not(calls, monkeypatch, tmp_path):
    crown(monkeypatch, write_model(tmp_path / "a", "old", kind="full3d", full3d=SPEC))
    predict_baselines(
        load_params(None, ["evaluate.baselines=[champion]"]),
        FRAMES,
        "models:/other@champion",
        tmp_path / "one",
    )
    crown(monkeypatch, write_model(tmp_path / "b", "old"))
    full3d = load_params(None, ["predict.mode=full3d", "evaluate.baselines=[champion, stock_fusion]"])
    predict_baselines(full3d, FRAMES, "models:/other@champion", tmp_path / "two")
    assert [mode for _, mode, _ in calls] == ["full3d", "ortho"]


def test_beside_a_mixed_prediction_each_network_stands_by_itself(calls, monkeypatch, tmp_path):
    crown(monkeypatch, write_model(tmp_path / "a", "old"))
    model = write_model(tmp_path / "model", "new")
    mixed = ["predict.mode=mixed", "predict.volume_model=solid"]
    params = load_params(None, [*mixed, "evaluate.baselines=[champion, stock_fusion]"])
    seen: list[Path | None] = []
    from nuclei3d.stages import predict as stage

    note = stage.predict
    monkeypatch.setattr(
        stage,
        "predict",
        lambda params, *rest: (seen.append(params.predict.volume_model), note(params, *rest)),
    )
    predict_baselines(params, FRAMES, str(model), tmp_path / "out")
    assert [mode for _, mode, _ in calls] == ["cellpose", "ortho"]
    assert seen == [None, None]


def test_cellposes_fusion_is_left_out_beside_a_network_that_it_does_not_load(calls, monkeypatch, tmp_path):
    crown(monkeypatch, None)
    params = load_params(None, ["evaluate.baselines=[stock_fusion]"])
    for other in ({"kind": "full3d", "full3d": SPEC}, {"width": 16}):
        model = write_model(tmp_path / next(iter(other)), "new", **other)
        assert predict_baselines(params, FRAMES, str(model), tmp_path / "one") == {}
    flat = write_model(tmp_path / "flat", "new")
    predict_baselines(params, FRAMES, str(flat), tmp_path / "two")
    assert [mode for _, mode, _ in calls] == ["cellpose"]


def test_what_a_model_started_from_is_a_baseline_as_long_as_it_is_the_same(
    calls, monkeypatch, tmp_path, capsys
):
    start = tmp_path / "start"
    save_model(start, new_network(17, 0), ModelInfo(diameter_px=17), "")
    lineage = {
        "start_from": "start",
        "start_md5": hashlib.md5((start / "nuclei_3d").read_bytes()).hexdigest(),
    }
    model = write_model(tmp_path / "model", "new", nucleus_diameter_um=9.0, lineage=lineage)
    params = load_params(None, ["evaluate.baselines=[start_model]"])
    monkeypatch.chdir(tmp_path)
    made = predict_baselines(params, FRAMES, str(model), tmp_path / "one")
    assert made == {"start model (start)": tmp_path / "one" / "start_model"}
    assert calls == [("start", "auto", tmp_path / "one" / "start_model" / "c")]
    save_model(start, new_network(17, 1), ModelInfo(diameter_px=17), "")
    assert predict_baselines(params, FRAMES, str(model), tmp_path / "two") == {}
    assert "not there as it was" in capsys.readouterr().err


def test_the_champion_itself_and_no_champion_are_no_baselines(calls, monkeypatch, tmp_path):
    model = write_model(tmp_path / "model", "same")
    for champion in (None, write_model(tmp_path / "champion", "same")):
        crown(monkeypatch, champion)
        params = load_params(None, ["evaluate.baselines=[champion]"])
        assert predict_baselines(params, FRAMES, str(model), tmp_path / "baselines") == {}
    assert calls == []
    assert (tmp_path / "baselines").is_dir()


def test_beside_the_champion_stands_the_one_before_it(calls, monkeypatch, tmp_path):
    model = write_model(tmp_path / "model", "same")
    folders = {"4": write_model(tmp_path / "champion", "same"), "3": write_model(tmp_path / "older", "old")}
    monkeypatch.setattr("nuclei3d.experiment.registry.champions", lambda params: list(folders))
    monkeypatch.setattr(
        "nuclei3d.experiment.registry.fetch_model", lambda uri, params: folders[uri.rpartition("/")[2]]
    )
    out = tmp_path / "baselines"
    params = load_params(None, ["evaluate.baselines=[champion]"])
    assert predict_baselines(params, FRAMES, str(model), out) == {"champion (version 3)": out / "champion_3"}
