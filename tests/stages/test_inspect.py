import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from nuclei3d import cli
from nuclei3d.config import Params, load_params
from nuclei3d.errors import InputError
from nuclei3d.images.frames import Frame
from nuclei3d.images.ome_zarr import create_zarr
from nuclei3d.images.tiff import write_image
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import ModelInfo, save_model
from nuclei3d.stages.inspect import inspect_images

VOXELS = VoxelSize(2.0, 0.5, 0.5)


def embryo(diameter_um: float, shape: tuple[int, int, int] = (20, 72, 80)) -> np.ndarray:
    """Four nuclei that fall off from their middle."""
    z, y, x = (
        ((np.arange(n) + 0.5) * edge).reshape([-1 if a == axis else 1 for a in range(3)])
        for axis, (n, edge) in enumerate(zip(shape, VOXELS.zyx, strict=True))
    )
    image = np.random.default_rng(0).normal(100, 4, shape)
    for centre in ((10, 10), (10, 28), (26, 10), (26, 28)):
        squared = (z - 20) ** 2 + (y - centre[0]) ** 2 + (x - centre[1]) ** 2
        image = np.maximum(image, 300 - 200 * squared / (diameter_um / 2) ** 2)
    return image.astype(np.uint16)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_image(tmp_path / "t0.ome.tif", np.pad(embryo(9), ((0, 0), (8, 0), (0, 0))), VOXELS)
    return tmp_path / "t0.ome.tif"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    info = ModelInfo(diameter_px=17, nucleus_diameter_um=16, min_volume_um3=200)
    save_model(tmp_path / "model", new_network(17, 0), info, "card")
    return tmp_path / "model"


