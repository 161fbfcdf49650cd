import csv
import json
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from nuclei3d.config import Params, load_params
from nuclei3d.errors import InputError
from nuclei3d.images import tiff
from nuclei3d.images.frames import Frame, find_frames, read_labels
from nuclei3d.images.ome_zarr import create_zarr
from nuclei3d.images.tiff import write_image
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import Model, ModelInfo, digest_of_weights, save_model
from nuclei3d.segmentation.masks import NUCLEUS_COLUMNS
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.stages.evaluate import evaluate
from nuclei3d.stages.inspect import inspect_images
from nuclei3d.stages.nuclei_table import write_nuclei
from nuclei3d.stages.predict import predict
from nuclei3d.stages.predicted import PredictedFrame, find_done, made_by, note_done
from nuclei3d.stages.track import track
from nuclei3d.stages.track_files import score_track_folders
from oracle_network import SOLID, OracleNetwork, VolumeOracle

VOXELS = VoxelSize(2.0, 0.5, 0.5)
CENTRES_UM = ((16.0, 8.0, 9.0), (15.0, 20.0, 22.0), (20.0, 9.0, 24.0))


INFO = ModelInfo(name="oracle", diameter_px=20, nucleus_diameter_um=10)


def embryo(count: int, shift_um: float = 0.0) -> np.ndarray:
    z, y, x = (np.arange(n) * e for n, e in zip((18, 60, 64), VOXELS.zyx, strict=True))
    image = np.full((18, 60, 64), 100, np.uint16)
    for cz, cy, cx in CENTRES_UM[:count]:
        inside = (z[:, None, None] - cz) ** 2 + (y[:, None] - cy) ** 2 + (x - cx - shift_um) ** 2 < 25
        image[inside] = 900
    return image


@pytest.fixture
def oracle() -> OracleNetwork:
    return OracleNetwork(separate=True)


