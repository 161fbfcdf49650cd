"""What other programs make of an export: Cellpose, its GUI, bioimage.io's own test, and ImageJ's regions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml

from nuclei3d.config import load_params
from nuclei3d.errors import InputError
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import ModelInfo, save_model
from nuclei3d.networks.planning import plan_architecture, plan_patch
from nuclei3d.networks.unet3d import VolumeSpec, new_volume_network
from nuclei3d.stages.export import ExportResult, export

SIZE = VoxelSize(2.0, 0.5, 0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "my_nuclei"
    info = ModelInfo(name="my_nuclei", diameter_px=12.0, nucleus_diameter_um=9.0)
    save_model(folder, new_network(12.0, seed=3), info, "# my_nuclei\n\nA card.", compact=True)
    return folder


def narrow_model(folder: Path) -> Path:
    save_model(folder, new_network(12.0, 3, 16), ModelInfo(name="thin", diameter_px=12.0, width=16), "")
    return folder


def volume_model(folder: Path, anisotropy: float, style: bool = False) -> Path:
    architecture = plan_architecture(anisotropy, "small", style=style)
    spec = VolumeSpec(architecture, anisotropy, plan_patch(architecture, 12.0, anisotropy, 2.0))
    info = ModelInfo(name="solid", kind="full3d", full3d=spec, diameter_px=12.0, nucleus_diameter_um=9.0)
    save_model(folder, new_volume_network(spec, seed=3), info, "# solid\n\nA card.")
    return folder


@pytest.fixture
def embryo(tmp_path: Path) -> Path:
    """Two frames with masks as predict writes them; one label number is missing."""
    rng = np.random.default_rng(0)
    for name in ("t000", "t001"):
        labels = np.zeros((6, 40, 44), np.uint16)
        labels[1:5, 4:14, 4:14] = 1
        labels[2:6, 20:33, 14:30] = 3
        write_labels(tmp_path / "masks" / f"{name}_masks.ome.tif", labels, SIZE)
        image = (100 + 900 * (labels > 0) + rng.integers(0, 50, labels.shape)).astype(np.uint16)
        write_image(tmp_path / "images" / f"{name}.tif", image, SIZE)
    return tmp_path


def run(folder: Path, **options: Any) -> ExportResult:
    return export(load_params(None), folder / "exports", **options)


@pytest.mark.slow  # starts Cellpose twice
def test_cellpose_adds_the_model_and_predicts_with_it(model: Path, embryo: Path) -> None:
    """The real command line, in a home of its own, first `--add_model`, then the model by its name."""
    result = run(embryo, model=str(model))
    assert set(result.files) == {"cellpose"}
    (weights,) = result.files["cellpose"]
    assert weights.name == "my_nuclei"
    assert "--add_model my_nuclei" in (weights.parent / "HOW_TO.md").read_text()
    known = embryo / "home" / "models"
    known.mkdir(parents=True)
    environment = os.environ | {"HOME": str(embryo / "home"), "CELLPOSE_LOCAL_MODELS_PATH": str(known)}

    def cellpose(*arguments: str) -> str:
        command = [sys.executable, "-m", "cellpose", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    cellpose("--add_model", str(weights))
    assert (known / "my_nuclei").is_file()
    plane = embryo / "planes" / "plane.tif"
    plane.parent.mkdir()
    import tifffile

    tifffile.imwrite(plane, tifffile.imread(embryo / "images" / "t000.tif")[3])
    said = cellpose(
        "--dir", str(plane.parent), "--pretrained_model", "my_nuclei", "--diameter", "12", "--verbose"
    )
    assert str(known / "my_nuclei") in said
    assert (plane.parent / "plane_seg.npy").is_file()


def test_cellpose_loads_the_very_weights(model: Path, tmp_path: Path) -> None:
    from cellpose.models import CellposeModel

    (weights,) = run(tmp_path, model=str(model)).files["cellpose"]
    loaded = CellposeModel(gpu=False, pretrained_model=str(weights))
    assert loaded.diam_mean == pytest.approx(12.0)
    expected = torch.load(model / "my_nuclei", weights_only=True)
    for name, value in loaded.net.state_dict().items():
        torch.testing.assert_close(value, expected[name].to(value.dtype), rtol=0, atol=0)


@pytest.fixture
def gui(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Cellpose's own code that opens a `_seg.npy`; the window and its widgets alone are stand-ins."""
    from cellpose.gui import io

    window = MagicMock()
    window.restore = None
    window.load_3D = True
    # of a restored image, which there is none
    del window.stack_filtered
    window.colormap = np.random.default_rng(0).integers(0, 255, (1000, 4))
    window.autoloadMasks.isChecked.return_value = False
    return SimpleNamespace(io=io, window=window)


