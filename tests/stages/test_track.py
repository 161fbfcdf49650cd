"""nuclei3d track: a time-lapse of masks in, tracks out; simulate's truth; evaluate's scores of tracks."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from geff import GeffReader

from nuclei3d.config import Params
from nuclei3d.config.loading import validate_params
from nuclei3d.errors import InputError
from nuclei3d.images.frames import find_frames, read_labels
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.outputs import write_table
from nuclei3d.segmentation.masks import NUCLEUS_COLUMNS
from nuclei3d.stages.evaluate import evaluate
from nuclei3d.stages.pairing import find_label_entries
from nuclei3d.stages.simulate import simulate
from nuclei3d.stages.track import TrackResult, track
from nuclei3d.stages.track_files import read_tracks
from nuclei3d.tracks.nuclei import measure_frame

SIZE = VoxelSize(2.0, 0.5, 0.5)


def film_params(**simulate: object) -> Params:
    section = {
        "embryos": ["one"],
        "frames": [8],
        "shape": [16, 72, 72],
        "nuclei": 7,
        "minutes_per_frame": 15.0,
    }
    return validate_params(
        {
            "simulate": {**section, "cell_cycle_minutes": 150.0, **simulate},
            "evaluate": {"report": False, "bootstrap": 0, "baselines": []},
        },
        "the test",
    )


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embryo with divisions: images, labels, tracks."""
    folder = tmp_path_factory.mktemp("film") / "data"
    simulate(film_params(), folder)
    return folder / "one"


@pytest.fixture(scope="module")
def tracked(film: Path) -> tuple[Path, TrackResult]:
    out = film.parent.parent / "tracked"
    return out, track(Params(), film / "labels", out, images=film / "images", same_numbers=True)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_true_tracks_are_the_labels_under_numbers_that_stay(film: Path) -> None:
    tracks = read_tracks(film / "tracks" / "man_track.txt")
    frames = sorted((film / "labels").iterdir())
    for time, path in enumerate(frames):
        labels, true = read_labels(path), read_labels(film / "tracks" / f"man_track{time:03d}.tif")
        pairs = np.unique(np.stack([labels.ravel(), true.ravel()]), axis=1)
        # one number of the one is one of the other
        assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
        np.testing.assert_array_equal(tracks.nuclei.label[tracks.nuclei.frame == time], np.unique(true)[1:])
    assert len(tracks.divisions) >= 2


def test_every_nucleus_has_its_row(film: Path, tracked: tuple[Path, TrackResult]) -> None:
    out, result = tracked
    rows = table(out / "tracks.csv")
    assert len(rows) == result.nuclei
    row = next(row for row in rows if row["frame"] == "3" and row["label"] == "2")
    labels, image = read_labels(film / "labels/t003.tif"), tifffile.imread(film / "images/t003.tif")
    places = np.argwhere(labels == 2)
    edges = (2.0, 0.348, 0.348)
    expected = [*places.mean(axis=0) * edges, len(places) * np.prod(edges), image[labels == 2].mean()]
    found = [float(row[name]) for name in ("z_um", "y_um", "x_um", "volume_um3", "mean_intensity")]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert row["score"] == ""


def test_masks_keep_their_numbers_over_time(tracked: tuple[Path, TrackResult]) -> None:
    out, result = tracked
    rows = table(out / "tracks.csv")
    for time in range(result.frames):
        numbers = {int(row["track"]) for row in rows if row["frame"] == str(time)}
        assert set(np.unique(read_labels(out / f"t{time:03d}_masks.ome.tif"))) - {0} == numbers
        # the Challenge's have the same nuclei
        same = read_labels(out / f"mask{time:03d}.tif") > 0
        np.testing.assert_array_equal(same, read_labels(out / f"t{time:03d}_masks.ome.tif") > 0)