@pytest.fixture(autouse=True)
def oracle_model(oracle: OracleNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder that loads as the oracle."""
    save_model(tmp_path / "model", new_network(20, 0), INFO, "oracle")
    monkeypatch.setattr(
        "nuclei3d.networks.folder.load_model", lambda path: Model(oracle, INFO, path / "oracle")
    )
    return tmp_path / "model"


@pytest.fixture
def movie(tmp_path: Path) -> Path:
    """Three frames with one, two and three nuclei."""
    folder = tmp_path / "movie"
    for t in (1, 2, 3):
        write_image(folder / f"t{t}.ome.tif", embryo(t), VOXELS)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_frame_gets_masks_and_a_table(movie, oracle_model, tmp_path):
    result = predict(Params(), [movie], str(oracle_model), tmp_path / "out")
    assert [frame.nuclei for frame in result.frames] == [1, 2, 3]
    for t in (1, 2, 3):
        masks = tmp_path / "out" / f"t{t}_masks.ome.tif"
        labels = read_labels(masks)
        assert labels.shape == (18, 60, 64)
        assert sorted(np.unique(labels)) == list(range(t + 1))
        (frame,) = find_frames(masks)
        assert frame.dtype == np.uint16
        assert frame.voxel_size == VOXELS
        with tifffile.TiffFile(masks) as tiff:
            assert tiff.pages.first.compression.name == "ADOBE_DEFLATE"
        rows = rows_of(tmp_path / "out" / f"t{t}_nuclei.csv")
        assert tuple(rows[0]) == NUCLEUS_COLUMNS
        assert [int(row["label"]) for row in rows] == list(range(1, t + 1))
        measured = sorted(tuple(float(row[f"{axis}_um"]) for axis in "zyx") for row in rows)
        np.testing.assert_allclose(measured, sorted(CENTRES_UM[:t]), atol=0.6)
        assert all(float(row["mean_intensity"]) > 800 for row in rows)
        assert all(float(row["volume_um3"]) == pytest.approx(4 / 3 * np.pi * 125, rel=0.15) for row in rows)


def test_a_second_run_does_nothing_and_gives_the_same_result(movie, oracle, oracle_model, tmp_path):
    first = predict(Params(), [movie], str(oracle_model), tmp_path / "out")
    runs = len(oracle.shapes)
    again = predict(Params(), [movie], str(oracle_model), tmp_path / "out")
    assert len(oracle.shapes) == runs
    assert [frame.nuclei for frame in again.frames] == [frame.nuclei for frame in first.frames]
    assert all(frame.done_before for frame in again.frames)


def test_a_page_comes_after_the_frames_unless_it_is_switched_off(movie, oracle_model, tmp_path):
    params = load_params(None, ["predict.report=false"])
    assert predict(params, [movie], str(oracle_model), tmp_path / "out").page is None
    assert not list(tmp_path.glob("out/*.html"))
    result = predict(Params(), [movie], str(oracle_model), tmp_path / "out")
    assert result.page == tmp_path / "out" / "prediction.html"
    assert "<h1>6 nuclei in 3 frames</h1>" in result.page.read_text()
    assert all(frame.done_before for frame in result.frames)


def test_nuclei_are_linked_and_the_page_shows_it(movie, oracle_model, tmp_path, capsys):
    out = tmp_path / "out"
    result = predict(Params(), [movie], str(oracle_model), out, link=True)
    assert (result.tracks.frames, result.tracks.nuclei, result.tracks.tracks) == (3, 6, 3)
    rows = rows_of(out / "tracks" / "tracks.csv")
    assert sorted(int(row["frame"]) for row in rows if row["track"] == "1") == [0, 1, 2]
    assert "lineages" in result.page.read_text().lower()
    # frames of two films are no film
    (movie / "t3.ome.tif").rename(movie / "other7.ome.tif")
    mixed = predict(load_params(None, ["predict.report=false"]), [movie], str(oracle_model), out, link=True)
    assert mixed.tracks is None
    assert "warning: the nuclei are not linked over time" in capsys.readouterr().err


def test_only_the_frames_given_are_linked(movie, oracle_model, tmp_path, capsys):
    params = load_params(None, ["predict.report=false"])
    out = tmp_path / "out"
    predict(params, [movie], str(oracle_model), out, link=True)
    # its masks stay where they are
    (movie / "t2.ome.tif").unlink()
    again = predict(params, [movie], str(oracle_model), out, link=True)
    assert (again.tracks.frames, again.tracks.nuclei) == (2, 4)
    predict(params, [movie], str(oracle_model), tmp_path / "fresh", link=True)
    tables = [(folder / "tracks/tracks.csv").read_text() for folder in (out, tmp_path / "fresh")]
    assert tables[0] == tables[1]
    assert f"warning: {out}: 1 passed over: t2 (masks of frames" in capsys.readouterr().err
    assert predict(params, [movie / "t3.ome.tif"], str(oracle_model), out, link=True).tracks is None
    assert "not linked over time: t3 is a single frame" in capsys.readouterr().err


class UnsureOracle(OracleNetwork):
    """Is not sure of what is dim."""

    sure_from = 0.75

    def forward(self, stack: torch.Tensor) -> tuple[torch.Tensor, None]:
        output, style = super().forward(stack)
        dim = (stack[:, 0] > 0.5) & (stack[:, 0] < self.sure_from)
        output[:, 2][dim] = 0.5
        return output, style


def test_a_nucleus_that_is_dim_in_one_frame_stays_by_the_frames_in_which_it_is_not(
    movie, tmp_path, monkeypatch, capsys
):
    one, two, three = (embryo(count) for count in (1, 2, 3))
    for t, image in enumerate((two, one + (two - one) // 8 * 5, two, two + (three - two) // 8 * 5)):
        write_image(movie / f"t{t}.ome.tif", image, VOXELS)
    unsure = UnsureOracle(separate=True)
    monkeypatch.setattr(
        "nuclei3d.networks.folder.load_model", lambda path: Model(unsure, INFO, path / "oracle")
    )
    params = load_params(None, ["predict.score_threshold=0.8", "predict.report=false"])
    alone = predict(params, [movie], str(tmp_path / "model"), tmp_path / "alone")
    assert [frame.nuclei for frame in alone.frames] == [2, 1, 2, 2]
    out = tmp_path / "out"
    linked = predict(params, [movie], str(tmp_path / "model"), out, link=True)
    # the third nucleus is dim in the only frame that has it
    assert [frame.nuclei for frame in linked.frames] == [2, 2, 2, 2]
    assert (linked.tracks.nuclei, linked.tracks.tracks) == (8, 2)
    said = capsys.readouterr().err
    assert "1 nuclei below the model's least score or volume stay" in said
    assert "; 1 do not" in said
    for frame in linked.frames:
        labels = [int(row["label"]) for row in rows_of(frame.table)]
        assert labels == list(range(1, read_labels(frame.masks).max() + 1)) == [1, 2]
    for name in ("t0", "t2"):
        np.testing.assert_array_equal(
            read_labels(out / f"{name}_masks.ome.tif"),
            read_labels(tmp_path / "alone" / f"{name}_masks.ome.tif"),
        )
    again = predict(params, [movie], str(tmp_path / "model"), out, link=True)
    assert all(frame.done_before for frame in again.frames)
    (out / "t1_masks.ome.tif").write_bytes(b"")
    healed = predict(params, [movie], str(tmp_path / "model"), out, link=True)
    assert read_labels(healed.frames[1].masks).max() == 2
    # what counts by itself stays, whatever is asked of the weak
    for weakest in (0.99, 1):
        params = load_params(None, ["predict.score_threshold=0.8", f"tracks.weakest_score={weakest}"])
        plain = predict(params, [movie], str(tmp_path / "model"), out, link=True)
        assert [frame.nuclei for frame in plain.frames] == [2, 1, 2, 2]


def test_an_empty_film_and_films_of_two_embryos_are_confirmed_each_by_itself(movie, tmp_path, monkeypatch):
    unsure = UnsureOracle(separate=True)
    monkeypatch.setattr(
        "nuclei3d.networks.folder.load_model", lambda path: Model(unsure, INFO, path / "oracle")
    )
    params = load_params(None, ["predict.score_threshold=0.8", "predict.report=false"])
    one, two = embryo(1), embryo(2)
    faint = one + (two - one) // 8 * 5
    # the second nucleus is plain in one embryo, faint in the other: that is no lineage
    for name, image in {"a0": two, "a1": two, "b0": faint, "b1": faint}.items():
        write_image(tmp_path / "films" / f"{name}.ome.tif", image, VOXELS)
    result = predict(params, [tmp_path / "films"], str(tmp_path / "model"), tmp_path / "out", link=True)
    assert [frame.nuclei for frame in result.frames] == [2, 2, 1, 1]
    # candidates of which none stays are no nuclei
    unsure.sure_from = 2.0
    out = tmp_path / "unsure"
    result = predict(
        params,
        [tmp_path / "films" / "a0.ome.tif", tmp_path / "films" / "a1.ome.tif"],
        str(tmp_path / "model"),
        out,
        link=True,
    )
    assert [frame.nuclei for frame in result.frames] == [0, 0]
    assert all(any("no nucleus was found" in line for line in frame.warnings) for frame in result.frames)
    rng = np.random.default_rng(0)
    for t in (0, 1):
        noise = rng.integers(90, 110, one.shape).astype(np.uint16)
        write_image(tmp_path / "empty" / f"t{t}.ome.tif", noise, VOXELS)
    monkeypatch.setattr(
        unsure, "forward", lambda stack: (torch.full((len(stack), 3, *stack.shape[2:]), -6.0), None)
    )
    result = predict(params, [tmp_path / "empty"], str(tmp_path / "model"), tmp_path / "none", link=True)
    assert [frame.nuclei for frame in result.frames] == [0, 0]
    assert (result.tracks.nuclei, result.tracks.tracks) == (0, 0)


@pytest.mark.parametrize("change", ["settings", "image", "masks", "emptied masks", "table", "overwrite"])
def test_what_changed_is_done_again(movie, oracle_model, tmp_path, change):
    predict(Params(), [movie], str(oracle_model), tmp_path / "out")
    params = Params()
    redone = {1}
    if change == "settings":
        params = load_params(None, ["predict.min_volume_um3=30"])
        redone = {1, 2, 3}
    elif change == "image":
        write_image(movie / "t1.ome.tif", embryo(3), VOXELS)
    elif change == "emptied masks":
        (tmp_path / "out" / "t1_masks.ome.tif").write_bytes(b"")
    elif change == "table":
        (tmp_path / "out" / "t1_nuclei.csv").write_text("label\n")
    elif change == "masks":
        (tmp_path / "out" / "t1_masks.ome.tif").unlink()
    else:
        redone = {1, 2, 3}
    result = predict(params, [movie], str(oracle_model), tmp_path / "out", overwrite=change == "overwrite")
    assert {i for i, frame in enumerate(result.frames, 1) if not frame.done_before} == redone
    assert result.frames[0].nuclei == (3 if change == "image" else 1)
    assert len(rows_of(tmp_path / "out" / "t1_nuclei.csv")) == result.frames[0].nuclei
    assert read_labels(tmp_path / "out" / "t1_masks.ome.tif").max() == result.frames[0].nuclei


@pytest.mark.parametrize("link", [False, True])
def test_masks_that_were_changed_by_hand_are_laid_aside(movie, oracle_model, tmp_path, capsys, link):
    masks = tmp_path / "out" / "t2_masks.ome.tif"
    predict(Params(), [movie], str(oracle_model), tmp_path / "out", link=link)
    written = masks.read_bytes()
    for number in (1, 2):
        tiff.write_labels(masks, np.full((18, 60, 64), number, np.uint16), VOXELS)
        predict(Params(), [movie], str(oracle_model), tmp_path / "out", link=link)
        assert masks.read_bytes() == written
    kept = (tmp_path / "out" / ".predicted" / "changed").iterdir()
    assert sorted(int(read_labels(path).min()) for path in kept) == [1, 2]
    assert f"{masks} was changed since it was predicted" in capsys.readouterr().err


def test_masks_that_are_not_known_to_be_predicted_are_laid_aside(movie, oracle_model, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    masks, table = out / "t1_masks.ome.tif", out / "t1_nuclei.csv"
    tiff.write_labels(masks, np.full((18, 60, 64), 7, np.uint16), VOXELS)
    predict(Params(), [movie / "t1.ome.tif"], str(oracle_model), out)
    table.write_text(table.read_text() + "\n")
    predict(Params(), [movie / "t1.ome.tif"], str(oracle_model), out)
    (kept_table, kept_masks) = sorted(
        (out / ".predicted" / "changed").iterdir(), key=lambda path: path.suffix
    )
    assert read_labels(kept_masks).max() == 7
    assert kept_table.name.endswith("_t1_nuclei.csv")
    told = capsys.readouterr().err
    assert f"{masks} is there, not known to be predicted" in told
    assert f"{table} was changed since it was predicted" in told
    # what a killed run left is the same, and stays nowhere
    (out / ".predicted" / "t1.json").unlink()
    predict(Params(), [movie / "t1.ome.tif"], str(oracle_model), out)
    assert len(list((out / ".predicted" / "changed").iterdir())) == 2


@pytest.mark.parametrize(("name", "words"), [("n" * 243, "is too long"), (os.fsdecode(b"bad\xff"), "UTF-8")])
def test_names_that_masks_could_not_have_are_told_before_the_work(movie, oracle_model, tmp_path, name, words):
    (movie / "t1.ome.tif").rename(movie / f"{name}.ome.tif")
    with pytest.raises(InputError, match=words):
        predict(Params(), [movie], str(oracle_model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("empty", ["one", "all"])
def test_a_frame_without_nuclei_has_a_place_on_the_page(movie, oracle_model, tmp_path, capsys, empty):
    for name in ("t2",) if empty == "one" else ("t1", "t2", "t3"):
        write_image(movie / f"{name}.ome.tif", embryo(0), VOXELS)
    result = predict(Params(), [movie], str(oracle_model), tmp_path / "out", link=True)
    assert result.page is not None
    assert [frame.nuclei == 0 for frame in result.frames].count(True) == (1 if empty == "one" else 3)
    assert "is not of these masks" not in capsys.readouterr().err


def test_scores_tell_of_images_and_thresholds_that_changed(movie, oracle_model, tmp_path, capsys):
    out, params = tmp_path / "out", load_params(None, ["predict.report=false", "evaluate.report=false"])
    other = load_params(None, ["predict.report=false", "predict.score_threshold=0.3"])
    predict(other, [movie], str(oracle_model), out)
    for path in out.glob("*_masks.ome.tif"):
        name = path.name.replace("_masks.ome", "")
        tiff.write_labels(tmp_path / "truth" / name, read_labels(path), VOXELS)
    scored = partial(evaluate, params, tmp_path / "truth", out, tmp_path / "scores", model=oracle_model)
    found = scored().metrics
    assert found["model"]["thresholds"]["score_threshold"] == 0.3
    assert "with other thresholds" in found["warnings"][0]
    predict(params, [movie], str(oracle_model), out, link=True)
    assert "warnings" not in scored(images=movie).metrics
    # a file that is written anew with the same voxels is the same image
    tifffile.imwrite(movie / "t1.ome.tif", embryo(1))
    assert "warnings" not in scored(images=movie).metrics
    kept = (out / "t3_masks.ome.tif").read_bytes()
    tiff.write_labels(out / "t3_masks.ome.tif", read_labels(out / "t2_masks.ome.tif"), VOXELS)
    assert (
        "t3_masks.ome.tif was changed since it was predicted" in scored(images=movie).metrics["warnings"][0]
    )
    (out / "t3_masks.ome.tif").write_bytes(kept)
    write_image(movie / "t2.ome.tif", embryo(3), VOXELS)
    track(params, out, tmp_path / "tracks", images=movie)
    assert "was predicted from an image with other voxels" in capsys.readouterr().err
    found = scored(images=movie).metrics
    assert "t2_masks.ome.tif was predicted from an image with other voxels" in found["warnings"][0]


@pytest.mark.parametrize("weakest", [0.3, 1])
def test_tracks_of_older_masks_are_moved_away(movie, oracle_model, tmp_path, capsys, weakest):
    out = tmp_path / "out"
    params = load_params(None, ["predict.report=false", f"tracks.weakest_score={weakest}"])
    predict(params, [movie], str(oracle_model), out, link=True)
    table = (out / "tracks" / "tracks.csv").read_bytes()
    predict(params, [movie], str(oracle_model), out, link=True)
    kept = out / ".predicted" / "tracks"
    assert not kept.exists()
    # another frame replaces nothing that was linked
    write_image(tmp_path / "more" / "t4.ome.tif", embryo(1), VOXELS)
    predict(params, [tmp_path / "more"], str(oracle_model), out)
    assert (out / "tracks" / "tracks.csv").read_bytes() == table
    other = load_params(None, ["predict.report=false", "predict.min_volume_um3=1"])
    predict(other, [movie], str(oracle_model), out)
    assert not (out / "tracks").exists()
    assert (kept / "tracks.csv").read_bytes() == table
    assert f"moved to {kept}" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"holds no res_track\.txt"):
        score_track_folders(out, out, out, required=True)
    write_image(movie / "t1.ome.tif", embryo(3), VOXELS)
    predict(params, [movie], str(oracle_model), out, link=True)
    second = (out / "tracks" / "tracks.csv").read_bytes()
    assert second != table
    predict(other, [movie], str(oracle_model), out)
    assert (kept / "tracks.csv").read_bytes() == table
    assert (out / ".predicted" / "tracks_2" / "tracks.csv").read_bytes() == second


def test_masks_are_not_scored_as_those_of_another_model(movie, oracle_model, tmp_path):
    out, params = tmp_path / "out", load_params(None, ["predict.report=false", "evaluate.report=false"])
    predict(params, [movie], str(oracle_model), out, link=True)
    for path in out.glob("*_masks.ome.tif"):
        name = path.name.replace("_masks.ome", "")
        tiff.write_labels(tmp_path / "truth" / name, read_labels(path), VOXELS)
    save_model(tmp_path / "other", new_network(20, 1), INFO, "another")
    with pytest.raises(InputError, match=r"t1_masks\.ome\.tif was predicted by another model"):
        evaluate(params, tmp_path / "truth", out, tmp_path / "scores", model=tmp_path / "other")
    with pytest.raises(InputError, match="gone"):
        evaluate(params, tmp_path / "truth", out, tmp_path / "scores", model=tmp_path / "gone")
    assert not (tmp_path / "scores").exists()
    found = evaluate(params, tmp_path / "truth", out, tmp_path / "scores", model=oracle_model).metrics
    assert found["model"]["weights_sha256"] == digest_of_weights(oracle_model)


def test_an_image_that_moved_or_is_linked_is_not_done_again(movie, oracle_model, tmp_path):
    predict(Params(), [movie / "t1.ome.tif"], str(oracle_model), tmp_path / "out")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "t1.ome.tif").symlink_to(movie / "t1.ome.tif")
    again = predict(Params(), [tmp_path / "links"], str(oracle_model), tmp_path / "out")
    assert again.frames[0].done_before
    (tmp_path / "links" / "t1.ome.tif").unlink()
    (tmp_path / "links" / "t1.ome.tif").symlink_to(movie / "t2.ome.tif")
    again = predict(Params(), [tmp_path / "links"], str(oracle_model), tmp_path / "out")
    assert [(frame.nuclei, frame.done_before) for frame in again.frames] == [(2, False)]


@pytest.mark.parametrize("change", ["voxels", "scale"])
def test_an_ome_zarr_that_is_changed_in_place_is_done_again(oracle_model, tmp_path, change):
    import zarr

    store = tmp_path / "embryo.ome.zarr"
    create_zarr(store, (18, 60, 64), np.uint16, VOXELS, (9, 32, 32))
    array = zarr.open_group(str(store), mode="r+")["0"]
    array[:] = embryo(1)
    assert predict(Params(), [store], str(oracle_model), tmp_path / "out").frames[0].nuclei == 1
    if change == "voxels":
        array[:] = embryo(2)
    else:
        (described,) = [file for file in (store / ".zattrs", store / "zarr.json") if file.is_file()]
        text = described.read_text()
        assert "0.5" in text
        described.write_text(text.replace("0.5", "0.4"))
    again = predict(Params(), [store], str(oracle_model), tmp_path / "out").frames[0]
    assert not again.done_before
    # masks that are laid inside the store are no other image
    zarr.open_group(str(store / "labels"), mode="w")
    assert predict(Params(), [store], str(oracle_model), tmp_path / "out").frames[0].done_before


def test_a_run_that_fails_after_its_masks_leaves_no_record_of_the_one_before(
    movie, oracle_model, tmp_path, monkeypatch
):
    """Settings X, then Y that stops between masks and table, then X: never Y's masks with X's table."""
    image, out = [movie / "t3.ome.tif"], tmp_path / "out"
    first = predict(Params(), image, str(oracle_model), out)
    expected = read_labels(first.frames[0].masks)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("nuclei3d.stages.predict.write_nuclei", fail)
        with pytest.raises(KeyboardInterrupt):
            predict(load_params(None, ["predict.min_volume_um3=1e6"]), image, str(oracle_model), out)
    assert read_labels(first.frames[0].masks).max() == 0
    again = predict(Params(), image, str(oracle_model), out)
    assert not again.frames[0].done_before
    np.testing.assert_array_equal(read_labels(again.frames[0].masks), expected)


class Stops:
    """Raises what a user's Ctrl-C raises when the third frame is written."""

    def __init__(self, write: Callable[..., None]) -> None:
        self.write = write
        self.written = 0

    def __call__(self, *arguments: object) -> None:
        self.written += 1
        if self.written == 3:
            raise KeyboardInterrupt
        self.write(*arguments)


def test_ctrl_c_leaves_what_is_finished_and_the_next_run_goes_on(movie, oracle_model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    original = tiff.write_labels
    monkeypatch.setattr(tiff, "write_labels", Stops(original))
    with pytest.raises(KeyboardInterrupt):
        predict(Params(), [movie], str(oracle_model), out)
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert names == [
        "t1_masks.ome.tif",
        "t1_nuclei.csv",
        "t2_masks.ome.tif",
        "t2_nuclei.csv",
    ]
    monkeypatch.setattr(tiff, "write_labels", original)
    result = predict(Params(), [movie], str(oracle_model), out)
    assert [frame.done_before for frame in result.frames] == [True, True, False]
    assert [frame.nuclei for frame in result.frames] == [1, 2, 3]


@pytest.mark.parametrize("memory_gb", [None, 1.5])
def test_the_next_frame_is_read_and_segmented_while_one_is_written(
    movie, oracle_model, tmp_path, monkeypatch, memory_gb
):
    events, waits = [], {}
    overlapped = memory_gb is None
    segment, write, read = Segmenter.segment, tiff.write_labels, Frame.read

    def note(event: str) -> None:
        events.append(event)
        waits.setdefault(event, threading.Event()).set()

    def wait_for(event: str) -> None:
        assert waits.setdefault(event, threading.Event()).wait(60 if overlapped else 0) == overlapped

    def slow_write(path: Path, *arguments: object) -> None:
        if path.name.startswith("t1"):
            wait_for("segment 2")
            wait_for("read t3")
        write(path, *arguments)
        note(f"wrote {path.name[:2]}")

    def noted_segment(self: Segmenter, image: np.ndarray, *arguments: object) -> object:
        note(f"segment {1 + sum(event.startswith('segment') for event in events)}")
        return segment(self, image, *arguments)

    def noted_read(self: Frame) -> np.ndarray:
        note(f"read {self.name}")
        return read(self)

    monkeypatch.setattr(Segmenter, "segment", noted_segment)
    monkeypatch.setattr(Frame, "read", noted_read)
    monkeypatch.setattr(tiff, "write_labels", slow_write)
    params = load_params(None, [f"predict.memory_gb={memory_gb or 'null'}", "predict.report=false"])
    result = predict(params, [movie], str(oracle_model), tmp_path / "out")
    assert [frame.name for frame in result.frames] == ["t1", "t2", "t3"]
    assert [frame.nuclei for frame in result.frames] == [1, 2, 3]
    if not overlapped:
        assert events == [f"{what}{n}" for n in (1, 2, 3) for what in ("read t", "segment ", "wrote t")]


@pytest.mark.parametrize("mode", ["ortho", "stitch"])
def test_a_folder_and_a_time_lapse_in_ome_zarr_give_equal_results(movie, oracle_model, tmp_path, mode):
    import zarr

    create_zarr(tmp_path / "movie.ome.zarr", (18, 60, 64), np.uint16, VOXELS, (9, 32, 32))
    group = zarr.open_group(str(tmp_path / "movie.ome.zarr"), mode="r+")
    ome = dict(group.attrs["ome"])
    ome["multiscales"][0]["axes"].insert(0, {"name": "t", "type": "time"})
    scale = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]
    scale["scale"] = [1.0, *scale["scale"]]
    group.attrs["ome"] = ome
    del group["0"]
    array = group.create_array("0", shape=(3, 18, 60, 64), dtype=np.uint16, chunks=(1, 9, 32, 32))
    for t in range(3):
        array[t] = embryo(t + 1)
    params = load_params(None, [f"predict.mode={mode}"])
    predict(params, [movie], str(oracle_model), tmp_path / "a")
    result = predict(params, [tmp_path / "movie.ome.zarr"], str(oracle_model), tmp_path / "b")
    assert [frame.name for frame in result.frames] == [f"movie_t00{t}" for t in range(3)]
    assert result.series == (tmp_path / "b" / "movie_masks.ome.zarr",)
    for t, frame in enumerate(find_frames(tmp_path / "b" / "movie_masks.ome.zarr")):
        np.testing.assert_array_equal(frame.read(), read_labels(tmp_path / "a" / f"t{t + 1}_masks.ome.tif"))
    for t in range(3):
        np.testing.assert_array_equal(
            read_labels(tmp_path / "a" / f"t{t + 1}_masks.ome.tif"),
            read_labels(tmp_path / "b" / f"movie_t00{t}_masks.ome.tif"),
        )
        assert (tmp_path / "a" / f"t{t + 1}_nuclei.csv").read_text() == (
            tmp_path / "b" / f"movie_t00{t}_nuclei.csv"
        ).read_text()


def test_nuclei_of_3_um_are_those_of_10_seen_smaller(oracle, tmp_path, monkeypatch):
    info = INFO.model_copy(update={"min_volume_um3": 100.0})
    monkeypatch.setattr(
        "nuclei3d.networks.folder.load_model", lambda path: Model(oracle, info, path / "oracle")
    )
    found = []
    for diameter_um in (10, 3):
        folder = tmp_path / str(diameter_um)
        write_image(folder / "a.tif", embryo(3), VOXELS.scaled(diameter_um / 10))
        params = load_params(None, [f"predict.diameter_um={diameter_um}"])
        (frame,) = predict(params, [folder], str(tmp_path / "model"), folder / "out").frames
        assert (frame.nuclei, frame.warnings) == (3, ())
        found.append(read_labels(frame.masks))
    np.testing.assert_array_equal(*found)
    # a ball of 3 um has 14 um3, less than the model's least volume
    params = load_params(None, ["predict.diameter_um=3", "predict.min_volume_um3=100"])
    assert predict(params, [folder], str(tmp_path / "model"), tmp_path / "none").frames[0].nuclei == 0


@pytest.mark.parametrize("value", [0, 7, 65535])
def test_an_empty_or_saturated_frame_gives_valid_empty_output(oracle_model, tmp_path, value):
    write_image(tmp_path / "dark.tif", np.full((6, 40, 40), value, np.uint16), VOXELS)
    result = predict(Params(), [tmp_path / "dark.tif"], str(oracle_model), tmp_path / "out")
    assert result.frames[0].nuclei == 0
    assert not read_labels(result.frames[0].masks).any()
    assert result.frames[0].table.read_text() == ",".join(NUCLEUS_COLUMNS) + "\n"


def test_masks_in_the_input_folder_are_no_images(movie, oracle_model):
    predict(Params(), [movie], str(oracle_model), movie, link=True)
    tiff.write_labels(movie / "t1_seg.tif", np.ones((18, 60, 64), np.uint16), VOXELS)
    result = predict(Params(), [movie], str(oracle_model), movie, link=True)
    assert [frame.name for frame in result.frames] == ["t1", "t2", "t3"]
    # inspect counts the same frames
    assert [image.frames for image in inspect_images(Params(), [movie]).images] == [3]
    for path in (*movie.glob("t?.ome.tif"), movie / "t1_seg.tif"):
        path.unlink()
    with pytest.raises(InputError, match="only masks found; give images"):
        predict(Params(), [movie], str(oracle_model), movie)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: write_image(folder / "nan.tif", np.full((4, 9, 9), np.nan), VOXELS),
            r"nan\.tif.*NaN",
        ),
        (lambda folder: tifffile.imwrite(folder / "bare.tif", embryo(1)), "does not state its voxel size"),
        (
            lambda folder: write_image(folder / "swapped.tif", embryo(1), VoxelSize(0.5, 0.5, 2.0)),
            r"swapped\.tif: voxels of 0\.5 x 0\.5 x 2 um .* the order is z, y, x",
        ),
        (
            lambda folder: write_image(folder / "plane.tif", embryo(1)[:1], VOXELS),
            r"plane\.tif is no volume.*give a 3D stack",
        ),
        (lambda folder: (folder / "broken.tif").write_bytes(b"II*\0"), r"broken\.tif"),
        (lambda folder: (folder / "empty.tif").write_bytes(b""), r"empty\.tif"),
        (lambda folder: tifffile.imwrite(folder / "flat.tif", np.zeros((9, 9), np.uint8)), r"flat\.tif"),
        (lambda folder: folder.joinpath("notes").mkdir(), "holds no"),
        (lambda folder: None, "does not exist"),
    ],
)
def test_bad_input_ends_in_one_clear_line(oracle_model, tmp_path, spoil, message):
    folder = tmp_path / "input"
    if message != "does not exist":
        folder.mkdir()
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        predict(Params(), [folder], str(oracle_model), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*_masks*"))


def test_two_frames_of_one_name_are_refused(movie, oracle_model, tmp_path):
    write_image(tmp_path / "t1.tif", embryo(1), VOXELS)
    with pytest.raises(InputError, match="would both write t1_masks"):
        predict(Params(), [movie, tmp_path / "t1.tif"], str(oracle_model), tmp_path / "out")


def test_a_model_for_the_orthogonal_views_is_run_over_them_alone(movie, oracle_model, tmp_path, monkeypatch):
    models = {}
    for name, size in (("model", 20), ("side", 20), ("large", 30)):
        info = INFO.model_copy(update={"diameter_px": size})
        models[name] = Model(OracleNetwork(separate=True), info, oracle_model / "oracle")
    monkeypatch.setattr("nuclei3d.networks.folder.load_model", lambda path: models[path.name])
    for name in ("side", "large"):
        (tmp_path / name).mkdir()
    params = load_params(None, [f"predict.orthogonal_model={tmp_path / 'side'}"])
    assert predict(params, [movie / "t3.ome.tif"], "model", tmp_path / "out").frames[0].nuclei == 3
    # xy planes are 60 x 64; the others 72 voxels deep once the voxels are cubic. Some begin eight pixels in.
    assert {shape[2] for shape in models["model"].network.shapes} == {56, 64}
    assert {shape[2] for shape in models["side"].network.shapes} == {64, 72}
    params = load_params(None, [f"predict.orthogonal_model={tmp_path / 'large'}"])
    with pytest.raises(InputError, match="must have the same diameter_px"):
        predict(params, [movie / "t3.ome.tif"], "model", tmp_path / "out")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["predict.views=[]"], "at least 1 item"),
        (["predict.views=[xy,xy]"], "names a view twice"),
        (["predict.view_weights=[1,2]"], "2 numbers for 3 views"),
        (["predict.mode=mixed"], r"needs a 3D model beside the 2D one; give predict\.volume_model=PATH"),
        (["predict.volume_model=solid", "predict.mode=ortho"], "volume_model is for mode mixed, not ortho"),
        (["predict.volume_model=solid", "predict.mode=full3d"], "not full3d; use mixed or auto"),
        (["predict.volume_model=solid", "predict.volume_weight=0"], "volume_weight"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        load_params(None, overrides)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Model]:
    """Models that load by the name of their folder: two in 2D, two in 3D at another scale."""
    solid = SOLID.model_copy(update={"diameter_px": 18.0})
    models = {}
    for name, network, info in (
        ("flat", OracleNetwork(separate=True), INFO),
        ("solid", VolumeOracle(), solid),
        ("other", VolumeOracle(), solid),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "oracle").write_text(name)
        models[name] = Model(network, info, tmp_path / name / "oracle")
    monkeypatch.setattr("nuclei3d.networks.folder.load_model", lambda path: models[path.name])
    return models


