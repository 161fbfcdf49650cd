"""prepare on a small data set made here, and against what stock Cellpose reads."""

import csv
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy.ndimage import gaussian_filter

from nuclei3d.config import Params, load_params
from nuclei3d.errors import InputError
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.calibrate import read_validation_volumes
from nuclei3d.stages.export import export
from nuclei3d.stages.model_card import describe_model
from nuclei3d.stages.prepare import prepare
from nuclei3d.stages.train import open_training
from nuclei3d.stages.training_data import load_samples, read_slices
from nuclei3d.training.examples import validation_batches
from nuclei3d.training.slicing import nucleus_volumes_um3, sphere_diameter_um

VOXEL_SIZE = VoxelSize(2.0, 0.5, 0.5)
WITH_FILES = "prepare.cellpose_files=true"


def write_embryo(folder: Path, seed: int, frames: int = 1, times: int = 1) -> None:
    """Write frames with eight balls of 8 um on a grid, at a contrast that the seed decides.

    Balls and frame are so many `times` as large.
    """
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(np.arange(12), np.arange(64), np.arange(64), indexing="ij")
    for frame in range(frames):
        labels = np.zeros((12, 64, 64), np.uint16)
        corners = [(zc, yc, xc) for zc in (3, 9) for yc in (16, 48) for xc in (16, 48)]
        for label, (zc, yc, xc) in enumerate(corners, start=1):
            labels[((z - zc) * 2.0) ** 2 + ((y - yc) * 0.5) ** 2 + ((x - xc) * 0.5) ** 2 < 16] = label
        labels = labels.repeat(times, 0).repeat(times, 1).repeat(times, 2)
        brightness = np.concatenate([[0], rng.uniform(200, 900, 8)])[labels]
        image = rng.poisson(100 + gaussian_filter(brightness, (0.5, 1, 1))).astype(np.uint16)
        for kind, write, array in (("images", write_image, image), ("labels", write_labels, labels)):
            path = folder / kind / f"t{frame:03d}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, array, VOXEL_SIZE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "data"
    for seed, name in enumerate(("a", "b", "c")):
        write_embryo(folder / name, seed, frames=2 if name == "a" else 1)
    return folder


def params_of(*overrides: str) -> Params:
    split = "data.split={by: embryo, train: [a], validation: [b], test: [c]}"
    return load_params(None, [split, "prepare.downsample_xy=1", "prepare.workers=1", *overrides])


