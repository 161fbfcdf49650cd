import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from nuclei3d.errors import InputError
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import (
    ModelInfo,
    TrainingFrames,
    check_output,
    load_model,
    network_from_state,
    save_model,
)
from nuclei3d.networks.planning import plan_architecture
from nuclei3d.networks.unet3d import VolumeNetwork, VolumeSpec, new_volume_network
from nuclei3d.segmentation.network_runner import NetworkRunner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "blobs"
    info = ModelInfo(
        name="blobs",
        diameter_px=17.0,
        nucleus_diameter_um=12.5,
        voxel_size_um=(2.0, 0.5, 0.5),
        score_threshold=0.3,
        lineage={"git_commit": "abc"},
    )
    save_model(path, new_network(17.0, seed=4), info, "# blobs")
    return path


def test_a_fine_tuned_model_knows_the_frames_of_its_start_model_too() -> None:
    own = TrainingFrames(train={"a/t0": "i1-l1"}, validation={"b/t0": "i2-l2"})
    start = TrainingFrames(train={"a/t0": "i3-l3", "c/t0": "i4-0"}, validation={"d/t0": "i5-l5"})
    both = own.after(start)
    # another frame of the same name is kept beside
    assert both.train == {"a/t0": "i1-l1", "a/t0'": "i3-l3", "c/t0": "i4-0"}
    assert both.validation == {"b/t0": "i2-l2", "d/t0": "i5-l5"}
    assert both.complete
    assert not own.after(None).complete
    assert both.part_of("i3-other") == "train"
    assert both.part_of("other-l5") == "validation"
    # 0 stands for no image and no label
    assert both.part_of("0-0") is None
    assert own.part_of("i3-l3") is None


def test_the_folder_holds_weights_info_and_card(folder):
    assert sorted(entry.name for entry in folder.iterdir()) == ["README.md", "blobs", "model.json"]
    assert (folder / "README.md").read_text() == "# blobs\n"
    assert json.loads((folder / "model.json").read_text())["nucleus_diameter_um"] == 12.5


@pytest.mark.parametrize("name", ["", "blobs"])
def test_folder_and_weights_file_load_alike(folder, name):
    model = load_model(folder / name)
    assert model.info.voxel_size_um == (2.0, 0.5, 0.5)
    assert model.info.score_threshold == 0.3
    assert model.info.lineage == {"git_commit": "abc"}
    assert model.path == folder / "blobs"
    expected = new_network(17.0, seed=4).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.network.state_dict().items())


def test_saving_again_replaces_the_model(tmp_path):
    info = ModelInfo(name="a", diameter_px=20)
    save_model(tmp_path / "m", new_network(20, 0), info, "one")
    save_model(tmp_path / "m", new_network(20, 1), info.model_copy(update={"name": "b"}), "two")
    assert sorted(entry.name for entry in (tmp_path / "m").iterdir()) == ["README.md", "b", "model.json"]


def test_stock_cellpose_computes_the_same_flows(folder):
    """The weights are Cellpose's own: its model object gives what ours gives."""
    from cellpose.models import CellposeModel

    rng = np.random.default_rng(0)
    plane = rng.normal(size=(96, 128)).astype(np.float32)
    stock = CellposeModel(gpu=False, pretrained_model=str(folder / "blobs"))
    assert stock.diam_mean == 17.0
    # Cellpose pads by 8 zeros on each side before its network; give ours the same surroundings.
    padded = np.pad(plane, 8)
    ours = NetworkRunner(load_model(folder).network, torch.device("cpu"))(padded[None])[0, :, 8:-8, 8:-8]
    _, flows, _ = stock.eval(plane, channels=[0, 0], normalize=False, diameter=17.0, compute_masks=False)
    theirs_flow, theirs_logit = flows[1], flows[2]
    assert np.abs(5 * ours[:2] - theirs_flow).max() < 1e-4
    assert np.abs(ours[2] - theirs_logit).max() < 1e-4