@pytest.mark.parametrize("wishes", [[], ["predict.mode=mixed", "predict.fusion=consensus"]])
def test_a_3d_model_beside_the_2d_one_is_fused_with_it(movie, pair, tmp_path, wishes, capsys):
    params = load_params(None, [f"predict.volume_model={tmp_path / 'solid'}", *wishes])
    result = predict(params, [movie], "flat", tmp_path / "out")
    assert [frame.nuclei for frame in result.frames] == [1, 2, 3]
    assert "mode mixed" in capsys.readouterr().err
    again = predict(params, [movie], "flat", tmp_path / "out")
    assert all(frame.done_before for frame in again.frames)
    # other weights beside it are another prediction
    params = load_params(None, [f"predict.volume_model={tmp_path / 'other'}", *wishes])
    again = predict(params, [movie], "flat", tmp_path / "out")
    assert not any(frame.done_before for frame in again.frames)


@pytest.mark.parametrize(
    ("model", "volume", "message"),
    [
        ("flat", "flat", r"volume_model takes a 3D model; 'oracle' in .* give one that was trained"),
        ("solid", "solid", "'mixed' takes a 2D model"),
        ("flat", "gone", r"no model at .*gone \(predict\.volume_model\)"),
    ],
)
def test_models_that_do_not_mix_are_refused(movie, pair, tmp_path, model, volume, message):
    with pytest.raises(InputError, match=message) as caught:
        predict(
            load_params(None, [f"predict.volume_model={tmp_path / volume}"]), [movie], model, tmp_path / "out"
        )
    assert "\n" not in str(caught.value)