def test_the_graph_in_geff_is_that_of_the_table(tracked: tuple[Path, TrackResult]) -> None:
    out, result = tracked
    reader = GeffReader(out / "tracks.geff")
    reader.read_node_props()
    graph = reader.build()
    assert [axis.name for axis in graph["metadata"].axes or ()] == ["t", "z", "y", "x"]
    props = {name: prop["values"] for name, prop in graph["node_props"].items()}
    rows = {(int(row["frame"]), int(row["label"])): row for row in table(out / "tracks.csv")}
    for time, label, number, z in zip(*(props[n] for n in ("t", "label", "track", "z")), strict=True):
        row = rows[int(time), int(label)]
        assert int(row["track"]) == number
        assert float(row["z_um"]) == pytest.approx(z, rel=1e-4)
    ids = {int(node): place for place, node in enumerate(graph["node_ids"])}
    out_degree = np.bincount([ids[int(a)] for a, _ in graph["edge_ids"]], minlength=len(ids))
    assert (out_degree == 2).sum() == result.divisions
    assert "score" not in props


def test_napari_gets_its_tracks_and_their_graph(tracked: tuple[Path, TrackResult]) -> None:
    out, result = tracked
    rows = np.loadtxt(out / "napari_tracks.csv", delimiter=",", skiprows=1)
    assert rows.shape == (result.nuclei, 5)
    graph = json.loads((out / "napari_tracks.json").read_text())
    parents = {row["track"]: row["parent"] for row in table(out / "tracks.csv") if row["parent"] != "0"}
    assert {number: str(above[0]) for number, above in graph.items()} == parents


def test_the_scores_stand_in_the_metrics(
    film: Path, tracked: tuple[Path, TrackResult], tmp_path: Path
) -> None:
    out, _ = tracked
    result = evaluate(film_params(), film, film / "labels", tmp_path / "scores", tracks=out)
    found = result.metrics["tracks"]
    assert found["det"] == 1
    assert found["tra"] > 0.99
    assert found["division_f1"] > 0.8
    assert list(found["embryos"]) == ["one"]
    assert result.scores["tracks_tra"] == found["tra"]
    # masks that keep their numbers are found by name, and their tracks with them
    again = evaluate(film_params(), film / "labels", out, tmp_path / "again").metrics
    assert again["tracks"] == found
    assert again["ap"]["0.90"] == 1
    # what a process left that was killed while it wrote is none
    left = out / ".tracks.partial-host-1-00000000"
    left.mkdir()
    (left / "res_track.txt").write_text("1 0 0 0\n")
    assert evaluate(film_params(), film / "labels", out, tmp_path / "left").metrics["tracks"] == found
    shutil.rmtree(left)


def test_masks_that_changed_since_are_told(film: Path, tmp_path: Path, capsys) -> None:
    """Tracks are scored as they are, and the table beside masks counts for what it knows of them."""
    masks = tmp_path / "masks"
    predicted = {}
    for time in range(8):
        labels = read_labels(film / f"labels/t{time:03d}.tif")
        path = masks / f"t{time:03d}_masks.ome.tif"
        write_labels(path, labels, VoxelSize(2.0, 0.348, 0.348))
        found = measure_frame(labels, VoxelSize(2.0, 0.348, 0.348), 0)
        columns = (found.label, *found.position_um.T, found.volume_um3, found.label, found.label / 100)
        write_table(masks / f"t{time:03d}_nuclei.csv", NUCLEUS_COLUMNS, zip(*columns, strict=True))
        predicted[path] = labels
    track(Params(), masks, tmp_path / "tracks")
    rows = table(tmp_path / "tracks" / "tracks.csv")
    assert all(float(row["score"]) == int(row["label"]) / 100 for row in rows)
    evaluate(film_params(), film, masks, tmp_path / "scores", tracks=tmp_path / "tracks")
    assert "warning" not in capsys.readouterr().err
    # one frame renumbered, a nucleus of another erased
    one, other = sorted(predicted)[1], sorted(predicted)[2]
    renumbered = np.where(predicted[one] > 0, predicted[one].max() + 1 - predicted[one], 0)
    write_labels(one, renumbered, VoxelSize(2.0, 0.348, 0.348))
    write_labels(other, np.where(predicted[other] == 1, 0, predicted[other]), VoxelSize(2.0, 0.348, 0.348))
    result = evaluate(film_params(), film, masks, tmp_path / "again", tracks=tmp_path / "tracks")
    said = capsys.readouterr().err
    assert f"of other masks than {masks} holds ({one.name}, {other.name})" in said
    assert "t001_nuclei.csv is not of these masks" in said
    assert "t002_nuclei.csv is not of these masks" in said
    assert result.metrics["tracks"]["det"] == 1
    track(Params(), masks, tmp_path / "tracks")
    scores = {
        (int(row["frame"]), int(row["label"])): row["score"] for row in table(tmp_path / "tracks/tracks.csv")
    }
    assert all(scores[key] == "" or float(scores[key]) == key[1] / 100 for key in scores)
    assert sum(scores[key] == "" for key in scores if key[0] == 1) >= len(np.unique(renumbered)) - 2
    assert all(scores[key] for key in scores if key[0] != 1)


