"""A training that starts from a model takes its scale over, aloud, and ends with the better of the two."""

import csv

import numpy as np
import pytest
import torch

from nuclei3d.config import load_params
from nuclei3d.console import warned
from nuclei3d.errors import InputError
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import ModelInfo, TrainingRange, load_model, save_model
from nuclei3d.stages.start_model import load_fine_tuning
from nuclei3d.stages.train import train
from nuclei3d.stages.training_data import read_summary
from slices_fixture import write_slices

SMALL = (
    *("train.epochs=1", "train.batch_size=2", "train.crops_per_epoch=4", "train.crop_px=32"),
    *("train.validation_crops=2", "train.precision=float32", "train.device=cpu", "tracking.enabled=false"),
)
# every step halves the weights
WORSE = ("train.learning_rate=1e-2", "train.weight_decay=50")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "model"
    info = ModelInfo(name="start", diameter_px=17.0, nucleus_diameter_um=8.5, lower_percentile=2.0)
    save_model(folder, new_network(17.0, 3), info, "")
    return folder


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("train: {diameter_px: 12, learning_rate: 2.0e-3, epochs: 30}\n")
    return path


def taken_of(params):
    train = params.train
    scale = (train.diameter_px, params.normalization.lower_percentile)
    return (*scale, train.learning_rate, train.warmup_steps, train.epochs)


def test_the_start_models_scale_and_a_gentle_schedule_replace_the_files_aloud(model, file, capsys):
    params = load_fine_tuning(file, [f"train.start_from={model}"], asked=True)
    assert taken_of(params) == (17.0, 2.0, 5e-4, 20, 10)
    said = capsys.readouterr().err
    assert "train.diameter_px=17.0, for this start; 12.0 otherwise" in said
    assert "normalization.lower_percentile=2.0, for this start; 1.0 otherwise" in said
    assert "train.learning_rate=0.0005, for this start; 0.002 otherwise" in said


def test_the_start_models_kind_and_width_come_with_it(tmp_path, capsys):
    save_model(tmp_path / "thin", new_network(17.0, 3, 16), ModelInfo(diameter_px=17.0, width=16), "")
    start = f"train.start_from={tmp_path / 'thin'}"
    assert load_fine_tuning(None, [start], asked=True).train.width == 16
    assert "train.width=16, for this start; 32 otherwise" in capsys.readouterr().err
    assert load_fine_tuning(None, [start, "train.width=24"], asked=True).train.width == 24
    with pytest.raises(InputError, match="width is of network views2d"):
        load_fine_tuning(None, ["train.network=full3d", "train.width=16"], asked=False)


def test_what_is_set_on_the_command_line_wins(model, file):
    given = [f"train.start_from={model}", "train.diameter_px=12", "train.epochs=2", "normalization={}"]
    assert taken_of(load_fine_tuning(file, given, asked=True)) == (12.0, 1.0, 5e-4, 20, 2)


def test_a_start_model_in_the_file_gives_what_the_option_gives(model, file):
    asked = load_fine_tuning(file, [f"train.start_from={model}"], asked=True)
    file.write_text(file.read_text().replace("{diam", f"{{start_from: {model}, fine_tune: {{}}, diam"))
    assert taken_of(load_fine_tuning(file, [], asked=False)) == taken_of(asked)
    # a file from before there was fine_tune keeps its own schedule
    file.write_text(file.read_text().replace("fine_tune: {}, ", ""))
    assert taken_of(load_fine_tuning(file, [], asked=False)) == (17.0, 2.0, 2e-3, 50, 30)


@pytest.mark.parametrize(("diameter", "factor"), [(34, 2.0), (10, 1.0)])
def test_planes_are_cut_at_the_start_models_scale(model, file, tmp_path, diameter, factor):
    z, y, x = np.mgrid[:40, :40, :40] - 19.5
    ball = (z**2 + y**2 + x**2 < (diameter / 2) ** 2).astype(np.uint16)
    size = VoxelSize(0.3, 0.3, 0.3)
    for embryo in "ab":
        write_image(tmp_path / f"data/{embryo}/images/t0.tif", ball * 100, size)
        write_labels(tmp_path / f"data/{embryo}/labels/t0.tif", ball, size)
    given = [f"train.start_from={model}", "data.split.train=[a]"]
    params = load_fine_tuning(file, given, asked=True, trains=False, data=tmp_path / "data")
    assert params.prepare.downsample_xy == pytest.approx(factor, rel=0.01)
    assert taken_of(params) == (17.0, 2.0, 2e-3, 50, 30)
    given.append("prepare.downsample_xy=3")
    params = load_fine_tuning(file, given, asked=True, data=tmp_path / "data")
    assert params.prepare.downsample_xy == 3