def test_a_service_has_no_3d_model_beside_its_own(movie, pair, tmp_path):
    params = load_params(None, ["predict.volume_model=solid"])
    with pytest.raises(InputError, match=r"predict\.volume_model is for 'nuclei3d predict'"):
        predict(params, [movie], "http://127.0.0.1:9", tmp_path / "out")


@pytest.mark.parametrize("wishes", [["predict.views=[xy,yz]"], ["predict.view_weights=[2.0,1.0,0.5]"]])
def test_views_and_their_weights_can_be_chosen(movie, oracle_model, tmp_path, wishes):
    result = predict(load_params(None, wishes), [movie / "t3.ome.tif"], str(oracle_model), tmp_path / "out")
    assert result.frames[0].nuclei == 3


def test_a_given_voxel_size_wins(oracle_model, tmp_path):
    tifffile.imwrite(tmp_path / "bare.tif", embryo(2))
    params = load_params(None, ["data.voxel_size_um=[2.0,0.5,0.5]"])
    result = predict(params, [tmp_path / "bare.tif"], str(oracle_model), tmp_path / "out")
    assert result.frames[0].nuclei == 2


def test_jobs_that_fill_one_folder_keep_each_others_records(movie, oracle_model, tmp_path, monkeypatch):
    """As the tasks of an array on a cluster do: each sees only its own files."""
    out = tmp_path / "out"
    original = tiff.write_labels

    def another_job_meanwhile(*arguments: object) -> None:
        monkeypatch.setattr(tiff, "write_labels", original)
        predict(Params(), [movie / "t2.ome.tif"], str(oracle_model), out)
        original(*arguments)

    monkeypatch.setattr(tiff, "write_labels", another_job_meanwhile)
    predict(Params(), [movie / "t1.ome.tif"], str(oracle_model), out)
    result = predict(Params(), [movie], str(oracle_model), out)
    assert [frame.done_before for frame in result.frames] == [True, True, False]