def test_a_file_is_described_and_its_nuclei_measured(file, model, tmp_path, capsys):
    result = inspect_images(Params(), [file], model, tmp_path / "picture.png")
    (image,) = result.images
    assert (image.axes, image.dtype, image.frames) == ("Z=20, Y=80, X=80", "uint16", 1)
    assert (image.voxel_size_um, image.voxel_size_from) == ((2.0, 0.5, 0.5), "OME metadata")
    (frame,) = image.looked_at
    assert frame.diameter_um == pytest.approx(9, rel=0.2)
    assert frame.noise == pytest.approx(4, rel=0.1)
    assert frame.fill == pytest.approx(8 / 80)
    assert frame.nuclei_seen == 4
    assert result.model == {
        "nucleus_diameter_um": 16,
        "diameter_px": 17,
        "voxel_size_um": None,
        "min_volume_um3": 200,
    }
    assert image.advice[-1].endswith(f"then predict --diameter {frame.diameter_um:.3g}")
    assert image.advice[-1] in capsys.readouterr().err
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_gives_one_json_object(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nuclei3d", "inspect", str(file), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)
    assert told["images"][0]["voxel_size_um"] == [2.0, 0.5, 0.5]
    assert told["images"][0]["looked_at"][0]["nuclei_seen"] == 4


def test_what_is_passed_over_stands_in_the_json_too(file, tmp_path):
    (tmp_path / "t1.tif").symlink_to(tmp_path / "gone")
    (tmp_path / "t2.png").touch()
    tifffile.imwrite(tmp_path / "preview.tif", np.zeros((8, 9), np.uint8))
    for _ in range(2):
        done = CliRunner().invoke(cli.app, ["inspect", str(tmp_path), "--json"])
        assert json.loads(done.stdout)["warnings"] == [
            f"{tmp_path}: 1 passed over: t1.tif (links to what is not there)",
            f"{tmp_path}: 1 passed over: t2.png (no .tif, .tiff or .zarr)",
            f"{tmp_path}: 1 passed over: preview.tif (flat images)",
        ]
    done = CliRunner().invoke(cli.app, ["inspect", str(file), "--json"])
    assert json.loads(done.stdout)["warnings"] == []


def test_a_time_lapse_is_one_image_of_which_three_frames_are_looked_at(tmp_path):
    for time, diameter_um in enumerate((14, 12, 10, 9)):
        write_image(tmp_path / f"t{time}.tif", embryo(diameter_um), VOXELS)
    (image,) = inspect_images(Params(), [tmp_path]).images
    assert (image.path, image.frames) == (tmp_path, 4)
    assert [frame.name for frame in image.looked_at] == ["t0", "t2", "t3"]
    assert any("predict --diameter auto follows them" in line for line in image.advice)


def test_the_picture_shows_the_frame_with_most_nuclei_and_names_its_time_lapse(tmp_path, monkeypatch):
    write_image(tmp_path / "mouse" / "t0.tif", np.full((20, 72, 80), 100, np.uint16), VOXELS)
    write_image(tmp_path / "mouse" / "t1.tif", embryo(9), VOXELS)
    drawn = []
    monkeypatch.setattr("nuclei3d.stages.inspect._draw", lambda shown, path: drawn.extend(shown))
    inspect_images(Params(), [tmp_path / "mouse"], None, tmp_path / "picture.png")
    (plane,) = drawn
    assert plane.name == "mouse t1"
    assert plane.radius == pytest.approx(4.5 / 0.5, rel=0.2)


def test_what_a_file_leaves_open_is_advised_and_not_refused(tmp_path):
    image = np.stack([embryo(9), embryo(9)], axis=1)
    tifffile.imwrite(tmp_path / "two.tif", image, imagej=True, metadata={"axes": "ZCYX"})
    (found,) = inspect_images(Params(), [tmp_path / "two.tif"]).images
    assert found.voxel_size_um is None
    assert found.looked_at[0].diameter_um is None
    assert "--set data.channel=NUMBER" in found.advice[0]
    assert "--set data.voxel_size_um=[Z,Y,X]" in found.advice[1]
    given = load_params(None, ["data.voxel_size_um=[2.0,0.5,0.5]", "data.channel=1"])
    (found,) = inspect_images(given, [tmp_path / "two.tif"]).images
    assert (found.voxel_size_from, found.channel) == ("data.voxel_size_um", "1")
    assert found.looked_at[0].diameter_um == pytest.approx(9, rel=0.2)


def test_of_several_images_the_chosen_one_is_looked_at(tmp_path):
    with tifffile.TiffWriter(tmp_path / "two.ome.tif", ome=True) as file:
        for diameter_um, width in ((14, 0.5), (9, 1.0)):
            sizes = {"PhysicalSizeZ": 4 * width, "PhysicalSizeY": width, "PhysicalSizeX": width}
            file.write(embryo(diameter_um), metadata={"axes": "ZYX", **sizes})
    with pytest.raises(InputError, match=r"data\.image"):
        inspect_images(Params(), [tmp_path / "two.ome.tif"])
    (found,) = inspect_images(load_params(None, ["data.image=1"]), [tmp_path / "two.ome.tif"]).images
    assert found.voxel_size_um == (4.0, 1.0, 1.0)
    assert found.looked_at[0].diameter_um == pytest.approx(18, rel=0.2)


def test_an_image_without_nuclei_is_said_to_have_none(tmp_path):
    noise = np.random.default_rng(0).normal(100, 5, (20, 72, 80)).astype(np.uint16)
    write_image(tmp_path / "noise.tif", noise, VOXELS)
    (image,) = inspect_images(Params(), [tmp_path / "noise.tif"]).images
    assert image.looked_at[0].diameter_um is None
    assert "hardly anything rises above the noise" in image.advice[0]


def test_labels_in_the_place_of_an_image_are_asked_about(tmp_path):
    write_image(tmp_path / "t0.tif", (embryo(9) > 150).astype(np.uint16) * 3, VOXELS)
    (image,) = inspect_images(Params(), [tmp_path / "t0.tif"]).images
    assert image.advice[0] == "t0: no noise at all; is it an image, or are these labels?"


def test_of_a_large_file_few_voxels_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("nuclei3d.intensity._MAX_SAMPLES", 200_000)
    monkeypatch.setattr("nuclei3d.intensity._FEWEST_BOXES", 2)
    monkeypatch.setattr("nuclei3d.diameter._BLOCK_VOXELS", 100_000)
    with_nuclei = embryo(9, (20, 72, 400))
    array = create_zarr(tmp_path / "large.zarr", (200, 72, 400), np.uint16, VOXELS, (10, 72, 80))
    for z in range(0, 200, 20):
        array[z : z + 20] = with_nuclei
    read = []
    real = Frame.read_block

    def count(self, box):
        read.append(real(self, box))
        return read[-1]

    monkeypatch.setattr(Frame, "read_block", count)
    (image,) = inspect_images(Params(), [tmp_path / "large.zarr"]).images
    assert image.voxel_size_from == "OME-Zarr metadata"
    assert image.looked_at[0].diameter_um == pytest.approx(9, rel=0.2)
    # two boxes of two chunks and three blocks
    assert sum(block.size for block in read) <= 4 * 10 * 72 * 80 + 3 * 100_000


@pytest.mark.parametrize("asked_for", ["auto", ""])
def test_auto_predicts_with_the_diameter_of_the_frame(asked_for, model, tmp_path, monkeypatch):
    """So does a model that was trained on embryos with unlike nuclei, if no diameter is given."""
    from nuclei3d.stages import predict as stage

    asked = []

    def remember(opened, out, advance):
        asked.append(opened.job.predictor.segmenter.settings)
        for name in ("masks", "table"):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).touch()
        found = stage.PredictedFrame(
            opened.job.frame.name, out / "masks", out / "table", 0, 0.0, done_before=False
        )
        return lambda: found

    monkeypatch.setattr(stage, "_predict_frame", remember)
    for time, diameter_um in enumerate((14, 14, 9, 9, 9)):
        write_image(tmp_path / "movie" / f"t{time}.tif", embryo(diameter_um), VOXELS)
    if not asked_for:
        info = json.loads((model / "model.json").read_text())
        (model / "model.json").write_text(json.dumps(info | {"embryo_diameters_um": [8, 16]}))
    params = load_params(None, [f"predict.diameter_um={asked_for or 'null'}", "predict.report=false"])
    result = stage.predict(params, [tmp_path / "movie"], str(model), tmp_path / "out")
    diameters = [frame.diameter_um for frame in result.frames]
    assert diameters == [settings.nucleus_diameter_um for settings in asked]
    assert diameters == sorted(diameters, reverse=True)
    assert (diameters[0], diameters[-1]) == (pytest.approx(14, rel=0.2), pytest.approx(9, rel=0.2))
    for settings in asked:
        cubed = (settings.nucleus_diameter_um / 16) ** 3
        assert settings.masks.min_volume_um3 == pytest.approx(200 * cubed)


def test_auto_refuses_an_image_in_which_nothing_stands_out(tmp_path, model):
    from nuclei3d.stages.predict import predict

    noise = np.random.default_rng(0).normal(100, 5, (20, 72, 80)).astype(np.uint16)
    write_image(tmp_path / "noise.tif", noise, VOXELS)
    params = load_params(None, ["predict.diameter_um=auto"])
    with pytest.raises(InputError, match="shows nothing like nuclei; give their diameter: --diameter UM"):
        predict(params, [tmp_path / "noise.tif"], str(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