def test_cellposes_gui_opens_images_with_their_masks(embryo: Path, gui: SimpleNamespace) -> None:
    result = run(embryo, masks=embryo / "masks", images=embryo / "images", formats=["seg"])
    assert [path.name for path in result.files["seg"]] == ["t000_seg.npy", "t001_seg.npy"]
    # as if it had been copied to another machine
    moved = embryo / "elsewhere"
    (embryo / "exports" / "seg").rename(moved)
    window = gui.window
    window.NZ = 6
    gui.io._load_image(window, str(moved / "t001.tif"), load_3D=True)
    assert window.loaded
    assert window.filename == str(moved / "t001.tif")
    assert window.ncells == 2
    assert window.NZ == 6
    assert window.cellpix.shape == window.outpix.shape == window.stack.shape[:3] == (6, 40, 44)
    assert window.cellpix.dtype == np.uint16
    np.testing.assert_array_equal(np.unique(window.cellpix), [0, 1, 2])
    assert window.cellpix[3, 25, 20] == 2
    # the outline is that of every plane: the middle of a nucleus is none
    assert window.outpix[3, 20, 20] == 2
    assert window.outpix[3, 26, 22] == 0
    assert len(window.ismanual) == len(window.zdraw) == 2
    window.Diameter.setText.assert_called()


def test_the_npy_alone_finds_its_image(embryo: Path, gui: SimpleNamespace) -> None:
    result = run(embryo, masks=embryo / "masks", images=embryo / "images", formats=["seg"])
    first = result.files["seg"][0]
    gui.io._load_seg(gui.window, str(first), load_3D=True)
    assert gui.window.filename == str(first.parent / "t000.tif")
    assert gui.window.ncells == 2


def test_regions_for_imagej_lie_in_their_planes(embryo: Path) -> None:
    from roifile import roiread

    result = run(embryo, masks=embryo / "masks")
    assert set(result.files) == {"rois"}
    rois = roiread(result.files["rois"][0])
    # label 1 lies in planes 2 to 5, label 3 in planes 3 to 6, counted from 1
    assert [(roi.name, roi.position) for roi in rois if roi.name.startswith("0001")] == [
        (f"0001-{z:04d}", z) for z in (2, 3, 4, 5)
    ]
    assert len(rois) == 8
    polygon = rois[0].coordinates()
    # the pixels 4 to 13 cover 4 to 14; the outline runs half way between pixels in and out
    np.testing.assert_array_equal([polygon.min(), polygon.max()], [4.0, 14.0])