def test_two_at_once_on_one_frame_leave_no_record_of_masks_that_are_the_others(
    movie, oracle_model, tmp_path, monkeypatch, capsys
):
    image, out = [movie / "t3.ome.tif"], tmp_path / "out"

    def another_job_meanwhile(*arguments: object) -> None:
        monkeypatch.setattr("nuclei3d.stages.predict.write_nuclei", write_nuclei)
        predict(load_params(None, ["predict.min_volume_um3=1e6"]), image, str(oracle_model), out)
        write_nuclei(*arguments)

    monkeypatch.setattr("nuclei3d.stages.predict.write_nuclei", another_job_meanwhile)
    predict(load_params(None, ["predict.report=false"]), image, str(oracle_model), out)
    assert "t3 was written by another process, too" in capsys.readouterr().err
    again = predict(Params(), image, str(oracle_model), out)
    assert not again.frames[0].done_before
    assert read_labels(again.frames[0].masks).max() == 3


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"fingerprint": 3'])
def test_a_damaged_record_only_means_that_the_frame_is_done_again(movie, oracle_model, tmp_path, text):
    predict(Params(), [movie / "t1.ome.tif"], str(oracle_model), tmp_path / "out")
    (record,) = tmp_path.glob("out/.*/t1.json")
    record.write_text(text)
    again = predict(Params(), [movie / "t1.ome.tif"], str(oracle_model), tmp_path / "out")
    assert not again.frames[0].done_before


