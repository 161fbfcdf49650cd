"""The fully 3D network through the same stages: prepared, trained, predicted, judged."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from nuclei3d.cli import app
from nuclei3d.config.loading import validate_params
from nuclei3d.errors import InputError
from nuclei3d.flows import flows_3d, tanh_flows_3d
from nuclei3d.images.frames import read_labels
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.folder import load_model
from nuclei3d.networks.unet3d import VolumeNetwork
from nuclei3d.stages.augment import write_augmentation_sheet
from nuclei3d.stages.prepare import prepare
from nuclei3d.stages.train import train
from nuclei3d.stages.training_data import load_samples, read_slices
from nuclei3d.training.loop import StopTraining
from nuclei3d.training.samples import FLOW_STEPS
from volumes_fixture import draw_volume

SIZE = VoxelSize(2.5, 1.0, 1.0)
SHAPE = (10, 32, 32)
EMBRYOS = ("ea", "eb", "ec")


def params_of(**sections):
    tree = {
        "data": {"split": {"train": ["ea"], "validation": ["eb"], "test": ["ec"]}},
        "prepare": {"downsample_xy": 1.0, "workers": 1},
        "train": {
            "network": "full3d",
            "name": "solid",
            "diameter_px": 12.0,
            "epochs": 2,
            "batch_size": 2,
            "crops_per_epoch": 8,
            "learning_rate": 0.01,
            "validation_crops": 2,
            "precision": "float32",
            "device": "cpu",
            "full3d": {"profile": "small", "patch": [8, 16, 16]},
        },
        "predict": {"precision": "float32", "device": "cpu"},
        "calibrate": {"volumes": 1},
        "evaluate": {"bootstrap": 10},
        "tracking": {"enabled": False},
    }
    for name, values in sections.items():
        tree[name] = {**tree[name], **values}
    return validate_params(tree, "the test")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embryos")
    rng = np.random.default_rng(0)
    for embryo in EMBRYOS:
        image, labels = draw_volume(rng, SIZE, SHAPE, nuclei=4)
        write_image(folder / embryo / "images" / "t0.tif", image, SIZE)
        write_labels(folder / embryo / "labels" / "t0.tif", labels, SIZE)
    return folder


@pytest.fixture(scope="module")
def volumes(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "slices"
    prepare(params_of(), data, out)
    return out


@pytest.fixture(scope="module")
def model(volumes, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "solid"
    train(params_of(calibrate={"volumes": 0}), volumes, out)
    return out


def weights_of(model):
    return torch.load(model / "solid", weights_only=True)


def test_the_whole_job_runs_with_a_3d_network_from_the_command_line(data, tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(params_of().model_dump_json())
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app,
        ["run", "--params", str(file), "--data", str(data), "--out", str(out), "--json"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    info = json.loads((out / "models" / "solid" / "model.json").read_text())
    assert info["kind"] == "full3d"
    assert info["voxel_size_um"] == [2.5, 1.0, 1.0]
    assert isinstance(load_model(out / "models" / "solid").network, VolumeNetwork)
    assert 0 <= json.loads((out / "evaluation" / "metrics.json").read_text())["ap"]["0.50"] <= 1
    with (out / "models" / "solid" / "history.csv").open() as history:
        rows = list(csv.DictReader(history))
    assert all(-1 <= float(row["validation_flow_cosine_z"]) <= 1 for row in rows)


def test_prepare_keeps_the_planes_and_stores_physical_flows(data, volumes):
    stored = load_samples(read_slices(volumes), "train")
    assert stored.infos[0].shape == SHAPE
    labels = read_labels(data / "ea" / "labels" / "t0.tif")
    arrays = stored.read(0)
    np.testing.assert_array_equal(arrays.labels > 0, labels > 0)
    np.testing.assert_allclose(
        np.moveaxis(arrays.flows, -1, 0) / FLOW_STEPS, flows_3d(labels, SIZE), atol=0.005
    )
    table = stored.nuclei[0]
    for label, centre in enumerate(table.centres, start=1):
        np.testing.assert_allclose(centre, np.argwhere(arrays.labels == label).mean(axis=0) + 0.5, atol=1e-3)
    assert np.isfinite(table.contrasts).any()
    assert sum(stored.flow_variances) == pytest.approx(1, abs=0.1)


def test_preparing_twice_gives_the_same_bytes(data, volumes, tmp_path):
    prepare(params_of(), data, tmp_path / "again")
    files = sorted(path.relative_to(volumes) for path in volumes.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*.*"))
    assert all((volumes / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)


def test_tanh_targets_reach_model_and_prediction(data, tmp_path):
    params = params_of(prepare={"targets": "tanh"}, calibrate={"volumes": 0})
    prepare(params, data, tmp_path / "slices")
    stored = load_samples(read_slices(tmp_path / "slices"), "train").read(0)
    wanted = tanh_flows_3d(stored.labels.astype(np.int64))
    np.testing.assert_allclose(np.moveaxis(stored.flows, -1, 0) / FLOW_STEPS, wanted, atol=0.005)
    train(params, tmp_path / "slices", tmp_path / "solid")
    assert load_model(tmp_path / "solid").info.full3d.targets == "tanh"


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(volumes, model, tmp_path):
    class Killed(Exception):  # noqa: N818 - what a signal would be
        pass

    def kill(report):
        raise Killed

    params = params_of(calibrate={"volumes": 0})
    with pytest.raises(Killed):
        train(params, volumes, tmp_path / "solid", on_epoch=kill)
    train(params, volumes, tmp_path / "solid")
    first, second = weights_of(model), weights_of(tmp_path / "solid")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_training_can_start_from_a_3d_model_of_its_shape_only(volumes, model, tmp_path):
    def stop(report):
        raise StopTraining("enough")

    gentle = {"start_from": str(model), "learning_rate": 1e-12, "weight_decay": 0.0, "epochs": 1}
    params = params_of(train=params_of().train.model_dump() | gentle, calibrate={"volumes": 0})
    train(params, volumes, tmp_path / "on", on_epoch=stop)
    first, second = weights_of(model), weights_of(tmp_path / "on")
    kernel = next(name for name, value in first.items() if value.ndim == 5)
    assert torch.allclose(first[kernel], second[kernel], atol=1e-6)
    other = params_of().train.model_dump() | {"start_from": str(model)}
    other["full3d"] = {"profile": "small", "style": True, "patch": [8, 16, 16]}
    with pytest.raises(InputError, match="another network"):
        train(params_of(train=other), volumes, tmp_path / "other")


def test_planes_and_volumes_are_not_mixed_up(data, volumes, tmp_path):
    planes = params_of(train={"network": "views2d"})
    with pytest.raises(InputError, match=r"prepared for train\.network 'full3d', not 'views2d'"):
        train(planes, volumes, tmp_path / "m")
    with pytest.raises(InputError, match="planes only"):
        write_augmentation_sheet(params_of(), volumes, tmp_path / "sheet.png")


def test_a_damaged_data_set_is_named(volumes, tmp_path):
    shutil.copytree(volumes, tmp_path / "v")
    file = tmp_path / "v" / "train" / "ea_t0.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"ea_t0\.bin was changed since prepare wrote it"):
        train(params_of(), tmp_path / "v", tmp_path / "m")
    file.unlink()
    with pytest.raises(InputError, match=r"cannot read .*ea_t0\.bin"):
        train(params_of(), tmp_path / "v", tmp_path / "m")


def test_a_patch_that_does_not_suit_the_pooling_is_explained(volumes, tmp_path):
    settings = params_of().train.model_dump() | {"full3d": {"patch": [10, 20, 20]}}
    with pytest.raises(InputError, match=r"multiples of \[4, 8, 8\]"):
        train(params_of(train=settings), volumes, tmp_path / "m")


def test_gaps_in_the_numbers_of_labels_change_nothing(volumes, tmp_path):
    rng = np.random.default_rng(0)
    for embryo in EMBRYOS:
        image, labels = draw_volume(rng, SIZE, SHAPE, nuclei=4)
        write_image(tmp_path / "data" / embryo / "images" / "t0.tif", image, SIZE)
        spread = np.array([0, 3, 4, 9, 70], np.uint16)[labels]
        write_labels(tmp_path / "data" / embryo / "labels" / "t0.tif", spread, SIZE)
    prepare(params_of(), tmp_path / "data", tmp_path / "slices")
    for name in ("nuclei.csv", "manifest.csv"):
        assert (tmp_path / "slices" / name).read_bytes() == (volumes / name).read_bytes()


def test_debris_becomes_background(data, volumes, tmp_path):
    sizes = load_samples(read_slices(volumes), "train").nuclei[0].volumes_um3
    least = float(np.sort(sizes)[1])
    prepare(params_of(prepare={"min_volume_um3": least}), data, tmp_path / "slices")
    described = read_slices(tmp_path / "slices")
    stored = load_samples(described, "train")
    assert stored.infos[0].nuclei == len(sizes) - 1 == stored.read(0).labels.max()
    assert described.summary.labels_left_out >= 1
