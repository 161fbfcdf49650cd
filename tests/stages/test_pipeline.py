"""The whole job: one parent run with a child per stage, and after a kill it ends the same."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nuclei3d.config import Params, load_params
from nuclei3d.errors import InputError
from nuclei3d.experiment.registry import Registered
from nuclei3d.experiment.runs import stage_run
from nuclei3d.experiment.store import open_store
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.assess import headline
from nuclei3d.stages.run import PipelineResult, run_pipeline
from nuclei3d.stages.simulate import simulate
from nuclei3d.stages.training_data import SliceSummary


@dataclass
class Made:
    """What a stand-in of a stage gives back."""

    out: Path
    summary: SliceSummary | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    frames: tuple[Any, ...] = ()
    done_before: bool = False
    page: Path | None = None
    tracks: Any = None

    @property
    def scores(self) -> dict[str, float]:
        return headline(self.metrics)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.out / "metrics.json",)


class Stages:
    """Stand-ins of the stages that write a little, note their order, and die where they are told to."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.dies_in: str | None = None

    def _begin(self, stage: str) -> None:
        if self.dies_in == stage:
            self.dies_in = None
            raise KeyboardInterrupt
        self.done.append(stage)

    def prepare(self, params: Params, data: Path, out: Path, *, strict: bool = False) -> Made:
        self._begin("prepare")
        out.mkdir(parents=True, exist_ok=True)
        parts = {"train": 1, "validation": 1, "test": 1}
        sizes = {"nucleus_diameter_um": 9.0, "diameter_px": 12.0, "voxel_um": 0.7}
        summary = SliceSummary(
            data=data, contrast_quintiles=(), planes=parts, frames=parts, md5="feed", **sizes
        )
        (out / "summary.json").write_text(summary.model_dump_json())
        return Made(out, summary)

    def train(self, params: Params, slices: Path, out: Path, *, data: Path) -> Made:
        with stage_run("train", params, inputs={"slices": slices}):
            self._begin("train")
            out.mkdir(parents=True, exist_ok=True)
            (out / "nuclei_3d").write_text(f"weights of {params.train.epochs} epochs")
            (out / "history.csv").write_text("epoch\n1\n")
        return Made(out)

    def predict(
        self, params: Params, inputs: list[Path], model: str, out: Path, *, link: bool = False
    ) -> Made:
        assert link or "baselines" in out.parts, "the job ends with a page of tracks"
        self._begin("predict")
        out.mkdir(parents=True, exist_ok=True)
        for path in inputs:
            (out / f"{path.stem}_masks.ome.tif").write_text((Path(model) / "nuclei_3d").read_text())
        page = out / "prediction.html"
        page.write_text("")
        return Made(out, frames=(Made(out, done_before=True), Made(out)), page=page, tracks=None)

    def evaluate(self, params: Params, truth: Path, pred: Path, out: Path, **options: Any) -> Made:
        self._begin("evaluate")
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text('{"volumes": {}}')
        self.predicted = sorted(path.name for path in pred.rglob("*_masks.ome.tif"))
        self.options = options
        return Made(out, metrics={"ap": {"0.50": 0.9}, "splits": 2, "recall_faint": None})

    def register(self, params: Params, model: Path, metrics: Path) -> Registered:
        with stage_run("register", params, inputs={"model": model}):
            self._begin("register")
        return Registered("nuclei_3d", "7", "7", "first", done_before=True)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    fakes = Stages()
    for stage in ("prepare", "train", "predict", "evaluate"):
        monkeypatch.setattr(f"nuclei3d.stages.{stage}.{stage}", getattr(fakes, stage))
    monkeypatch.setattr("nuclei3d.experiment.registry.register", fakes.register)
    return fakes


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for embryo in ("a", "b", "c"):
        for frame in ("t0", "t1"):
            labels = np.zeros((4, 8, 8), np.uint16)
            labels[1:3, 2:6, 2:6] = 1
            write_image(tmp_path / "data" / embryo / "images" / f"{frame}.tif", labels, VoxelSize(2, 1, 1))
            write_labels(tmp_path / "data" / embryo / "labels" / f"{frame}.tif", labels, VoxelSize(2, 1, 1))
    return tmp_path / "data"


@pytest.fixture
def settings(own_store: str) -> list[str]:
    split = ["data.split.train=[a]", "data.split.validation=[b]", "data.split.test=[c]"]
    # stock fusion has a test of its own: elsewhere the stand-in of `predict` is to be called once
    baselines = "evaluate.baselines=[otsu, champion]"
    return [*split, own_store, "predict.device=cpu", "train.device=cpu", baselines]


ALL = ["prepare", "train", "predict", "evaluate", "register"]