@pytest.fixture(scope="module")
def slices(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("slices") / "slices"
    prepare(params_of(), data, out)
    return out


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_repeating_it_with_two_workers_gives_the_same_bytes(slices: Path, data: Path, tmp_path: Path) -> None:
    prepare(params_of("prepare.workers=2"), data, tmp_path / "slices")
    assert digests(tmp_path / "slices") == digests(slices)


def test_the_manifest_lists_what_was_written(slices: Path) -> None:
    with (slices / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    files = {str(path.relative_to(slices)) for path in slices.rglob("*.bin")}
    assert {f"{row['file']}.bin" for row in rows} == files
    described = read_slices(slices)
    for part in ("train", "validation", "test"):
        planes = load_samples(described, part)
        of_part = [row for row in rows if row["part"] == part]
        for plane, row in enumerate(of_part):
            labels = planes.read(plane).labels
            assert len(np.unique(labels)) - 1 == int(row["nuclei"]) >= 3
            assert labels.shape == (1, int(row["height"]), int(row["width"]))


def test_a_plane_takes_six_bytes_a_pixel(slices: Path) -> None:
    for infos in read_slices(slices).infos.values():
        for info in infos:
            assert (slices / f"{info.file}.bin").stat().st_size == 40 + 6 * math.prod(info.shape)


def test_nuclei_are_measured_in_3d(slices: Path) -> None:
    summary = read_slices(slices).summary
    assert summary.nucleus_diameter_um == pytest.approx(8.0, rel=0.05)
    assert summary.diameter_px == pytest.approx(16.0, rel=0.05)
    assert len(summary.contrast_quintiles) == 4
    assert summary.frames == {"train": 2, "validation": 1, "test": 1}


def test_labels_below_a_volume_are_left_out_and_counted(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nuclei"):
        prepare(params_of("prepare.min_volume_um3=1e+6"), data, tmp_path / "none")
    result = prepare(params_of("prepare.min_volume_um3=10"), data, tmp_path / "all")
    assert result.summary.labels_left_out == 0


@pytest.fixture(scope="module")
def with_files(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("slices") / "slices"
    prepare(params_of(WITH_FILES), data, out)
    return out


def test_cellpose_finds_images_labels_and_flows(with_files: Path) -> None:
    from cellpose import io

    images, labels, names, *_ = io.load_train_test_data(
        str(with_files / "train"), image_filter="_img", mask_filter="_lbl"
    )
    assert len(images) == len(labels) == len(names) == len(read_slices(with_files).infos["train"])
    # flows were found: four planes, not labels alone
    assert all(label.shape == (4, *image.shape) for image, label in zip(images, labels, strict=True))
    np.testing.assert_array_equal(labels[0][0] > 0, labels[0][1] > 0)


def test_the_files_for_cellpose_hold_what_is_trained_on_here(with_files: Path) -> None:
    described = read_slices(with_files)
    for part in described.infos:
        planes = load_samples(described, part)
        for plane, info in enumerate(planes.infos):
            image, labels, targets = (
                tifffile.imread(with_files / f"{info.file}_{kind}.tif")
                for kind in ("img", "lbl", "img_flows")
            )
            arrays = planes.read(plane)
            assert (image.dtype, labels.dtype, targets.dtype) == (np.uint16, np.uint16, np.float32)
            np.testing.assert_array_equal(arrays.pixels[0], image)
            np.testing.assert_array_equal(arrays.labels[0], labels)
            normalised = (image - info.norm_low) / (info.norm_high - info.norm_low)
            np.testing.assert_allclose(planes.normalised(plane)[0], normalised, atol=1e-5)
            np.testing.assert_array_equal(targets[:2], [labels, labels > 0])
            np.testing.assert_array_equal(arrays.flows[0], np.rint(127 * np.moveaxis(targets[2:], 0, -1)))


def test_exported_files_are_those_that_prepare_writes(slices: Path, with_files: Path, tmp_path: Path) -> None:
    (written,) = export(load_params(None), tmp_path / "out", slices=slices).files.values()
    exported = digests(tmp_path / "out" / "cellpose-training")
    assert {str(path.relative_to(tmp_path / "out" / "cellpose-training")) for path in written} == {
        name for name in exported if name.endswith("_img.tif")
    }
    known = {name: digest for name, digest in digests(with_files).items() if name.endswith(".tif")}
    assert exported == known
    # the rest of the data set is the same with and without
    without = {name: md5 for name, md5 in digests(slices).items() if name != ".written.json"}
    assert without.items() == {
        item for item in digests(with_files).items() if not item[0].endswith((".tif", ".written.json"))
    }


def test_images_of_floats_are_exported_to_the_step_of_their_storage(data, tmp_path, capsys):
    for path in data.rglob("*.tif"):
        volume = tifffile.imread(path)
        target = tmp_path / "data" / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_image(target, volume / np.float32(7) if path.parent.name == "images" else volume, VOXEL_SIZE)
    prepare(params_of(WITH_FILES), tmp_path / "data", tmp_path / "slices")
    (written,) = export(load_params(None), tmp_path / "out", slices=tmp_path / "slices").files.values()
    assert "come rounded" in capsys.readouterr().err
    for path in written:
        ours = tifffile.imread(path)
        exact = tifffile.imread(
            tmp_path / "slices" / path.relative_to(tmp_path / "out" / "cellpose-training")
        )
        assert ours.dtype == exact.dtype == np.float32
        np.testing.assert_allclose(ours, exact, atol=0.51 * np.ptp(exact) / 65535)


def test_volumes_are_no_files_for_cellpose(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cellpose_files is for planes"):
        prepare(params_of("train.network=full3d", WITH_FILES), data, tmp_path / "slices")
    prepare(params_of("train.network=full3d"), data, tmp_path / "slices")
    with pytest.raises(InputError, match="planes only"):
        export(load_params(None), tmp_path / "out", slices=tmp_path / "slices")
    assert not (tmp_path / "out").exists()


def test_no_embryo_is_on_both_sides(slices: Path) -> None:
    embryos = json.loads((slices / "summary.json").read_text())["embryos"]
    assert embryos == {"train": ["a"], "validation": ["b"], "test": ["c"]}


def test_a_folder_of_something_else_is_not_replaced(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="precious"):
        prepare(params_of(), data, out)
    assert (out / "thesis.txt").read_text() == "mine"


def test_too_few_nuclei_everywhere_says_what_to_change(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="min_nuclei"):
        prepare(params_of("prepare.min_nuclei=99"), data, tmp_path / "slices")
    assert not (tmp_path / "slices").exists()


def test_real_embryos_give_planes_with_outlines(bbbc050: Path, tmp_path: Path) -> None:
    small = tmp_path / "data"
    for name in ("Emb01", "Emb10", "Emb11"):
        for kind in ("images", "labels"):
            (small / name / kind).mkdir(parents=True)
            (small / name / kind / "t501.tif").symlink_to(bbbc050 / name / kind / "t501.tif")
    split = "data.split={by: embryo, train: [Emb01], validation: [Emb10], test: [Emb11]}"
    result = prepare(params_of(split, "prepare.step_xy=4"), small, tmp_path / "slices")
    assert 8 < result.summary.nucleus_diameter_um < 20
    assert (tmp_path / "slices" / "slices.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nuclei of 8 um in a and c, of 16 um in b and d, in voxels of one size."""
    folder = tmp_path_factory.mktemp("raw") / "data"
    for seed, name in enumerate("abcd"):
        write_embryo(folder / name, seed, times=1 + seed % 2)
    return folder


UNLIKE = "data.split={by: embryo, train: [a, b], validation: [c, d], test: []}"


@pytest.mark.parametrize("network", ["views2d", "full3d"])
def test_nuclei_of_unlike_size_are_alike_in_the_crops(network: str, unlike: Path, tmp_path: Path) -> None:
    params = params_of(UNLIKE, f"train.network={network}")
    summary = prepare(params, unlike, tmp_path / "slices").summary
    assert summary.embryo_diameters_um is not None
    assert summary.training is not None
    assert list(summary.embryo_diameters_um.values()) == pytest.approx([8, 16, 8, 16], rel=0.05)
    assert summary.nucleus_diameter_um == pytest.approx(12, rel=0.05)
    assert summary.training["diameter_um"] == pytest.approx((8, 16), rel=0.05)
    described = read_slices(tmp_path / "slices")
    grid = open_training(params, described).examples.grid
    for part in ("train", "validation"):
        samples = load_samples(described, part)
        widest: dict[str, float] = {}
        for batch in validation_batches(samples, len(samples), grid, 1):
            for plane in batch.labels.reshape(-1, *batch.labels.shape[-2:]):
                area = np.bincount(plane.ravel(), minlength=2)[1:].max()
                embryo = samples.infos[batch.samples[0]].embryo
                widest[embryo] = max(widest.get(embryo, 0.0), math.sqrt(4 / math.pi * area))
        assert len(widest) == 2
        assert list(widest.values()) == pytest.approx([params.train.diameter_px] * 2, rel=0.08)


def test_without_a_ratio_or_below_it_one_diameter_is_for_all(unlike: Path, tmp_path: Path) -> None:
    for ratio in ("null", "2.1"):
        out = tmp_path / ratio
        summary = prepare(params_of(UNLIKE, f"prepare.max_size_ratio={ratio}"), unlike, out).summary
        assert summary.embryo_diameters_um is None
        assert {info.voxel_size for info in read_slices(out).infos["train"]} == {VoxelSize(0.5, 0.5, 0.5)}


def test_validation_volumes_are_read_at_the_scale_of_the_training(unlike: Path, tmp_path: Path) -> None:
    params = params_of(UNLIKE, "calibrate.volumes=2", "predict.diameter_um=auto")
    prepare(params, unlike, tmp_path / "slices")
    described = read_slices(tmp_path / "slices")
    small, large = read_validation_volumes(params, None, described).calibrating
    common_um = described.summary.nucleus_diameter_um
    for volume in (small, large):
        volumes = nucleus_volumes_um3(volume.labels, volume.voxel_size).values()
        assert np.median([sphere_diameter_um(v) for v in volumes]) == pytest.approx(common_um, rel=1e-3)
    found = describe_model(params, described, None, None).embryo_diameters_um
    assert found == pytest.approx((8, 16), rel=0.05)
    given = params_of(UNLIKE, "calibrate.volumes=2", "predict.diameter_um=10")
    for volume in read_validation_volumes(given, None, described).calibrating:
        assert volume.voxel_size == VOXEL_SIZE