@pytest.mark.slow  # bioimageio.core imports torch and runs both kinds of weights at several sizes
@pytest.mark.parametrize("kind", ["views2d", "narrow", "full3d"])
def test_bioimageio_accepts_the_package(model: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bioimageio.core", reason="pip install 'nuclei3d[export]'")
    folder = {"views2d": model, "narrow": tmp_path / "thin", "full3d": tmp_path / "solid"}[kind]
    if kind == "narrow":
        narrow_model(folder)
    elif kind == "full3d":
        volume_model(folder, 11.5)
    (package,) = run(tmp_path, model=str(folder), formats=["bioimageio"]).files["bioimageio"]
    assert package.name == f"{folder.name}.zip"
    if kind == "views2d":
        names = zipfile.ZipFile(package).namelist()
        assert {"rdf.yaml", "model.json", "README.md", "plane_network.py", "weights.pt"} <= set(names)
    program, report = Path(sys.executable).with_name("bioimageio"), tmp_path / "report.json"
    done = subprocess.run(
        [str(program), "test", str(package), "--summary", str(report)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"BIOIMAGEIO_CACHE_PATH": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert '"status":"passed"' in report.read_text().replace('": "', '":"')[:2000]


def test_a_package_of_a_3d_network_runs_without_nuclei3d(tmp_path: Path) -> None:
    """What the package names is loaded by hand where this package cannot be imported, and gives the same."""
    pytest.importorskip("bioimageio.spec", reason="pip install 'nuclei3d[export]'")
    folder = volume_model(tmp_path / "solid", 5.75, style=True)
    (package,) = run(tmp_path, model=str(folder), formats=["bioimageio"]).files["bioimageio"]
    parts = tmp_path / "parts"
    zipfile.ZipFile(package).extractall(parts)
    described = yaml.safe_load((parts / "rdf.yaml").read_text())
    (seen,), (made,) = described["inputs"], described["outputs"]
    assert [axis.get("id", axis["type"]) for axis in seen["axes"]] == ["batch", "channel", "z", "y", "x"]
    assert [(axis["size"]["step"], axis["scale"], axis["unit"]) for axis in seen["axes"][2:]] == [
        (step, pytest.approx(scale), "micrometer") for step, scale in ((2, 4.3125), (8, 0.75), (8, 0.75))
    ]
    assert made["axes"][1]["channel_names"] == ["flow_z", "flow_y", "flow_x", "logit"]
    text = (parts / "README.md").read_text()
    assert "5.75 times as far apart in z" in text
    assert "4.31 x 0.75 x 0.75 um" in text
    made_by = described["weights"]["pytorch_state_dict"]["architecture"]
    module = Path(made_by["source"]).stem
    (parts / "use.py").write_text(
        "import sys; sys.modules['nuclei3d'] = sys.modules['cellpose'] = None\n"
        f"import json, numpy as np, torch, {module}\n"
        f"network = {module}.{made_by['callable']}(**json.load(open('arguments.json')))\n"
        "network.load_state_dict(torch.load('weights.pt', weights_only=True)); network.eval()\n"
        "scripted = torch.jit.load('weights_torchscript.pt')\n"
        "image = torch.from_numpy(np.load('input.npy'))\n"
        "wider = torch.nn.functional.pad(image, (0, 8, 0, 16, 0, 4))\n"
        "with torch.no_grad():\n"
        "    np.testing.assert_allclose(network(image), np.load('output.npy'), rtol=1e-3, atol=1e-4)\n"
        "    np.testing.assert_allclose(network(wider), scripted(wider), rtol=1e-3, atol=1e-4)\n"
    )
    (parts / "arguments.json").write_text(json.dumps(made_by["kwargs"]))
    command = [sys.executable, "use.py"]
    done = subprocess.run(command, cwd=parts, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to export"),
        ({"model": "absent", "formats": ["celpose"]}, "unknown format 'celpose'; known: cellpose"),
        ({"model": "absent"}, "no model at absent"),
        ({"model": "absent", "formats": ["rois"]}, "give --masks"),
        ({"masks": Path("absent"), "formats": ["cellpose"]}, "give --model"),
        ({"masks": Path("absent"), "formats": ["seg"]}, "give --images"),
        ({"masks": Path("absent")}, "absent does not exist"),
        ({"model": "absent", "formats": ["cellpose-training"]}, "give --slices"),
        ({"slices": Path("absent")}, "absent is no slice data set"),
    ],
)
def test_what_is_missing_is_told(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path, **options)
    assert not (tmp_path / "exports").exists()


@pytest.mark.parametrize("formats", [[], ["cellpose"], ["cellpose", "bioimageio"]])
def test_cellpose_gets_no_3d_network(tmp_path: Path, formats: list[str]) -> None:
    folder = volume_model(tmp_path / "solid", 2.0)
    with pytest.raises(InputError, match=r"'solid' is a 3D network.*--format bioimageio") as raised:
        run(tmp_path, model=str(folder), formats=formats)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "exports").exists()


def test_cellpose_gets_no_narrow_network_which_it_would_not_load(tmp_path: Path) -> None:
    from cellpose.models import CellposeModel

    folder = narrow_model(tmp_path / "thin")
    with pytest.raises(InputError, match=r"'thin' has width 16.*width 32 only.*--format bioimageio"):
        run(tmp_path, model=str(folder))
    with pytest.raises(RuntimeError, match="size mismatch"):
        CellposeModel(gpu=False, pretrained_model=str(folder / "thin"))


def test_masks_without_their_image_are_told(embryo: Path) -> None:
    (embryo / "images" / "t001.tif").rename(embryo / "images" / "t009.tif")
    with pytest.raises(InputError, match=r"t001_masks.ome.tif has no image of its name"):
        run(embryo, masks=embryo / "masks", images=embryo / "images")
    write_image(embryo / "images" / "t001.tif", np.zeros((6, 40, 40), np.uint16), SIZE)
    with pytest.raises(InputError, match=r"6 x 40 x 44, its image .* 6 x 40 x 40"):
        run(embryo, masks=embryo / "masks", images=embryo / "images")
    assert not (embryo / "exports").exists()


def test_a_folder_that_holds_something_is_left_alone(embryo: Path) -> None:
    (embryo / "exports").mkdir()
    (embryo / "exports" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        run(embryo, masks=embryo / "masks")
    assert [path.name for path in (embryo / "exports").iterdir()] == ["mine.txt"]


def test_without_bioimageio_the_way_to_it_is_told(model, tmp_path, monkeypatch):
    monkeypatch.setattr("nuclei3d.stages.export.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'nuclei3d\[export\]'"):
        run(tmp_path, model=str(model), formats=["bioimageio"])
