"""What is odd about a data set is told before any work, and prepare says or refuses it."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from nuclei3d.cli import app
from nuclei3d.config import Params, load_params
from nuclei3d.errors import InputError
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.check import check
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
    assert "warnings" not in summary
    assert summary["training"]["voxel_x_um"] == [1.0, 1.0]
    assert summary["training"]["anisotropy"] == [2.0, 2.0]
    low, high = summary["training"]["diameter_um"]
    assert low <= summary["nucleus_diameter_um"] <= high
    assert summary["training"]["range_over_noise"][0] == pytest.approx(
        result.frames[0].range_over_noise, abs=0.01
    )


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
    assert prepare(params, data, tmp_path / "slices").as_json()["warnings"] == [warning]
    assert capsys.readouterr().err.count("one label") == 1
    with pytest.raises(InputError, match=r"t000\.tif: one label"):
        prepare(params, data, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


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