def test_without_tracks_there_are_no_scores_of_tracks(film: Path, tmp_path: Path) -> None:
    result = evaluate(film_params(), film, film / "labels", tmp_path / "scores")
    assert "tracks" not in result.metrics
    with pytest.raises(InputError, match=r"holds no res_track\.txt"):
        evaluate(film_params(), film, film / "labels", tmp_path / "scores", tracks=tmp_path)


def test_tracks_of_a_part_of_the_film_hinder_no_other_scores(
    film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for time in range(2, 5):
        labels = read_labels(film / f"labels/t{time:03d}.tif")
        write_labels(tmp_path / f"masks/t{time:03d}_masks.ome.tif", labels, VoxelSize(2.0, 0.348, 0.348))
    track(Params(), tmp_path / "masks", tmp_path / "masks/tracks")
    metrics = evaluate(film_params(), film / "labels", tmp_path / "masks", tmp_path / "scores").metrics
    assert "tracks" not in metrics
    assert metrics["ap"]["0.50"] > 0
    assert "tracks are not scored" in capsys.readouterr().err


def test_scores_and_intensities_come_from_the_tables_of_predict(tmp_path: Path) -> None:
    for time in range(2):
        labels = np.zeros((6, 20, 20), np.uint16)
        labels[2:4, 5:12, 5:12] = 4
        write_labels(tmp_path / f"masks/t{time}_masks.ome.tif", labels, SIZE)
        text = f"label,mean_intensity,score\n4,{70 + time},0.{time + 5}\n"
        (tmp_path / f"masks/t{time}_nuclei.csv").write_text(text)
    track(Params(), tmp_path / "masks", tmp_path / "out")
    rows = table(tmp_path / "out/tracks.csv")
    assert [(row["track"], row["mean_intensity"], row["score"]) for row in rows] == [
        ("1", "70", "0.5"),
        ("1", "71", "0.6"),
    ]


def test_a_gap_is_a_new_number_for_the_challenge_and_the_same_for_people(tmp_path: Path) -> None:
    for time in range(4):
        labels = np.zeros((6, 20, 20), np.uint16)
        if time != 2:
            labels[2:4, 5:12, 5:12] = 1
        write_labels(tmp_path / f"masks/t{time}.tif", labels, SIZE)
    result = track(Params(), tmp_path / "masks", tmp_path / "out", same_numbers=True)
    assert (result.frames, result.tracks, result.divisions) == (4, 1, 0)
    assert (tmp_path / "out/res_track.txt").read_text() == "1 0 1 0\n2 3 3 1\n"
    assert read_labels(tmp_path / "out/mask003.tif").max() == 2
    assert read_labels(tmp_path / "out/t3_masks.ome.tif").max() == 1


def test_tracks_within_the_folder_of_the_masks_are_none_of_them(tmp_path: Path) -> None:
    labels = np.zeros((6, 20, 20), np.uint16)
    labels[2:4, 5:12, 5:12] = 1
    for time in range(2):
        write_labels(tmp_path / f"masks/t{time}_masks.ome.tif", labels, SIZE)
    for _ in range(2):
        result = track(Params(), tmp_path / "masks", tmp_path / "masks/tracks", same_numbers=True)
        assert (result.frames, result.tracks) == (2, 1)
        # nor for other commands
        assert len(find_label_entries(tmp_path / "masks")) == 2


def test_every_frame_is_measured_by_its_own_voxel_size(tmp_path: Path) -> None:
    labels = np.zeros((6, 40, 40), np.uint16)
    labels[2:4, 10:24, 10:24] = 1
    write_labels(tmp_path / "masks/t0.tif", labels, SIZE)
    write_labels(tmp_path / "masks/t1.tif", labels[:, ::2, ::2], VoxelSize(2.0, 1.0, 1.0))
    assert track(Params(), tmp_path / "masks", tmp_path / "out").tracks == 1
    assert [row["volume_um3"] for row in table(tmp_path / "out/tracks.csv")] == ["196", "196"]
    (frame,) = find_frames(tmp_path / "out/mask001.tif")
    assert frame.voxel_size == VoxelSize(2.0, 1.0, 1.0)


def test_a_film_without_nuclei_has_no_tracks(tmp_path: Path) -> None:
    for time in range(2):
        write_labels(tmp_path / f"masks/t{time}.tif", np.zeros((4, 8, 8), np.uint16), SIZE)
    result = track(Params(), tmp_path / "masks", tmp_path / "out")
    assert (result.nuclei, result.tracks) == (0, 0)
    assert (tmp_path / "out/res_track.txt").read_text() == ""


def broken(tmp_path: Path, case: str) -> dict[str, Any]:
    labels = np.ones((4, 8, 8), np.uint16)
    where = {"several": ("a/t0.tif", "b/t0.tif"), "unscaled": ()}.get(case, ("t0.tif", "t1.tif"))
    for name in where:
        write_labels(tmp_path / "masks" / name, labels, SIZE)
    if case == "unscaled":
        (tmp_path / "masks").mkdir()
        tifffile.imwrite(tmp_path / "masks/t0.tif", labels, photometric="minisblack")
    if case == "shape":
        write_image(tmp_path / "images/t0.tif", np.ones((5, 8, 8), np.uint16), SIZE)
    if case == "names":
        write_image(tmp_path / "images/x7.tif", labels, SIZE)
        write_image(tmp_path / "images/x8.tif", labels, SIZE)
    return {"images": tmp_path / "images"} if case in ("shape", "names") else {}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("several", "several embryos"),
        ("unscaled", "does not state its voxel size"),
        ("shape", "differ in shape"),
        ("names", "no image of"),
    ],
)
def test_what_cannot_be_tracked_is_said(tmp_path: Path, case: str, words: str) -> None:
    options = broken(tmp_path, case)
    with pytest.raises(InputError, match=words):
        track(Params(), tmp_path / "masks", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(film: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="is no tracking"):
        track(Params(), film / "labels", tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [("1 0\n", "no table"), ("1 3 2 0\n", "cannot be"), ("1 0 2 0\n2 2 3 1\n", "must end before")],
)
def test_a_table_that_contradicts_itself_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "res_track.txt").write_text(text)
    with pytest.raises(InputError, match=words):
        read_tracks(tmp_path / "res_track.txt")


def test_parameters_are_learnt_from_true_tracks(film: Path, tmp_path: Path) -> None:
    from nuclei3d.config.loading import load_params

    file = tmp_path / "params.yaml"
    file.write_text("tracks:\n  max_step: 0.05  # far too short\n")
    poor = load_params(file)
    options = {"learn": film, "apply": True, "params_file": file}
    result = track(poor, film / "labels", tmp_path / "out", images=film / "images", **options)
    assert result.learnt["tracks.max_step"] > 0.05
    assert load_params(file).tracks.max_step == result.learnt["tracks.max_step"]
    assert "# far too short" in file.read_text()
    scores = [
        evaluate(film_params(), film, film / "labels", tmp_path / "scores", tracks=out).metrics["tracks"]
        for out in (track(poor, film / "labels", tmp_path / "poor").out, result.out)
    ]
    assert scores[1]["lnk"] > scores[0]["lnk"]
    with pytest.raises(InputError, match="0 files man_track"):
        track(poor, film / "labels", tmp_path / "none", learn=film / "images")
    with pytest.raises(InputError, match="--apply"):
        track(poor, film / "labels", tmp_path / "none", apply=True, params_file=file)