def test_a_3d_model_comes_back_with_its_shape(tmp_path):
    spec = VolumeSpec(plan_architecture(5.75, "small", style=True), 5.75, (12, 64, 64))
    network = new_volume_network(spec, 1).eval()
    info = ModelInfo(name="solid", kind="full3d", diameter_px=17, nucleus_diameter_um=12, full3d=spec)
    save_model(tmp_path / "m", network, info, "# card")
    model = load_model(tmp_path / "m")
    assert model.info == info
    assert isinstance(model.network, VolumeNetwork)
    assert model.network.spec == spec
    image = torch.randn(2, 1, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.network(image), network(image))


def test_a_3d_model_without_its_shape_is_explained(tmp_path):
    (tmp_path / "model.json").write_text('{"kind": "full3d", "diameter_px": 17}')
    with pytest.raises(InputError, match=r"model\.json is not a valid.*full3d"):
        load_model(tmp_path)
    spec = '{"architecture": {"channels": [4], "pooling": [], "kernels": [[9, 9, 9]]}, "anisotropy": 2, '
    spec += '"patch": [8, 8, 8]}'
    (tmp_path / "model.json").write_text('{"kind": "full3d", "diameter_px": 17, "full3d": ' + spec + "}")
    with pytest.raises(InputError, match="no shape of a network"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cellprob_threshold": float("nan")},
        {"min_volume_um3": float("inf")},
        {"noise_floor": float("inf")},
        {"lower_percentile": 99.8, "upper_percentile": 1.0},
        {"diameter_px": 1e300},
        {"nucleus_diameter_um": 1e300},
        {"voxel_size_um": [2.0, 0.5, 1e-9]},
        {"score_threshold": float("nan")},
        {"diameter_px": None},
        {"lineage": 3},
    ],
    ids=str,
)
def test_a_number_that_no_model_has_is_refused_by_name(folder, tmp_path, wrong):
    described = json.loads((folder / "model.json").read_text()) | wrong
    (tmp_path / "model.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=next(iter(wrong))) as told:
        load_model(tmp_path)
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"anisotropy": float("nan")}, "anisotropy"),
        ({"patch": [12, 64, 10**12]}, "patch"),
        ({"patch": [12, 64, 3]}, "patch"),
        ({"channels": 10**9}, "channels"),
        ({"convolutions": 2 * 10**9}, "convolutions"),
        # within the bounds, and many GB large if it were made before it is compared with the weights
        ({"channels": 4096}, "shape"),
    ],
    ids=str,
)
def test_a_shape_that_no_memory_holds_is_refused_before_it_is_made(tmp_path, wrong, told):
    spec = VolumeSpec(plan_architecture(5.75, "small"), 5.75, (12, 64, 64))
    info = ModelInfo(name="solid", kind="full3d", diameter_px=17, nucleus_diameter_um=12, full3d=spec)
    save_model(tmp_path / "m", new_volume_network(spec, 1), info, "# card")
    described = json.loads((tmp_path / "m" / "model.json").read_text())
    shape = described["full3d"]["architecture"]
    for name, value in wrong.items():
        place = shape if name in shape else described["full3d"]
        place[name] = [value] * len(shape["channels"]) if name == "channels" else value
    (tmp_path / "m" / "model.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=told):
        load_model(tmp_path / "m")


def test_a_narrow_network_keeps_its_width(tmp_path):
    network = new_network(17.0, 4, 16)
    save_model(tmp_path / "m", network, ModelInfo(name="thin", diameter_px=17.0, width=16), "")
    loaded = load_model(tmp_path / "m").network.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in network.state_dict().items())
    check_output(load_model(tmp_path / "m" / "thin"))
    info = tmp_path / "m" / "model.json"
    for width, told in (
        (24, "shape.*of width 24"),
        (None, "shape.*of width 32"),
        (20, "multiple of 8"),
        (72, "width"),
    ):
        described = json.loads(info.read_text())
        described.pop("width", None)
        info.write_text(json.dumps(described if width is None else described | {"width": width}))
        with pytest.raises(InputError, match=told):
            load_model(tmp_path / "m")


def test_weights_that_blow_up_are_found_by_a_look_at_noise(folder):
    model = load_model(folder)
    check_output(model)
    with torch.no_grad():
        model.network.get_parameter("output.2.weight").fill_(3e38)
    with pytest.raises(InputError, match="NaN or infinite"):
        check_output(model)