@pytest.mark.parametrize(
    "odd",
    [
        {"weights_sha256": 5},
        {"thresholds": [1, 2]},
        {"thresholds": {"score_threshold": float("nan")}},
        {"thresholds": {"score_threshold": "high"}},
        {"files": 1},
        {"image": [0]},
    ],
    ids=str,
)
def test_a_record_with_odd_values_counts_as_none(tmp_path, odd):
    masks, table = tmp_path / "t1_masks.ome.tif", tmp_path / "t1_nuclei.csv"
    for path in (masks, table):
        path.write_text("x")
    note_done(tmp_path, PredictedFrame("t1", masks, table, 1, 0.5, False, "f", made_by={"files": ["d"]}))
    assert list(made_by(masks)["files"]) == ["d"]
    assert find_done(tmp_path, "t1", "f") is not None
    record = tmp_path / ".predicted" / "t1.json"
    tree = json.loads(record.read_text())
    # a record of a version that noted less, and of one that notes more
    record.write_text(json.dumps({**tree, "made_by": {"files": ["d"], "more": 1}}))
    assert find_done(tmp_path, "t1", "f") is not None
    record.write_text(json.dumps({**tree, "made_by": tree["made_by"] | odd}))
    assert find_done(tmp_path, "t1", "f") is None
    assert not made_by(masks)["files"]


