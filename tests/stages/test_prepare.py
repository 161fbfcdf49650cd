"""prepare on a small data set made here, and against what stock Cellpose reads."""

import csv
import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy.ndimage import gaussian_filter

from nuclei3d.config import Params, load_params
from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.images.writing import write_image, write_labels
from nuclei3d.stages.prepare import prepare
from nuclei3d.stages.training_data import load_planes, read_slices

VOXEL_SIZE = VoxelSize(2.0, 0.5, 0.5)


def write_embryo(folder: Path, seed: int, frames: int = 1) -> None:
    """Write frames with eight balls of 8 um on a grid, at a contrast that the seed decides."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(np.arange(12), np.arange(64), np.arange(64), indexing="ij")
    for frame in range(frames):
        labels = np.zeros((12, 64, 64), np.uint16)
        corners = [(zc, yc, xc) for zc in (3, 9) for yc in (16, 48) for xc in (16, 48)]
        for label, (zc, yc, xc) in enumerate(corners, start=1):
            labels[((z - zc) * 2.0) ** 2 + ((y - yc) * 0.5) ** 2 + ((x - xc) * 0.5) ** 2 < 16] = label
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


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(
        None,
        [
            "data.split={by: embryo, train: [a], validation: [b], test: [c]}",
            "prepare.downsample_xy=1",
            "prepare.workers=1",
        ],
    )


@pytest.fixture(scope="module")
def slices(data: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("slices") / "slices"
    prepare(params, data, out)
    return out


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_repeating_it_with_two_workers_gives_the_same_bytes(
    slices: Path, data: Path, params: Params, tmp_path: Path
) -> None:
    two = load_params(None, ["prepare.workers=2"]).prepare.workers
    again = params.model_copy(update={"prepare": params.prepare.model_copy(update={"workers": two})})
    prepare(again, data, tmp_path / "slices")
    assert digests(tmp_path / "slices") == digests(slices)


def test_the_manifest_lists_what_was_written(slices: Path) -> None:
    with (slices / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {
        str(path.relative_to(slices)) for path in slices.rglob("*_img.tif")
    }
    for row in rows:
        labels = tifffile.imread(slices / row["file"].replace("_img.tif", "_lbl.tif"))
        assert len(np.unique(labels)) - 1 == int(row["nuclei"]) >= 3
        assert labels.shape == (int(row["height"]), int(row["width"]))


def test_nuclei_are_measured_in_3d(slices: Path) -> None:
    summary = json.loads((slices / "summary.json").read_text())
    assert summary["nucleus_diameter_um"] == pytest.approx(8.0, rel=0.05)
    assert summary["diameter_px"] == pytest.approx(16.0, rel=0.05)
    assert len(summary["contrast_quintiles"]) == 4
    assert summary["frames"] == {"train": 2, "validation": 1, "test": 1}


def test_labels_below_a_volume_are_left_out_and_counted(data: Path, params: Params, tmp_path: Path) -> None:
    chosen = params.prepare.model_copy(update={"min_volume_um3": 1e6})
    with pytest.raises(InputError, match="nuclei"):
        prepare(params.model_copy(update={"prepare": chosen}), data, tmp_path / "none")
    chosen = params.prepare.model_copy(update={"min_volume_um3": 10.0})
    result = prepare(params.model_copy(update={"prepare": chosen}), data, tmp_path / "all")
    assert result.summary["labels_left_out"] == 0


def test_cellpose_finds_images_labels_and_flows(slices: Path) -> None:
    from cellpose import io

    images, labels, names, *_ = io.load_train_test_data(
        str(slices / "train"), image_filter="_img", mask_filter="_lbl"
    )
    assert len(images) == len(labels) == len(names) > 0
    # flows were found: four planes, not labels alone
    assert all(label.shape == (4, *image.shape) for image, label in zip(images, labels, strict=True))
    np.testing.assert_array_equal(labels[0][0] > 0, labels[0][1] > 0)


def test_the_packed_copy_holds_what_the_files_hold(slices: Path, tmp_path: Path) -> None:
    described = read_slices(slices)
    bare = tmp_path / "bare"
    shutil.copytree(slices, bare, ignore=shutil.ignore_patterns("packed"))
    assert sorted(path.name for path in (slices / "packed").iterdir()) == [
        "index.json",
        "train.bin",
        "validation.bin",
    ]
    for part, infos in described.infos.items():
        packed, unpacked = load_planes(described, part), load_planes(read_slices(bare), part)
        if part != "test":
            size = (slices / "packed" / f"{part}.bin").stat().st_size
            assert size == 6 * sum(math.prod(info.shape) for info in infos)
        for plane in range(len(infos)):
            np.testing.assert_array_equal(packed.normalised(plane), unpacked.normalised(plane))
            for one, other in zip(packed.read(plane), unpacked.read(plane), strict=True):
                np.testing.assert_array_equal(one, other)


def test_no_embryo_is_on_both_sides(slices: Path) -> None:
    embryos = json.loads((slices / "summary.json").read_text())["embryos"]
    assert embryos == {"train": ["a"], "validation": ["b"], "test": ["c"]}


def test_a_folder_of_something_else_is_not_replaced(data: Path, params: Params, tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="precious"):
        prepare(params, data, out)
    assert (out / "thesis.txt").read_text() == "mine"


def test_too_few_nuclei_everywhere_says_what_to_change(data: Path, params: Params, tmp_path: Path) -> None:
    greedy = params.model_copy(update={"prepare": params.prepare.model_copy(update={"min_nuclei": 99})})
    with pytest.raises(InputError, match="min_nuclei"):
        prepare(greedy, data, tmp_path / "slices")
    assert not (tmp_path / "slices").exists()


def test_real_embryos_give_planes_with_outlines(bbbc050: Path, tmp_path: Path) -> None:
    small = tmp_path / "data"
    for name in ("Emb01", "Emb10", "Emb11"):
        for kind in ("images", "labels"):
            (small / name / kind).mkdir(parents=True)
            (small / name / kind / "t501.tif").symlink_to(bbbc050 / name / kind / "t501.tif")
    params = load_params(
        None,
        [
            "data.split={by: embryo, train: [Emb01], validation: [Emb10], test: [Emb11]}",
            "prepare.step_xy=4",
            "prepare.downsample_xy=1",
            "prepare.workers=1",
        ],
    )
    result = prepare(params, small, tmp_path / "slices")
    assert 8 < result.summary["nucleus_diameter_um"] < 20
    assert (tmp_path / "slices" / "slices.png").stat().st_size > 10_000