def test_the_job_is_one_run_with_a_child_per_stage_whatever_kills_it(
    stages, data, settings, tmp_path, capsys
):
    out = tmp_path / "out"

    def do(*more: str) -> PipelineResult:
        return run_pipeline(load_params(None, [*settings, *more]), data, out)

    for stage in ALL:
        stages.dies_in = stage
        with pytest.raises(KeyboardInterrupt):
            do()
    stages.done.clear()
    result = do()
    assert stages.done == ALL
    assert result.skipped == ("register",)
    assert result.version == "7"
    assert result.metrics == {"ap_0.50": 0.9, "splits": 2}
    assert stages.predicted == ["t0_masks.ome.tif", "t1_masks.ome.tif"]
    assert json.loads((out / "evaluation" / "headline.json").read_text()) == result.metrics

    client = open_store(load_params(None, settings).tracking)
    experiment = client.get_experiment_by_name("nuclei3d")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.run_id == result.run_id
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {"test/ap_0.50": 0.9, "test/splits": 2}
    assert (
        f"Pictures of the held-out time-lapse: {out}/predictions/c/prediction.html" in capsys.readouterr().err
    )
    for run in runs:
        if run.data.tags["nuclei3d.stage"] == "predict" and run.info.status == "FINISHED":
            (page,) = client.list_artifacts(run.info.run_id, "c")
            assert page.path == "c/prediction.html"
    killed = [run.data.tags["nuclei3d.stage"] for run in runs if run.info.status == "KILLED"]
    assert sorted(killed) == sorted(ALL)
    assert {run.data.tags["nuclei3d.stage"] for run in runs} == {*ALL, "pipeline"}
    assert {run.data.tags.get("mlflow.parentRunId", result.run_id) for run in runs} == {result.run_id}
    # A job that ended well is not gone on with, nor is another one.
    assert len({result.run_id, do().run_id, do("train.epochs=3").run_id}) == 3


@pytest.mark.slow  # trains, segments and registers
def test_a_job_that_was_stopped_or_had_ended_ends_the_same(settings, tmp_path, monkeypatch):
    small = ["simulate.embryos=[a, b, c]", "simulate.frames=1", "simulate.shape=[8, 64, 64]"]
    quick = ["train.epochs=1", "train.crops_per_epoch=4", "train.batch_size=2", "calibrate.volumes=0"]
    quick += ["train.crop_px=64", "train.validation_crops=2", "prepare.workers=1"]
    quick += ["evaluate.bootstrap=20", "evaluate.report=false", "predict.report=false"]
    params = load_params(None, [*settings, *small, "simulate.nuclei=6", "prepare.min_nuclei=1", *quick])
    simulate(params, tmp_path / "data")

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("nuclei3d.stages.assess.evaluate_held_out", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(params, tmp_path / "data", tmp_path / "out")
    model = (tmp_path / "out" / "models" / "nuclei_3d" / "nuclei_3d").read_bytes()
    first = run_pipeline(params, tmp_path / "data", tmp_path / "out")
    assert first.skipped == ("train", "predict")
    again = run_pipeline(params, tmp_path / "data", tmp_path / "out")
    assert again.skipped == ("train", "predict", "register")
    assert replace(again, skipped=first.skipped, run_id=first.run_id) == first
    # one epoch on four crops does not beat Otsu
    assert (first.version, first.champion) == ("1", None)
    assert "than the naive baseline" in str(first.reason)
    assert (tmp_path / "out" / "models" / "nuclei_3d" / "nuclei_3d").read_bytes() == model


def test_masks_of_frames_that_are_no_longer_held_out_are_removed(stages, data, settings, tmp_path):
    off = [*settings, "tracking.enabled=false"]
    run_pipeline(load_params(None, off), data, tmp_path / "out")
    other = [*off, "data.split.test=[b]", "data.split.validation=[c]"]
    result = run_pipeline(load_params(None, other), data, tmp_path / "out")
    assert result.version is None
    assert result.run_id is None
    left = {path.parent.name for path in (tmp_path / "out" / "predictions").glob("*/*_masks.ome.tif")}
    assert left == {"b"}
    # Of all true labels those of the held-out frames are evaluated, so none is missed.
    labels = [data / "b" / "labels" / f"{frame}.tif" for frame in ("t0", "t1")]
    assert stages.options["only"] == {(path, None): None for path in labels}
    assert {page.parent.name for page in (tmp_path / "out" / "predictions").glob("*/*.html")} == {"b"}


def test_stock_fusion_is_predicted_with_the_same_network_and_evaluated_beside_it(
    stages: Stages, data: Path, settings: list[str], tmp_path: Path
) -> None:
    params = load_params(None, [*settings, "tracking.enabled=false", "evaluate.baselines=[stock_fusion]"])
    run_pipeline(params, data, tmp_path / "out")
    folder = tmp_path / "out" / "baselines" / "stock_fusion"
    assert stages.options["baselines"] == {"stock fusion of the same network": folder}
    assert sorted(path.name for path in folder.rglob("*.tif")) == ["t0_masks.ome.tif", "t1_masks.ome.tif"]
    # No longer wanted, its masks are removed.
    again = load_params(None, [*settings, "tracking.enabled=false", "evaluate.baselines=[otsu]"])
    run_pipeline(again, data, tmp_path / "out")
    assert stages.options["baselines"] == {}
    assert not list(folder.glob("*/*_masks.ome.tif"))


def test_missing_data_and_a_bad_output_folder_are_told(data, settings, tmp_path):
    params = load_params(None, settings)
    with pytest.raises(InputError, match="no data set at"):
        run_pipeline(params, tmp_path / "absent", tmp_path / "out")
    with pytest.raises(InputError, match="lies in the data set"):
        run_pipeline(params, data, data / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        run_pipeline(params, data, tmp_path / "file")
    client = open_store(params.tracking)
    assert client.search_runs([item.experiment_id for item in client.search_experiments()]) == []


def test_a_headline_leaves_out_what_is_undefined() -> None:
    assert headline({"ap": {"0.50": 0.5}, "precision": None, "volumes": {}}) == {"ap_0.50": 0.5}