def test_bare_weights_without_a_possible_diameter_are_refused(tmp_path):
    torch.save(new_network(1e30, seed=1).state_dict(), tmp_path / "weights")
    with pytest.raises(InputError, match="diameter_px"):
        load_model(tmp_path / "weights")


def test_bare_cellpose_weights_load_with_their_own_diameter(tmp_path, capsys):
    torch.save(new_network(23.0, seed=1).state_dict(), tmp_path / "my weights")
    model = load_model(tmp_path / "my weights")
    assert model.info.diameter_px == 23.0
    assert model.info.nucleus_diameter_um is None
    assert "without model.json" in capsys.readouterr().err


class Malicious:
    def __reduce__(self):
        return (os.system, ("echo unpickled",))


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 truncated", bytes(range(256)) * 8])
def test_files_that_are_no_weights_are_named(tmp_path, content):
    path = tmp_path / "weights"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"weights is not a weights file"):
        load_model(path)


def test_nothing_in_a_weights_file_is_executed(tmp_path, capfd):
    torch.save({"x": Malicious()}, tmp_path / "weights")
    with pytest.raises(InputError, match="not a weights file"):
        load_model(tmp_path / "weights")
    assert "unpickled" not in capfd.readouterr().out


def test_missing_and_damaged_models_are_explained(tmp_path, folder):
    with pytest.raises(InputError, match="no model at"):
        load_model(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"model\.json"):
        load_model(tmp_path / "empty")
    (tmp_path / "empty" / "model.json").write_text('{"kind": "views2d"}')
    with pytest.raises(InputError, match="diameter_px"):
        load_model(tmp_path / "empty")
    (tmp_path / "empty" / "model.json").write_text('{"diameter_px": 17}')
    with pytest.raises(InputError, match="cannot read the weights"):
        load_model(tmp_path / "empty")
    with pytest.raises(InputError, match="not the weights"):
        load_model(folder / "model.json")


def test_a_model_cannot_take_the_name_of_its_own_files(tmp_path):
    with pytest.raises(InputError, match="cannot be called"):
        save_model(tmp_path / "m", new_network(30, 0), ModelInfo(name="model.json", diameter_px=30), "")