def test_bare_weights_want_their_diameter(model, file, tmp_path):
    bare = tmp_path / "cyto"
    bare.write_bytes((model / "start").read_bytes())
    with pytest.raises(InputError, match=r"--set train.diameter_px=D \(it was saved with 17\)"):
        load_fine_tuning(file, [f"train.start_from={bare}"], asked=True)
    params = load_fine_tuning(file, [f"train.start_from={bare}", "train.diameter_px=20"], asked=True)
    assert params.train.diameter_px == 20.0
    with pytest.raises(InputError, match="no model at"):
        load_fine_tuning(file, ["train.start_from=nowhere"], asked=True)


def test_epoch_0_is_judged_and_wins_over_what_is_worse_also_after_a_kill(model, tmp_path):
    slices = write_slices(tmp_path / "slices")
    params = load_fine_tuning(None, [*SMALL, *WORSE, f"train.start_from={model}"], asked=True)

    def kill(report):
        raise RuntimeError(f"killed after epoch {report.epoch}")

    with pytest.raises(RuntimeError, match="epoch 1"):
        train(params, slices, tmp_path / "m", on_epoch=kill)
    result = train(params, slices, tmp_path / "m")
    assert (result.epoch, result.epochs) == (0, 1)
    first, kept = (load_model(path).network.state_dict() for path in (model, tmp_path / "m"))
    assert all(torch.equal(first[name], kept[name]) for name in first if name != "diam_labels")
    with (tmp_path / "m" / "history.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert float(rows[0]["validation_loss"]) == pytest.approx(result.metrics["validation_loss"], rel=1e-4)
    assert rows[0]["train_loss"] == ""
    lineage = load_model(tmp_path / "m").info.lineage
    assert (lineage["start_from"], len(lineage["start_md5"])) == ("model", 32)


def test_what_the_start_model_has_seen_and_its_thresholds_are_taken_over(tmp_path):
    seen = {
        "diameter_um": (8.0, 12.0),
        "voxel_x_um": (0.2, 0.5),
        "anisotropy": (2, 5),
        "range_over_noise": (9, 90),
    }
    cut = {"nucleus_diameter_um": 14.0, "score_threshold": 0.6, "min_volume_um3": 80.0}
    info = ModelInfo(name="start", diameter_px=17.0, training=TrainingRange(**seen), **cut)
    save_model(tmp_path / "start", new_network(17.0, 3), info, "")
    slices = write_slices(tmp_path / "slices")
    summary = read_summary(slices)
    new = {
        "diameter_um": (9.0, 9.0),
        "voxel_x_um": (0.8, 0.8),
        "anisotropy": (1.0, 1.0),
        "range_over_noise": (48, 48),
    }
    (slices / "summary.json").write_text(summary.model_copy(update={"training": new}).model_dump_json())
    params = load_fine_tuning(None, [*SMALL, *WORSE, f"train.start_from={tmp_path / 'start'}"], asked=True)
    train(params, slices, tmp_path / "m")
    info = load_model(tmp_path / "m").info
    # the new nuclei are half as wide
    assert (info.score_threshold, info.min_volume_um3) == (0.6, 10.0)
    found = info.training
    assert found is not None
    assert dict(found) == {
        "diameter_um": (8, 12),
        "voxel_x_um": (0.2, 0.8),
        "anisotropy": (1, 5),
        "range_over_noise": (9, 90),
    }


def test_images_unlike_the_start_models_are_told(model, tmp_path):
    slices = write_slices(tmp_path / "slices")
    given = [*SMALL, f"train.start_from={model}", "train.diameter_px=12"]
    train(load_params(None, given), slices, tmp_path / "m")
    assert [warning.split(":")[0] for warning in warned] == [
        "train.diameter_px is 12, but 17 in the model that this starts from",
        "normalization.lower_percentile is 1, but 2 in the model that this starts from",
    ]


def test_without_validation_data_the_last_epoch_is_kept_and_that_is_told(model, tmp_path):
    slices = write_slices(tmp_path / "slices", validation=0)
    params = load_fine_tuning(None, [*SMALL, *WORSE, f"train.start_from={model}"], asked=True)
    assert train(params, slices, tmp_path / "m").epoch == 1
    assert any(warning.startswith("no validation data: the last epoch") for warning in warned)