def test_a_record_that_names_no_image_does_not_tell_of_another(movie, oracle_model, tmp_path):
    predict(Params(), [movie / "t1.ome.tif"], str(oracle_model), tmp_path / "out")
    (record,) = tmp_path.glob("out/.*/t1.json")
    tree = json.loads(record.read_text())
    del tree["made_by"]["image"]
    record.write_text(json.dumps(tree))
    assert (
        predict(Params(), [movie / "t1.ome.tif"], str(oracle_model), tmp_path / "out").frames[0].done_before
    )


def test_a_folder_in_the_place_of_a_record_is_named_and_nothing_is_moved(movie, oracle_model, tmp_path):
    (tmp_path / "out" / ".predicted" / "t1.json").mkdir(parents=True)
    (tmp_path / "out" / "t1_masks.ome.tif").write_text("mine")
    with pytest.raises(InputError, match=r"t1\.json is a folder"):
        predict(Params(), [movie / "t1.ome.tif"], str(oracle_model), tmp_path / "out")
    assert (tmp_path / "out" / "t1_masks.ome.tif").read_text() == "mine"


def test_what_another_version_of_the_package_predicted_is_done_again(
    movie, oracle_model, tmp_path, monkeypatch
):
    predict(Params(), [movie / "t1.ome.tif"], str(oracle_model), tmp_path / "out")
    monkeypatch.setattr("nuclei3d.stages.predictor.__version__", "0.0.1")
    again = predict(Params(), [movie / "t1.ome.tif"], str(oracle_model), tmp_path / "out")
    assert not again.frames[0].done_before


def test_an_output_folder_that_cannot_be_made_is_named(movie, oracle_model, oracle, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file"):
        predict(Params(), [movie], str(oracle_model), tmp_path / "file" / "out")
    assert not oracle.shapes, "that is known before the work"


def test_what_some_frames_alone_are_unlike_is_said_too(movie, oracle_model, tmp_path, monkeypatch, capsys):
    told = iter([("edge 0.7 um",), ("edge 0.7 um", "span 12 times"), ("edge 0.7 um", "span 13 times")])
    monkeypatch.setattr("nuclei3d.segmentation.likeness.find_unlikeness", lambda *_: next(told))
    predict(Params(), [movie], str(oracle_model), tmp_path / "out")
    line = "warning: t1 (and 2 other frames): edge 0.7 um; t2 (and 1 other frames): span 12 times"
    assert line in capsys.readouterr().err.splitlines()