@pytest.mark.slow(reason="runs the Cellpose command line in a process of its own")
def test_the_cellpose_command_line_runs_with_the_weights(folder, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (4, 32, 32)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "embryo.tif", image)
    command = [sys.executable, "-m", "cellpose", "--dir", str(tmp_path), "--verbose"]
    command += ["--pretrained_model", str(folder / "blobs"), "--do_3D", "--diameter", "17", "--z_axis", "0"]
    command += ["--anisotropy", "2.0", "--save_tif", "--no_npy"]
    # An address that nobody answers: a download would fail, not hang.
    offline = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    home = {"HOME": str(tmp_path / "home"), "CELLPOSE_LOCAL_MODELS_PATH": str(tmp_path / "home")}
    run = subprocess.run(
        command,
        env={**os.environ, **offline, **home},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "loading model" in run.stderr + run.stdout
    assert "model diam_mean =  17.000" in run.stderr + run.stdout


def test_compact_weights_are_half_the_size_and_load_here_and_in_cellpose(tmp_path):
    from cellpose.models import CellposeModel

    network = new_network(16.7, seed=4)
    info = ModelInfo(name="small", diameter_px=16.7)
    save_model(tmp_path / "whole", network, info, "card")
    save_model(tmp_path / "small", network, info, "card", compact=True)
    weights = tmp_path / "small" / "small"
    assert weights.stat().st_size < 0.51 * (tmp_path / "whole" / "small").stat().st_size
    loaded = load_model(tmp_path / "small").network.state_dict()
    theirs = CellposeModel(gpu=False, pretrained_model=str(weights)).net.state_dict()
    for name, value in network.state_dict().items():
        assert loaded[name].dtype == value.dtype
        torch.testing.assert_close(loaded[name], value, rtol=2**-11, atol=2**-25)
        assert torch.equal(theirs[name], loaded[name])
    assert loaded["diam_mean"].item() == pytest.approx(16.7, rel=1e-7)


def test_a_model_that_is_still_in_dvc_says_how_to_get_it(tmp_path):
    (tmp_path / "nuclei_3d.dvc").write_text("outs: []")
    for path in (tmp_path / "nuclei_3d", tmp_path / "nuclei_3d" / "nuclei_3d"):
        with pytest.raises(InputError, match=r"dvc pull .*/nuclei_3d\.dvc$"):
            load_model(path)


def test_weights_survive_the_round_trip():
    network = new_network(30, seed=3).eval()
    image = torch.rand(1, 2, 32, 48, generator=torch.Generator().manual_seed(0))
    copy = network_from_state(network.state_dict())
    with torch.no_grad():
        assert torch.equal(copy(image)[0], network(image)[0])


def test_weights_without_diameters_are_accepted():
    state = {n: v for n, v in new_network(30, 0).state_dict().items() if not n.startswith("diam")}
    assert network_from_state(state).diam_mean.item() == 30.0


def _quantised(values):
    return torch.quantize_per_tensor(values, 1.0, 0, torch.qint8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("output.2.weight"), "missing 'output.2.weight'"),
        (lambda s: s.update(extra=torch.zeros(1)), "unknown 'extra'"),
        (lambda s: s.update({"output.2.bias": torch.zeros(4)}), "shape"),
        (lambda s: s.update({"output.2.bias": torch.full((3,), float("nan"))}), "NaN"),
        # 1e300 is a number in float64, and infinite in the network
        (lambda s: s.update({"output.2.bias": torch.full((3,), 1e300, dtype=torch.float64)}), "infinite"),
        (lambda s: s.update({"output.2.bias": torch.ones(3, dtype=torch.int64)}), "type int64"),
        (lambda s: s.update({"output.2.bias": torch.ones(3, dtype=torch.bool)}), "type bool"),
        (lambda s: s.update({"output.2.bias": torch.ones(3, dtype=torch.complex64)}), "type complex64"),
        (lambda s: s.update({"output.2.bias": torch.ones(3).to_sparse()}), "dense"),
        (lambda s: s.update({"output.2.bias": torch.ones(3, device="meta")}), "dense"),
        (lambda s: s.update({"output.2.bias": _quantised(torch.ones(3))}), "dense"),
        (lambda s: s.update({"output.2.bias": torch.nested.nested_tensor([torch.ones(3)])}), "dense"),
        (lambda s: s.update({"output.0.running_var": torch.full((32,), -1.0)}), "negative variances"),
        (lambda s: s.update({1: torch.ones(3)}), "mapping of names to tensors"),
        (lambda s: s.update(W2=torch.zeros(1)), "Cellpose 4"),
        (lambda s: s.update(note="text"), "mapping of names to tensors"),
    ],
)
def test_wrong_weights_are_refused_by_name(spoil, message):
    state = dict(new_network(30, 0).state_dict())
    spoil(state)
    with pytest.raises(InputError, match=message):
        network_from_state(state)


def test_saved_weights_of_a_3d_network_give_the_same_network():
    spec = VolumeSpec(plan_architecture(2.2, "small"), 2.2, (8, 32, 32))
    network = new_volume_network(spec, 3).eval()
    again = network_from_state(network.state_dict(), spec=spec)
    image = torch.randn(1, 1, *spec.patch)
    with torch.no_grad():
        assert torch.equal(network(image), again(image))


def test_foreign_weights_of_a_3d_network_are_refused_in_one_line():
    spec = VolumeSpec(plan_architecture(2.2, "small"), 2.2, (8, 32, 32))
    state = new_volume_network(spec, 0).state_dict()
    with pytest.raises(InputError, match="missing 'output"):
        network_from_state({n: v for n, v in state.items() if not n.startswith("output")}, spec=spec)
    wider = dataclasses.replace(spec, architecture=plan_architecture(2.2, "default"))
    with pytest.raises(InputError, match=r"unknown|missing|shape"):
        network_from_state(state, spec=wider)
    name = next(n for n in state if n.endswith("weight"))
    with pytest.raises(InputError, match="NaN"):
        network_from_state(state | {name: torch.full_like(state[name], torch.nan)}, spec=spec)
