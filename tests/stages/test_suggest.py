"""suggest: which blocks of which frames to label next, with a network whose doubts are planted."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn
from typer.testing import CliRunner

from nuclei3d.cli import app
from nuclei3d.config import Params, load_params
from nuclei3d.errors import InputError
from nuclei3d.flows import flows_2d
from nuclei3d.images.frames import single_frame
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks import folder as model_folder
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import Model, ModelInfo, save_model
from nuclei3d.stages.suggest import suggest
from oracle_network import ball_labels

VOXELS = VoxelSize(2.0, 1.0, 1.0)
SHAPE = (20, 80, 80)
CENTRES = np.array([(20, y, x) for y in (20, 60) for x in (20, 60)], float)
INFO = ModelInfo(diameter_px=12, nucleus_diameter_um=12, score_threshold=0.6)
PARAMS = load_params(None, ["predict.device=cpu", "predict.precision=float32"])


class DoubtfulNetwork(nn.Module):
    """Gives exact flows of what is bright, and is the less sure of it the dimmer it is."""

    def forward(self, stack: torch.Tensor) -> tuple[torch.Tensor, None]:
        output = np.empty((len(stack), 3, *stack.shape[2:]), np.float32)
        for plane, made in zip(stack[:, 0].float().numpy(), output, strict=True):
            made[:2] = 5 * flows_2d(ndimage.label(plane > 0.2)[0])
            made[2] = 15 * (plane - 0.3)
        return torch.from_numpy(output), None


def draw(dim: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Four nuclei of which one is half as bright."""
    labels = ball_labels(SHAPE, CENTRES, np.full(4, 6.0), VOXELS.zyx)
    brightness = np.array([0.0, *(80.0 if number == dim else 200.0 for number in range(1, 5))])
    noise = np.random.default_rng(seed).normal(100, 2, SHAPE)
    return (noise + brightness[labels]).astype(np.uint16), labels


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    save_model(tmp_path / "model", new_network(12, 0), INFO, "card")
    doubtful = Model(DoubtfulNetwork(), INFO, tmp_path / "model" / INFO.name)
    monkeypatch.setattr(model_folder, "load_model", lambda path: doubtful)
    return str(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Embryos a and b of two frames; b/t1 is doubtful, and more so a/t0, which is labelled."""
    for seed, (frame, dim) in enumerate({"a/t0": 1, "a/t1": None, "b/t0": None, "b/t1": 3}.items()):
        embryo, name = frame.split("/")
        image, labels = draw(dim, seed)
        write_image(tmp_path / "data" / embryo / "images" / f"{name}.tif", image, VOXELS)
        if frame == "a/t0":
            write_labels(tmp_path / "data" / embryo / "labels" / f"{name}.tif", labels, VOXELS)
    return tmp_path / "data"


def test_the_block_with_the_dim_nucleus_comes_first_and_the_labelled_frame_never(
    data, model, tmp_path, capsys
):
    result = suggest(PARAMS, [data], model, tmp_path / "out", count=20)
    first = result.blocks[0]
    assert (first.embryo, first.frame) == ("b", "t1")
    assert first.y0 <= 60 < first.y1
    assert first.x0 <= 20 < first.x1
    assert first.reason in (
        f"candidates with scores near the threshold: {sides}"
        for sides in ("1 above, 0 below", "0 above, 1 below")
    )
    assert {f"{each.embryo}/{each.frame}" for each in result.blocks} == {"a/t1", "b/t0", "b/t1"}
    assert (result.looked_at, result.labelled) == (3, ("a/t0",))
    assert "a: 1 labelled frames passed over" in capsys.readouterr().err
    with (tmp_path / "out" / "suggestions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["embryo"], row["frame"], int(row["z1"])) for row in rows] == [
        (each.embryo, each.frame, each.z1) for each in result.blocks
    ]
    assert (tmp_path / "out" / "suggestions.png").read_bytes()[:4] == b"\x89PNG"
    again = suggest(PARAMS, [data / "b", data / "a" / "images"], model, tmp_path / "again", count=20)
    assert sorted(again.blocks, key=repr) == sorted(result.blocks, key=repr)


def test_the_same_input_gives_the_same_files(data, model, tmp_path):
    for name in ("one", "two"):
        suggest(PARAMS, [data], model, tmp_path / name, count=3, known=True)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) >= 3
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_an_earlier_call_suggested_is_moved_away_as_it_is(data, model, tmp_path, capsys):
    out = tmp_path / "out"
    suggest(PARAMS, [data], model, out, count=3, known=True)
    table = out / "suggestions.csv"
    masks = {path.relative_to(out) for path in out.rglob("*_known.tif")}
    suggest(PARAMS, [data], model, out, count=3, known=True)
    assert not (out / "earlier").exists()
    (out / "known" / "notes.txt").write_text("mine")
    table.write_text(table.read_text() + "edited\n")
    suggest(PARAMS, [data / "b"], model, out, count=1)
    assert "edited" in (out / "earlier" / "suggestions.csv").read_text()
    assert {path.relative_to(out / "earlier") for path in out.rglob("earlier/**/*_known.tif")} == masks
    assert [path.name for path in out.glob("known/**/*") if path.is_file()] == ["notes.txt"]
    assert f"moved to {out / 'earlier'}" in capsys.readouterr().err
    suggest(PARAMS, [data], model, out, count=3)
    assert len((out / "earlier_2" / "suggestions.csv").read_text().splitlines()) == 2


def test_what_is_known_of_a_frame_is_left_out_and_stays_known(data, model, tmp_path):
    known = np.zeros(SHAPE, np.uint8)
    known[:, 40:, :] = 1
    write_labels(data / "b" / "labels" / "t1.tif", draw(3, 3)[1], VOXELS)
    write_image(data / "b" / "labels" / "t1_known.tif", known, VOXELS)
    file = data / "b" / "images" / "t1.tif"
    result = suggest(PARAMS, [file], model, tmp_path / "out", count=1, known=True)
    (block,) = result.blocks
    assert (block.embryo, block.frame) == ("b", "t1")
    # the doubtful nucleus is known
    assert block.y0 < 40
    written = single_frame(tmp_path / "out" / "known" / "b" / "t1_known.tif").read()
    assert written[known == 1].all()
    assert written[block.z0 : block.z1, block.y0 : block.y1, block.x0 : block.x1].all()
    # nuclei that the block cuts are known as wholes, the rest is not
    labels = draw(3, 3)[1]
    for number in np.unique(labels):
        inside = labels[block.z0 : block.z1, block.y0 : block.y1, block.x0 : block.x1] == number
        if number and inside.any():
            assert written[labels == number].mean() > 0.9
    assert not written.all()


def test_plain_images_are_one_embryo_and_spread_over_time(model, tmp_path):
    for time in range(3):
        write_image(tmp_path / "movie" / f"t{time}.tif", draw(2, time)[0], VOXELS)
    result = suggest(PARAMS, [tmp_path / "movie"], model, count=3)
    assert {each.embryo for each in result.blocks} == {"movie"}
    assert sorted(each.frame for each in result.blocks) == ["t0", "t1", "t2"]
    assert result.files == ()


def test_the_command_gives_one_json_object(data, model):
    ran = CliRunner().invoke(app, ["suggest", str(data / "b"), "--model", model, "--count", "1", "--json"])
    assert ran.exit_code == 0, ran.output
    (block,) = json.loads(ran.stdout)["blocks"]
    assert {"embryo", "frame", "z0", "z1", "y0", "y1", "x0", "x1", "uncertainty", "reason"} <= set(block)


def test_what_cannot_be_suggested_is_one_clear_line(data, model, tmp_path):
    for frame in ("t0", "t1"):
        write_labels(data / "b" / "labels" / f"{frame}.tif", draw(None, 0)[1], VOXELS)
    for inputs, options, line in (
        ([data / "b"], {}, "all frames are labelled"),
        ([data], {"count": 0}, "--count 0: give 1 or more"),
        ([data], {"known": True}, "--known writes masks into the folder of --out"),
    ):
        with pytest.raises(InputError, match=line):
            suggest(PARAMS, inputs, model, **options)
    with pytest.raises(InputError, match="is a service"):
        suggest(Params(), [data], "http://127.0.0.1:5050")
