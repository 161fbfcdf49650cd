import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import tifffile
import torch

from nuclei3d.config.loading import validate_params
from nuclei3d.digests import digest_of_frame
from nuclei3d.errors import InputError
from nuclei3d.images.frames import read_labels
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.folder import load_model
from nuclei3d.stages.augment import write_augmentation_sheet
from nuclei3d.stages.prepare import prepare
from nuclei3d.stages.train import train
from nuclei3d.stages.training_data import load_samples, read_slices
from nuclei3d.training.loop import StopTraining
from slices_fixture import write_slices


def params_of(**settings):
    chosen = {
        "name": "small",
        "diameter_px": 14.0,
        "epochs": 2,
        "batch_size": 2,
        "crops_per_epoch": 4,
        "crop_px": 32,
        "validation_crops": 2,
        "precision": "float32",
        "device": "cpu",
    }
    return validate_params({"train": chosen | settings, "tracking": {"enabled": False}}, "the test")


@pytest.fixture
def slices(tmp_path):
    return write_slices(tmp_path / "slices")


def weights_of(model):
    return torch.load(model / "small", weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_writes_a_model_that_cellpose_loads(slices, tmp_path):
    from cellpose.models import CellposeModel

    result = train(params_of(), slices, tmp_path / "m")
    model = load_model(tmp_path / "m")
    assert model.info.diameter_px == 14.0
    assert model.info.nucleus_diameter_um == 7.0
    assert model.info.versions["cellpose"] == "3.1.1.3"
    assert model.info.lineage["slices_md5"] == json.loads((slices / "summary.json").read_text())["md5"]
    theirs = CellposeModel(pretrained_model=str(tmp_path / "m" / "small"))
    assert theirs.diam_mean == 14.0
    image = torch.rand(1, 2, 32, 32)
    theirs.net.eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs.net(image)[0], model.network(image)[0], atol=1e-4, rtol=0)
    assert result.metrics["validation_loss"] > 0
    with (tmp_path / "m" / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(float(row["train_loss"]) > 0 for row in rows)


_SCRIPT = """
import sys
from pathlib import Path
from nuclei3d.config.loading import validate_params
from nuclei3d.stages.augment import write_augmentation_sheet
from nuclei3d.stages.train import train
import json
train(validate_params(json.loads(sys.argv[1]), "test"), Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_killed_at_any_point_and_started_again_it_ends_with_the_same_weights(slices, tmp_path):
    params = params_of(epochs=4, ema=0.9)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}

    def start(out):
        # a process of its own each time, as for a user: other tests leave switches of torch set in this one
        command = [sys.executable, "-c", _SCRIPT, params.model_dump_json(), str(slices), str(out)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    rng = np.random.default_rng()
    checkpoint = tmp_path / "killed.checkpoint" / "last.pt"
    process = start(tmp_path / "killed")
    # some point after the first checkpoint: inside an epoch, a validation or the writing of a file
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.8))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(tmp_path / "killed").wait() == 0
    assert equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed"))


def test_epochs_are_judged_and_thresholds_chosen_on_whole_volumes(slices, tmp_path):
    rng = np.random.default_rng(0)
    for embryo in ("e1", "e2"):
        for frame in range(3):
            image = rng.poisson(50, (6, 32, 32)).astype(np.uint16)
            labels = np.zeros(image.shape, np.uint16)
            labels[2:4, 8:20, 8:20] = 1
            size = VoxelSize(1.0, 0.5, 0.5)
            write_image(tmp_path / "data" / embryo / "images" / f"t{frame}.tif", image, size)
            write_labels(tmp_path / "data" / embryo / "labels" / f"t{frame}.tif", labels, size)
    params = params_of(epochs=2, validate_volumes_every=2, validation_volumes=2)
    split = params.data.split.model_copy(update={"train": ("e1",), "validation": ("e2",)})
    params = params.model_copy(update={"data": params.data.model_copy(update={"split": split})})
    reports = []
    result = train(params, slices, tmp_path / "m", data=tmp_path / "data", on_epoch=reports.append)
    assert np.isnan(reports[0]["volume_ap"])
    assert 0 <= reports[1]["volume_ap"] <= 1
    assert result.metrics["calibrated_ap"] >= result.metrics["uncalibrated_ap"]


def test_slices_of_data_that_changed_since_are_told(tmp_path, capsys):
    rng = np.random.default_rng(0)
    size = VoxelSize(1.0, 0.5, 0.5)
    for embryo in "abc":
        for frame in ("t0", "t1"):
            labels = np.zeros((8, 40, 40), np.uint16)
            labels[2:6, 6:18, 6:18], labels[2:6, 22:36, 20:34] = 1, 2
            image = (rng.poisson(50, labels.shape) + 200 * (labels > 0)).astype(np.uint16)
            write_image(tmp_path / f"data/{embryo}/images/{frame}.tif", image, size)
            write_labels(tmp_path / f"data/{embryo}/labels/{frame}.tif", labels, size)
    params = params_of(min_train_masks=1, validation_crops=2)

    def split(train, validation):
        test = sorted({"b", "c"} - {*validation})
        chosen = {"by": "embryo", "train": train, "validation": validation, "test": test}
        tree = params.model_dump() | {"data": {"split": chosen}, "calibrate": {"volumes": 1}}
        tree["prepare"] = {"downsample_xy": 1, "min_nuclei": 1, "min_volume_um3": 1, "workers": 1}
        return validate_params(tree, "the test")

    prepare(split(["a"], ["b"]), tmp_path / "data", tmp_path / "slices")
    known = train(split(["a"], ["b"]), tmp_path / "slices", tmp_path / "m")
    assert "was cut before" not in capsys.readouterr().err
    before = load_model(known.model).info.frames
    assert set(before.validation) == {"b/t0", "b/t1"}
    # a label corrected in training and validation, a frame labelled, an embryo in another part
    for embryo in "ab":
        labels = read_labels(tmp_path / f"data/{embryo}/labels/t1.tif")
        write_labels(tmp_path / f"data/{embryo}/labels/t1.tif", np.where(labels == 2, 0, labels), size)
    write_image(tmp_path / "data/a/images/t2.tif", image, size)
    write_labels(tmp_path / "data/a/labels/t2.tif", labels, size)
    train(split(["a"], ["b"]), tmp_path / "slices", tmp_path / "m")
    assert "changed (changed: a/t1, b/t1; new: a/t2): run 'nuclei3d prepare' again" in capsys.readouterr().err
    model = train(split(["a"], ["c"]), tmp_path / "slices", tmp_path / "m2").model
    assert "now in another part: c/t0, c/t1, b/t0" in capsys.readouterr().err
    digests = load_model(model).info.frames.validation
    assert digests.keys() > before.validation.keys()
    image = tifffile.imread(tmp_path / "data/c/images/t1.tif")
    labels = read_labels(tmp_path / "data/c/labels/t1.tif")
    assert digest_of_frame(image, labels) in digests.values()


def test_the_model_says_which_planes_were_drawn(slices, tmp_path):
    train(params_of(sampling={"xy": 0}), slices, tmp_path / "m")
    with (tmp_path / "m" / "planes_drawn.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["drawn"]) for row in rows) == 2 * 4
    assert all(int(row["drawn"]) == 0 for row in rows if row["view"] == "xy")


def test_the_sheet_shows_crops_of_every_kind(slices, tmp_path):
    result = write_augmentation_sheet(params_of(augment={"dim_share": 0.5}), slices, tmp_path / "sheet.png")
    assert result.planes == 6
    height, width = matplotlib.image.imread(tmp_path / "sheet.png").shape[:2]
    assert min(height, width) > 500


def test_a_finished_training_started_again_is_kept_as_it_is(slices, tmp_path):
    first = train(params_of(), slices, tmp_path / "m")
    weights = (tmp_path / "m" / "small").read_bytes()

    def fail(report):
        raise AssertionError("an epoch was trained")

    again = train(params_of(device="auto", workers=1), slices, tmp_path / "m", on_epoch=fail)
    assert again == replace(first, done_before=True)
    # Another epoch is kept, or the model was changed by hand: that costs no epoch, but is no longer the same.
    assert not train(params_of(select="last"), slices, tmp_path / "m", on_epoch=fail).done_before
    assert not train(params_of(), slices, tmp_path / "m", on_epoch=fail).done_before
    (tmp_path / "m" / "small").write_bytes(b"")
    assert not train(params_of(), slices, tmp_path / "m", on_epoch=fail).done_before
    assert (tmp_path / "m" / "small").read_bytes() == weights
    epochs = []
    train(params_of(), slices, tmp_path / "m", resume=False, on_epoch=lambda r: epochs.append(r.epoch))
    assert epochs == [1, 2]


def test_a_model_that_was_not_trained_there_is_not_replaced(slices, tmp_path):
    train(params_of(), slices, tmp_path / "m")
    with pytest.raises(InputError, match="holds the model that this starts from"):
        train(params_of(start_from=str(tmp_path / "m")), slices, tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt in it did not come with this model folder"):
        train(params_of(epochs=1), slices, tmp_path / "m")
    (tmp_path / "m" / "notes.txt").unlink()
    (tmp_path / "m").rename(tmp_path / "released")
    with pytest.raises(InputError, match="released holds a model that was not trained there"):
        train(params_of(), slices, tmp_path / "released")


def test_a_model_is_trained_on_through_a_link_to_its_folder(slices, tmp_path):
    train(params_of(), slices, tmp_path / "m")
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "here"
    link.symlink_to(tmp_path / "m")
    assert train(params_of(), slices, link).done_before
    assert not train(params_of(select="last"), slices, link).done_before
    assert link.is_symlink()


@pytest.mark.parametrize("out", [".", "", "..", "absolute"])
def test_the_working_directory_is_refused_as_a_model_folder_before_the_training(
    slices, tmp_path, monkeypatch, out
):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(InputError, match="is the working directory or lies above it"):
        train(params_of(), slices, here if out == "absolute" else Path(out))
    assert not (tmp_path / "here.checkpoint").exists()


def test_a_start_model_spelled_otherwise_is_the_same(slices, tmp_path, monkeypatch):
    train(params_of(epochs=1), slices, tmp_path / "start")
    monkeypatch.chdir(tmp_path)
    train(params_of(start_from="start"), slices, tmp_path / "m")
    assert train(params_of(start_from="start/"), slices, tmp_path / "m").done_before
    assert train(params_of(start_from=str(tmp_path / "start")), slices, tmp_path / "m").done_before
    epochs, other = [], params_of(start_from="start/", select="last")
    train(other, slices, tmp_path / "m", on_epoch=lambda r: epochs.append(r.epoch))
    assert not epochs, "the checkpoint is of these epochs"


def test_targets_that_were_emptied_are_found_though_the_model_was_trained_before(slices, tmp_path):
    train(params_of(), slices, tmp_path / "m")
    sample = sorted((slices / "train").glob("*.bin"))[0]
    found, content = sample.stat(), sample.read_bytes()
    sample.write_bytes(content[:-100] + bytes(100))
    os.utime(sample, ns=(found.st_atime_ns, found.st_mtime_ns))
    with pytest.raises(InputError, match=rf"{sample.name} was changed since prepare wrote it"):
        train(params_of(), slices, tmp_path / "m")
    sample.write_bytes(content)
    assert train(params_of(), slices, tmp_path / "m").done_before


def test_a_label_behind_a_link_that_was_replaced_asks_for_new_thresholds(slices, tmp_path):
    labels, size = np.ones((2, 8, 8), np.uint16), VoxelSize(1.0, 0.5, 0.5)
    (tmp_path / "data").mkdir()
    for name in ("e1", "e2", "e3"):
        for folder in ("images", "labels"):
            write_labels(tmp_path / "disk" / name / folder / "t0.tif", labels, size)
        (tmp_path / "data" / name).symlink_to(tmp_path / "disk" / name)
    params = params_of().model_copy(
        update={"calibrate": params_of().calibrate.model_copy(update={"volumes": 0})}
    )
    assert not train(params, slices, tmp_path / "m", data=tmp_path / "data").done_before
    # what systems leave in a folder is no label
    (tmp_path / "data" / ".DS_Store").touch()
    (tmp_path / "disk" / "e2" / "labels" / "Thumbs.db").touch()
    assert train(params, slices, tmp_path / "m", data=tmp_path / "data").done_before
    write_labels(tmp_path / "disk" / "e2" / "labels" / "t0.tif", labels + 1, size)
    assert not train(params, slices, tmp_path / "m", data=tmp_path / "data").done_before


def test_an_unwritable_output_is_known_before_the_first_epoch(slices, tmp_path):
    (tmp_path / "file").write_text("x")

    def fail(report):
        raise AssertionError("an epoch was trained")

    with pytest.raises(InputError, match=r"cannot write .*file"):
        train(params_of(), slices, tmp_path / "file" / "m", on_epoch=fail)


def test_changed_parameters_or_slices_start_afresh_and_say_so(slices, tmp_path, capsys):
    train(params_of(epochs=1), slices, tmp_path / "m")
    epochs, other = [], params_of(epochs=1, learning_rate=0.01)
    train(other, slices, tmp_path / "m", on_epoch=lambda r: epochs.append(r.epoch))
    assert epochs == [1]
    assert "afresh" in capsys.readouterr().err
    manifest = slices / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("450.0", "440.0"))
    train(other, slices, tmp_path / "m", on_epoch=lambda r: epochs.append(r.epoch))
    assert epochs == [1, 1]


def test_a_narrow_network_is_trained_and_trained_on_as_such(slices, tmp_path, capsys):
    for model in ("m", "other"):
        train(params_of(epochs=1, width=16), slices, tmp_path / model)
    assert load_model(tmp_path / "m").info.width == 16
    assert "Cellpose itself does not load" in (tmp_path / "m" / "README.md").read_text()
    assert weights_of(tmp_path / "m")["output.2.weight"].shape == (3, 16, 1, 1)
    train(params_of(epochs=1, width=8), slices, tmp_path / "other")
    assert "afresh" in capsys.readouterr().err
    assert load_model(tmp_path / "other").info.width == 8
    start = str(tmp_path / "m")
    train(params_of(epochs=1, width=16, start_from=start), slices, tmp_path / "further")
    assert load_model(tmp_path / "further").info.width == 16
    with pytest.raises(InputError, match=r"width 16, not views2d of train\.width 32"):
        train(params_of(start_from=start), slices, tmp_path / "wide")


def test_a_constant_schedule_can_be_prolonged(slices, tmp_path):
    epochs = []
    settings = {"schedule": "constant", "select": "last"}
    train(params_of(epochs=1, **settings), slices, tmp_path / "m")
    train(params_of(epochs=2, **settings), slices, tmp_path / "m", on_epoch=lambda r: epochs.append(r.epoch))
    train(params_of(epochs=2, **settings), slices, tmp_path / "once")
    assert epochs == [2]
    assert equal(weights_of(tmp_path / "m"), weights_of(tmp_path / "once"))


def test_a_damaged_checkpoint_starts_afresh(slices, tmp_path, capsys):
    train(params_of(epochs=1), slices, tmp_path / "m")
    expected = weights_of(tmp_path / "m")
    (tmp_path / "m.checkpoint" / "finished.json").unlink()
    last = tmp_path / "m.checkpoint" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    train(params_of(epochs=1), slices, tmp_path / "m")
    assert "afresh" in capsys.readouterr().err
    assert equal(expected, weights_of(tmp_path / "m"))


def test_training_starts_from_a_weights_file(slices, tmp_path):
    train(params_of(epochs=1), slices, tmp_path / "first")
    start = {"start_from": str(tmp_path / "first" / "small"), "learning_rate": 1e-12, "weight_decay": 0.0}
    train(params_of(epochs=1, **start), slices, tmp_path / "second")
    first, second = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    name = "output.2.weight"
    torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=0)


def test_a_stop_request_keeps_the_model(slices, tmp_path):
    def stop(report):
        raise StopTraining("found good enough")

    result = train(params_of(epochs=3), slices, tmp_path / "m", on_epoch=stop)
    assert (result.epochs, result.stopped) == (1, "found good enough")
    assert load_model(tmp_path / "m").info.name == "small"


def test_planes_are_the_same_from_memory_and_from_their_files(slices):
    described = read_slices(slices)
    kept, unkept = (load_samples(described, "train", memory_limit_gb=limit) for limit in (4.0, 1e-9))
    for plane in range(len(kept)):
        assert kept.read(plane) is kept.read(plane)
        assert unkept.read(plane) is not unkept.read(plane)
        for ours, theirs in zip(kept.read(plane), unkept.read(plane), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_plane_left_out_of_the_manifest_is_not_trained_on(slices):
    whole = load_samples(read_slices(slices), "train")
    manifest = slices / "manifest.csv"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    rest = load_samples(read_slices(slices), "train")
    assert len(rest) == 5
    np.testing.assert_array_equal(rest.read(0).pixels, whole.read(1).pixels)


def test_unusable_input_is_told_in_one_line(slices, tmp_path):
    with pytest.raises(InputError, match="no slice data set"):
        train(params_of(), tmp_path / "nowhere", tmp_path / "m")
    with pytest.raises(InputError, match="start_from"):
        train(params_of(start_from="missing"), slices, tmp_path / "m")
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(InputError, match="text"):
        train(params_of(start_from=str(tmp_path / "text")), slices, tmp_path / "m")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    with pytest.raises(InputError, match="no model folder"):
        train(params_of(), slices, tmp_path / "mine")
    plane = next((slices / "train").glob("*.bin"))
    plane.write_bytes(plane.read_bytes()[:50])
    with pytest.raises(InputError, match=plane.name):
        train(params_of(), slices, tmp_path / "m")
    (slices / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary\.json"):
        train(params_of(), slices, tmp_path / "m")
    assert not (tmp_path / "m").exists()
