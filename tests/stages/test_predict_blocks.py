import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import cloudpickle
import dask
import numpy as np
import pytest
import zarr

from nuclei3d.config import Params, load_params
from nuclei3d.errors import InputError, MachineError
from nuclei3d.images.frames import find_frames, read_labels
from nuclei3d.images.ome_zarr import create_zarr
from nuclei3d.images.tiff import write_image
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import measure_range, sampled_planes
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import Model, ModelInfo, TrainingRange, save_model
from nuclei3d.scoring.matching import overlap_table
from nuclei3d.segmentation.settings import SegmentationSettings
from nuclei3d.stages import predict_blocks
from nuclei3d.stages.predict import predict
from oracle_network import OracleNetwork, load_oracle, save_oracle

VOXELS = VoxelSize(2.0, 1.0, 1.0)
INFO = ModelInfo(name="oracle", diameter_px=12, nucleus_diameter_um=12)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder that loads as the oracle, and beside it "solid", one in 3D.

    Blocks may use next to nothing beside their voxels.
    """
    save_model(tmp_path / "model", new_network(12, 0), INFO, "oracle")
    save_oracle(tmp_path / "solid")

    def load(path: Path) -> Model:
        if "solid" in path.parts:
            return load_oracle(path)
        return Model(OracleNetwork(separate=True), INFO, path if path.is_file() else path / "oracle")

    monkeypatch.setattr("nuclei3d.networks.folder.load_model", load)
    monkeypatch.setattr(predict_blocks, "load_model", load)
    monkeypatch.setattr(predict_blocks, "_PROCESS_BYTES", 0.0)
    predict_blocks._network.cache_clear()
    return tmp_path / "model"


TRAINING = TrainingRange(
    diameter_um=(8, 16), voxel_x_um=(1, 1), anisotropy=(2, 2), range_over_noise=(1e4, 1e5)
)


def test_blocks_are_compared_with_the_training_as_the_whole_is(frame, model, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.INFO", INFO.model_copy(update={"training": TRAINING}))
    whole, cut = (
        predict(load_params(None, more), [frame], str(model), tmp_path / out).frames[0]
        for out, more in (("whole", []), ("cut", ["predict.memory_gb=0.0085"]))
    )
    assert cut.masks.suffix == ".zarr"
    assert cut.warnings == whole.warnings
    assert "times the noise, in the training 1e+04 to 1e+05" in cut.warnings[0]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Separate nuclei everywhere, on the faces of any block as well."""
    rng = np.random.default_rng(0)
    centres = np.stack(np.meshgrid(*(np.arange(9, n, 18) for n in (60, 108, 126)), indexing="ij"), -1)
    centres = centres.reshape(-1, 3) + rng.uniform(-1.5, 1.5, (centres.size // 3, 3))
    z, y, x = (np.arange(n) * e for n, e in zip((30, 108, 126), VOXELS.zyx, strict=True))
    volume = rng.integers(95, 105, (30, 108, 126)).astype(np.uint16)
    for cz, cy, cx in centres:
        near = (z[:, None, None] - cz) ** 2 + (y[:, None] - cy) ** 2 + (x - cx) ** 2 < rng.uniform(5, 7) ** 2
        volume[near] = rng.integers(400, 500)
    return volume


@pytest.fixture
def frame(image: np.ndarray, tmp_path: Path) -> Path:
    write_image(tmp_path / "embryo.tif", image, VOXELS)
    return tmp_path / "embryo.tif"


SEGMENT = predict_blocks.segment_block
CLUSTERS: list[object] = []


def in_blocks(*overrides: str) -> Params:
    return load_params(None, ["predict.memory_gb=0.0085", *overrides])


@pytest.mark.parametrize(
    ("name", "wishes", "memory_gb"),
    [
        ("model", [], 0.0085),
        ("solid", ["predict.mode=full3d"], 0.0085),
        ("model", ["predict.volume_model={}/solid", "predict.fusion=mean"], 0.0105),
        ("model", ["predict.volume_model={}/solid", "predict.fusion=consensus"], 0.018),
    ],
)
def test_blocks_give_the_nuclei_of_the_whole(frame, model, tmp_path, capsys, name, wishes, memory_gb):
    wishes = [wish.format(tmp_path) for wish in wishes]
    whole, cut = (
        predict(load_params(None, [*wishes, *more]), [frame], str(tmp_path / name), tmp_path / out).frames[0]
        for out, more in (("whole", []), ("cut", [f"predict.memory_gb={memory_gb}"]))
    )
    blocks = re.search(r"embryo: (\d+) blocks", capsys.readouterr().err)
    assert blocks is not None
    assert int(blocks[1]) >= 4
    assert cut.masks.name == "embryo_masks.ome.zarr"
    assert find_frames(cut.masks)[0].voxel_size == VOXELS
    table = overlap_table(read_labels(whole.masks), read_labels(cut.masks))
    assert table.n_true == table.n_pred == cut.nuclei
    assert (table.best_true_iou > 0.95).all()
    rows = [path.read_text().splitlines() for path in (whole.table, cut.table)]
    volumes = [sorted(float(row.split(",")[4]) for row in table[1:]) for table in rows]
    np.testing.assert_allclose(volumes[0], volumes[1], rtol=0.05)
    assert not list((tmp_path / "cut").glob(".embryo_blocks"))


def test_masks_in_another_form_than_before_replace_these(frame, model, tmp_path, capsys):
    frames = [frame, frame.with_name("embryo2.tif")]
    frames[1].write_bytes(frame.read_bytes())
    for memory, form in (("64", "tif"), ("0.0085", "zarr"), ("64", "tif")):
        params = load_params(None, [f"predict.memory_gb={memory}", "predict.report=false"])
        result = predict(params, frames, str(model), tmp_path / "out", link=True)
        assert {path.name for path in (tmp_path / "out").glob("*_masks*")} == {
            f"embryo_masks.ome.{form}",
            f"embryo2_masks.ome.{form}",
        }
        assert result.tracks is not None
        said = "cut into blocks: weak nuclei do not stay" in capsys.readouterr().err
        assert said == (form == "zarr")


def test_masks_that_were_changed_by_hand_are_laid_aside(frame, model, tmp_path, capsys):
    out = tmp_path / "out"
    predict(in_blocks("predict.report=false"), [frame], str(model), out)
    masks = out / "embryo_masks.ome.zarr"
    written = read_labels(masks)
    zarr.open_group(str(masks), mode="r+")["0"][:] = 7
    predict(in_blocks("predict.report=false"), [frame], str(model), out)
    (kept,) = (out / ".predicted" / "changed").iterdir()
    assert read_labels(kept).min() == 7
    np.testing.assert_array_equal(read_labels(masks), written)
    assert f"{masks} was changed since it was predicted" in capsys.readouterr().err


def test_two_networks_need_the_field_of_one_beside_the_other(frame):
    (found,) = find_frames(frame)
    flat = SegmentationSettings(diameter_px=12, nucleus_diameter_um=12)
    solid = SegmentationSettings(mode="full3d", diameter_px=12, nucleus_diameter_um=12)
    mixed = replace(flat, mode="mixed", volume=solid)
    field_gb = 8 * np.prod(found.shape) / 1e9
    more = predict_blocks.required_gb(found, mixed) - predict_blocks.required_gb(found, flat)
    assert more == pytest.approx(field_gb)
    # a 3D network at a much finer scale decides
    fine = replace(mixed, volume=replace(solid, diameter_px=36))
    assert predict_blocks.required_gb(found, fine) == predict_blocks.required_gb(found, fine.volume)


def test_blocks_are_normalised_exactly_as_the_whole_and_for_each_network(image, frame):
    (found,) = find_frames(frame)
    volume = SegmentationSettings(mode="full3d", upper_percentile=90.0)
    settings = predict_blocks.with_frame_ranges(found, SegmentationSettings(mode="mixed", volume=volume))
    assert settings.intensity_range == measure_range(image)
    assert settings.volume.intensity_range == measure_range(image, upper_percentile=90.0)
    assert len(sampled_planes((100, 2000, 2000))) < 10


def test_blocks_read_from_ome_zarr_equal_those_from_tiff(frame, image, model, tmp_path):
    array = create_zarr(tmp_path / "embryo.ome.zarr", image.shape, image.dtype, VOXELS, (8, 32, 32))
    array[:] = image
    a = predict(in_blocks(), [frame], str(model), tmp_path / "a").frames[0]
    b = predict(in_blocks(), [tmp_path / "embryo.ome.zarr"], str(model), tmp_path / "b").frames[0]
    np.testing.assert_array_equal(read_labels(a.masks), read_labels(b.masks))
    assert a.table.read_text() == b.table.read_text()


def stopped_after_two_blocks(frame: Path, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def stops(task: predict_blocks.BlockTask) -> int:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return SEGMENT(task)

    monkeypatch.setattr(predict_blocks, "segment_block", stops)
    with pytest.raises(KeyboardInterrupt):
        predict(in_blocks(), [frame], str(model), out)
    monkeypatch.setattr(predict_blocks, "segment_block", SEGMENT)


def test_a_killed_run_goes_on_with_the_missing_blocks(frame, model, tmp_path, monkeypatch):
    stopped_after_two_blocks(frame, model, tmp_path / "out", monkeypatch)
    done = {path.name for path in (tmp_path / "out").rglob("?????.npy")}
    assert len(done) == 2
    again: list[str] = []
    monkeypatch.setattr(
        predict_blocks, "segment_block", lambda task: (again.append(task.labels_file.name), SEGMENT(task))[1]
    )
    resumed = predict(in_blocks(), [frame], str(model), tmp_path / "out").frames[0]
    assert not set(again) & done
    straight = predict(in_blocks(), [frame], str(model), tmp_path / "straight").frames[0]
    np.testing.assert_array_equal(read_labels(resumed.masks), read_labels(straight.masks))


@pytest.mark.parametrize("name", ["model", "solid"])
def test_a_cluster_gives_the_same_as_this_process(frame, model, name, tmp_path):
    """Workers of a scheduler that is already there, here threads of this process, which see the oracle."""
    from distributed import LocalCluster

    model = tmp_path / name
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        there = predict(
            in_blocks(f"predict.scheduler={cluster.scheduler_address}"), [frame], str(model), tmp_path / "a"
        ).frames[0]
    here = predict(in_blocks(), [frame], str(model), tmp_path / "b").frames[0]
    np.testing.assert_array_equal(read_labels(there.masks), read_labels(here.masks))


def test_a_scheduler_that_is_not_there_is_named(frame, model, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_blocks, "_ANSWER_S", 1)
    params = in_blocks("predict.scheduler=tcp://127.0.0.1:9")
    with pytest.raises(InputError, match=r"no Dask scheduler at tcp://127\.0\.0\.1:9"):
        predict(params, [frame], str(model), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    assert not list((tmp_path / "out").glob(".*"))


def stops_the_scheduler(task: predict_blocks.BlockTask) -> int:
    if task.labels_file.stem == "00002":
        CLUSTERS[-1].sync(CLUSTERS[-1].scheduler.close)
    return SEGMENT(task)


@pytest.mark.slow(reason="Dask waits half a minute for the scheduler to come back")
def test_a_scheduler_that_goes_away_is_reported_and_what_is_done_is_kept(
    frame, model, tmp_path, monkeypatch, capsys
):
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        CLUSTERS.append(cluster)
        monkeypatch.setattr(predict_blocks, "segment_block", stops_the_scheduler)
        params = in_blocks(f"predict.scheduler={cluster.scheduler_address}")
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
            pytest.raises(MachineError, match="the Dask scheduler is gone"),
        ):
            predict(params, [frame], str(model), tmp_path / "out")
    monkeypatch.setattr(predict_blocks, "segment_block", SEGMENT)
    capsys.readouterr()
    assert predict(in_blocks(), [frame], str(model), tmp_path / "out").frames[0].nuclei > 50
    assert re.search(r"[23] of them done before", capsys.readouterr().err)


def test_workers_elsewhere_get_whole_paths(frame, model, tmp_path, monkeypatch):
    tasks: list[predict_blocks.BlockTask] = []

    def keeps(task: predict_blocks.BlockTask) -> int:
        tasks.append(task)
        raise KeyboardInterrupt

    monkeypatch.setattr(predict_blocks, "segment_block", keeps)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        predict(in_blocks(), [Path("embryo.tif")], "model", Path("out"))
    (task,) = tasks
    assert task.frame.path == frame.resolve()
    assert all(path.is_absolute() for path in (*task.weights.values(), task.labels_file))


def test_a_full_disk_is_one_clear_line(frame, model, small_disk, tmp_path):
    with pytest.raises(MachineError, match=r"embryo\.tif: cannot write .*free some space") as caught:
        predict(in_blocks(), [frame], str(model), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*_masks*"))


@pytest.mark.parametrize(("memory", "kept"), [("0.0085", True), ("0.014", True), ("0.0045", False)])
def test_blocks_are_kept_where_they_fit_the_memory_of_the_next_run(
    frame, model, tmp_path, monkeypatch, capsys, memory, kept
):
    stopped_after_two_blocks(frame, model, tmp_path / "out", monkeypatch)
    capsys.readouterr()
    predict(in_blocks(f"predict.memory_gb={memory}"), [frame], str(model), tmp_path / "out")
    assert ("2 of them done before" in capsys.readouterr().err) == kept


def test_where_no_limit_is_given_a_little_less_free_memory_changes_no_blocks(frame, tmp_path):
    (found,) = find_frames(frame)
    settings = SegmentationSettings(diameter_px=12, nucleus_diameter_um=12)
    run = predict_blocks.BlockRun(1.012, slack=1.25)
    blocks = predict_blocks.cut_frame(found, settings, run, tmp_path)
    less = predict_blocks.BlockRun(1.011, slack=1.25)
    assert predict_blocks.cut_frame(found, settings, less, tmp_path) == blocks
    asked_for = predict_blocks.BlockRun(1.007)
    assert len(predict_blocks.cut_frame(found, settings, asked_for, tmp_path)) > len(blocks)


def test_too_little_memory_is_explained(frame, model, tmp_path):
    with pytest.raises(InputError, match="allow more memory"):
        predict(in_blocks("predict.memory_gb=0.0001"), [frame], str(model), tmp_path / "out")


def test_what_another_model_left_behind_is_not_used(frame, model, tmp_path):
    stale = tmp_path / "out" / ".embryo_blocks" / "0123456789abcdef"
    stale.mkdir(parents=True)
    np.save(stale / "00000.npy", np.ones((3, 3, 3), np.uint32))
    result = predict(in_blocks(), [frame], str(model), tmp_path / "out")
    assert result.frames[0].nuclei > 50
    assert not stale.exists()


def dies(task: predict_blocks.BlockTask) -> int:
    if task.labels_file.name.startswith("00001"):
        os._exit(1)
    return 0


@pytest.mark.slow(reason="starts worker processes again and again")
def test_a_worker_that_dies_again_and_again_is_reported(frame, model, tmp_path, monkeypatch):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(predict_blocks, "segment_block", dies)
    params = in_blocks("predict.workers=2", "predict.memory_gb=0.02")
    with pytest.raises(MachineError, match="a worker died several times"):
        predict(params, [frame], str(model), tmp_path / "out")
