"""What is odd about a data set is told before any work, and prepare says or refuses it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from nuclei3d.cli import app
from nuclei3d.config import Params, load_params
from nuclei3d.config.sections import EvaluateParams
from nuclei3d.console import warned
from nuclei3d.errors import InputError
from nuclei3d.images.embryos import ONE_IMAGE, PARTS, find_embryos, read_labelled, split_embryos
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.check import check
from nuclei3d.stages.evaluate import evaluate
from nuclei3d.stages.prepare import prepare
from nuclei3d.stages.training_data import load_samples, read_slices
from nuclei3d.training.crops import CropGrid
from nuclei3d.training.examples import NO_AUGMENTATION, CropMaker
from volumes_fixture import draw_volume

VOXEL = VoxelSize(2.0, 1.0, 1.0)
SPLIT = "data.split={train: [a], validation: [b], test: [c]}"
QUICK = [SPLIT, "prepare.workers=1", "prepare.downsample_xy=1"]


def make_data(folder: Path, voxel_size: VoxelSize = VOXEL) -> Path:
    for seed, embryo in enumerate("abc"):
        image, labels = draw_volume(np.random.default_rng(seed), voxel_size, (16, 48, 48), nuclei=10)
        for kind in ("images", "labels"):
            (folder / embryo / kind).mkdir(parents=True)
        for name in ("t000", "t001"):
            write_image(folder / embryo / "images" / f"{name}.tif", image, voxel_size)
            write_labels(folder / embryo / "labels" / f"{name}.tif", labels, voxel_size)
    return folder


@pytest.fixture
def params() -> Params:
    return load_params(None, QUICK)


def test_a_good_data_set_gives_no_warning(tmp_path: Path, params: Params) -> None:
    data = make_data(tmp_path / "data")
    result = check(params, data)
    assert (result.warnings, result.errors, result.exit_code) == ((), (), 0)
    assert [frame.nuclei for frame in result.frames] == [10] * 6
    summary = prepare(params, data, tmp_path / "slices").summary
    assert summary.warnings is None
    assert summary.training is not None
    assert summary.training["voxel_x_um"] == (1.0, 1.0)
    assert summary.training["anisotropy"] == (2.0, 2.0)
    low, high = summary.training["diameter_um"]
    assert low <= summary.nucleus_diameter_um <= high
    assert summary.training["range_over_noise"][0] == pytest.approx(
        result.frames[0].range_over_noise, abs=0.01
    )


def test_labels_of_another_frame_are_told(tmp_path: Path, params: Params) -> None:
    data = make_data(tmp_path / "data")
    shutil.copy(data / "a/labels/t000.tif", data / "b/labels/t001.tif")
    (warning,) = check(params, data).warnings
    assert warning.startswith("b/t001: the image is no brighter in the labels than around them")


def test_each_kind_of_fault_is_said_once_with_its_frames(
    tmp_path: Path, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data")
    _, labels = draw_volume(np.random.default_rng(0), VOXEL, (16, 48, 48), nuclei=10)
    for name in ("t000", "t001"):
        write_labels(data / "b" / "labels" / f"{name}.tif", (labels > 0).astype(np.uint32), VOXEL)
    warning, of_sizes = check(params, data).warnings
    assert of_sizes.startswith("nuclei measure 12")
    assert warning.startswith("b/t000: one label, 1, for everything")
    assert warning.endswith("(likewise b/t001)")
    capsys.readouterr()
    warned.clear()
    assert prepare(params, data, tmp_path / "slices").as_json()["warnings"] == [warning]
    assert capsys.readouterr().err.count("one label") == 1
    with pytest.raises(InputError, match=r"t000\.tif: one label"):
        prepare(params, data, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_labels_in_the_place_of_the_image_are_said(tmp_path: Path, params: Params) -> None:
    data = make_data(tmp_path / "data")
    labels = tifffile.imread(data / "b" / "labels" / "t000.tif")
    write_image(data / "b" / "images" / "t000.tif", labels, VOXEL)
    (warning,) = check(params, data).warnings
    assert warning.startswith("b/t000: the image is 0 outside the labels")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file; expected DATA"):
        check(params, tmp_path / "file")


def test_everything_is_told_at_once_and_refused_with_code_2(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    image, labels = draw_volume(np.random.default_rng(0), VOXEL, (16, 48, 48), nuclei=10)
    write_labels(data / "a" / "labels" / "t000.tif", image.astype(np.uint32), VOXEL)
    write_labels(data / "b" / "labels" / "t000.tif", labels[:, 1:], VOXEL)
    (data / "c" / "labels" / "t001.tif").unlink()
    for name in ("t000", "t001"):
        write_labels(data / "c" / "labels" / f"{name}.tif", np.roll(labels, 2, axis=0), VOXEL)
        write_image(data / "c" / "images" / f"{name}.tif", image, VOXEL)
    options = [word for text in ("data.split.train=[nobody]", *QUICK[1:]) for word in ("--set", text)]
    done = CliRunner().invoke(app, ["check", str(data), "--json", *options])
    assert done.exit_code == 2
    told = json.loads(done.stdout)
    assert any("b/t000" in error and "48" in error for error in told["errors"])
    assert any("nobody" in error for error in told["errors"])
    assert any("a/t000: these are intensities" in warning for warning in told["warnings"])
    assert any("lie off the image" in warning and "c z +4" in warning for warning in told["warnings"])
    assert told["offsets_um"]["c"] == pytest.approx([4, 0, 0], abs=0.3)


def test_labels_off_the_image_are_moved_wherever_they_are_read(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    (tmp_path / "true").mkdir()
    for name in ("t000", "t001"):
        path = data / "c" / "labels" / f"{name}.tif"
        labels = tifffile.imread(path)
        write_labels(tmp_path / "true" / f"{name}.tif", labels, VOXEL)
        write_labels(path, np.roll(labels, 2, axis=0), VOXEL)
    (warning,) = check(load_params(None, QUICK), data).warnings
    given = warning.split("--set '")[1].rstrip("'")
    params = load_params(None, [given, *QUICK])
    assert params.data.label_shift_of("c") == pytest.approx((-4, 0, 0), abs=0.3)
    assert params.data.label_shift_of("a") is None
    assert check(params, data).warnings == ()
    summary = prepare(params, data, tmp_path / "slices").summary
    assert list(summary.params["data"]["label_shift_um"]) == ["c"]
    for options, least, most in (([], 0.0, 0.6), ([given], 0.8, 1.0)):
        scored = load_params(None, [*options, *QUICK, "evaluate.report=false", "evaluate.bootstrap=0"])
        result = evaluate(scored, data / "c", tmp_path / "true", tmp_path / "scores")
        assert least <= result.metrics["seg"] <= most
        assert result.metrics.get("label_shift_um", {}).keys() == ({"c"} if options else set())
    wrong = load_params(None, ["data.label_shift_um={d: [1, 0, 0]}", *QUICK])
    with pytest.raises(InputError, match=r"data\.label_shift_um names the embryo 'd'.*known: a, b, c"):
        prepare(wrong, data, tmp_path / "other")
    assert any("'d'" in error for error in check(wrong, data).errors)


def test_embryos_of_two_microscopes_train_together_at_one_scale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data")
    shutil.rmtree(data / "b")
    image, labels = draw_volume(np.random.default_rng(7), VoxelSize(1, 0.5, 0.5), (32, 96, 96), nuclei=10)
    for kind, write, array in (("images", write_image, image), ("labels", write_labels, labels)):
        (data / "b" / kind).mkdir(parents=True)
        write(data / "b" / kind / "t000.tif", array, VoxelSize(1, 0.5, 0.5))
    params = load_params(None, ["data.split={train: [a, b], validation: [c]}", *QUICK[1:]])
    (warning,) = check(params, data).warnings
    assert "0.5 to 1 um" in warning
    summary = prepare(params, data, tmp_path / "slices").summary
    assert "brought to pixels of 1 um" in capsys.readouterr().err
    assert summary.diameter_px == pytest.approx(12, rel=0.05)
    assert summary.training is not None
    assert summary.training["voxel_x_um"] == (0.5, 1.0)
    samples = load_samples(read_slices(tmp_path / "slices"), "train")
    shapes = {info.embryo: info.shape for info in samples.infos if info.view == "xy"}
    assert shapes == {"a": (1, 48, 48), "b": (1, 48, 48)}
    solid = load_params(
        None, ["data.split={train: [a, b], validation: [c]}", *QUICK[1:], "train.network=full3d"]
    )
    prepare(solid, data, tmp_path / "volumes")
    volumes = load_samples(read_slices(tmp_path / "volumes"), "train")
    assert {info.embryo: info.voxel_size.x for info in volumes.infos} == {"a": 1.0, "b": 0.5}


def test_a_single_stack_trains_in_blocks_that_share_no_nucleus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, labels = draw_volume(np.random.default_rng(1), VOXEL, (16, 40, 160), nuclei=40)
    for kind, write, array in (("images", write_image, image), ("labels", write_labels, labels)):
        (tmp_path / "data" / "only" / kind).mkdir(parents=True)
        write(tmp_path / "data" / "only" / kind / "t000.tif", array, VOXEL)
    blocks = ["data.split={by: space, validation_fraction: 0.25, test_fraction: 0.25}"]
    params = load_params(None, [*blocks, *QUICK[1:], "prepare.min_nuclei=0"])
    split = split_embryos(find_embryos(tmp_path / "data"), params.data.split)
    assert "NOT how the model does on another embryo" in capsys.readouterr().err
    parts = [read_labelled(split.of(part)[0], params.data) for part in PARTS]
    numbers = [set(np.unique(part.labels)) - {0} for part in parts]
    assert all(numbers)
    assert sum(map(len, numbers)) == len(set().union(*numbers))
    assert sum(part.labels.shape[2] for part in parts) <= 160 - 2 * 11
    frames = prepare(params, tmp_path / "data", tmp_path / "slices").summary.frames
    assert frames == dict.fromkeys(PARTS, 1)

    # what was trained on is not scored: predictions are wrong there and right in the test block
    wrong = labels.copy()
    wrong[:, :, :100] = 0
    write_labels(tmp_path / "pred" / "only" / "t000_masks.tif", wrong, VOXEL)
    (frame,) = split.test
    assert frame.label_path is not None
    quick = params.model_copy(update={"evaluate": EvaluateParams(bootstrap=0, report=False, baselines=())})
    only = {(frame.label_path, frame.label_time): frame.share}
    metrics = evaluate(quick, tmp_path / "data", tmp_path / "pred", tmp_path / "out", only=only).metrics
    assert metrics["n_true"] == metrics["n_pred"] == len(numbers[2])
    assert metrics["ap"]["0.50"] == 1
    assert metrics["warnings"] == [ONE_IMAGE]


def test_a_stack_too_small_for_blocks_is_refused(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    params = load_params(None, ["data.split.by=space", *QUICK[1:]])
    with pytest.raises(InputError, match="widest nucleus"):
        prepare(params, data, tmp_path / "slices")


@pytest.mark.parametrize("how", ["number", "mask"])
def test_what_nobody_looked_at_is_in_no_loss(tmp_path: Path, params: Params, how: str) -> None:
    data = make_data(tmp_path / "data")
    unknown = np.zeros((16, 48, 48), bool)
    unknown[:, :, :20] = True
    for path in sorted((data / "a" / "labels").glob("*.tif")):
        labels = tifffile.imread(path).astype(np.int32)
        if how == "number":
            labels[unknown] = -1
            tifffile.imwrite(path, labels)
        else:
            tifffile.imwrite(path.with_name(f"{path.stem}_known.tif"), (~unknown).astype(np.uint8))
    assert [frame.unknown_share for frame in check(params, data).frames[:3]] == [0.4167, 0.4167, 0]
    prepare(params, data, tmp_path / "slices")
    samples = load_samples(read_slices(tmp_path / "slices"), "train")
    plane = next(i for i, info in enumerate(samples.infos) if info.view == "xy")
    grid = CropGrid((1, 48, 48), diameter_px=12.0)
    batch = CropMaker(samples, NO_AUGMENTATION, grid, seed=0).make_batch(np.array([plane]), 0, 0)
    assert batch.weights is not None
    np.testing.assert_array_equal(batch.weights[0].numpy() == 0, unknown[0])
    assert batch.labels[0][unknown[0]].max() == 0 < batch.labels.max()
    assert not load_samples(read_slices(tmp_path / "slices"), "validation").infos[0].unknown


def test_voxel_sizes_in_the_order_x_y_z_are_said(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    params = load_params(None, [*QUICK, "data.voxel_size_um=[1,1,4]"])
    assert any("data.voxel_size_um=[4,1,1]" in warning for warning in check(params, data).warnings)
