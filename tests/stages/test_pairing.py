"""Any two folders of label volumes find each other by name."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from nuclei3d.errors import InputError
from nuclei3d.stages.pairing import find_image_entries, find_label_entries, pair_entries, refuse_doubt

VOLUME = np.zeros((2, 3, 4), dtype=np.uint16)


def write(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, VOLUME, metadata={"axes": "ZYX"}, imagej=True)
    return root


def paired(truth: Path, pred: Path) -> list[tuple[str, str]]:
    pairs = pair_entries(find_label_entries(truth), find_label_entries(pred))
    return [
        (str(a.frame.path.relative_to(truth)), str(b.frame.path.relative_to(pred))) for a, b in pairs.items()
    ]


def test_equal_stems_pair_in_natural_order(tmp_path: Path) -> None:
    truth = write(tmp_path / "truth", "t10.tif", "t2.tif", "t1.tif")
    pred = write(tmp_path / "pred", "t1.tif", "t2.tiff", "t10.ome.tif", "t11.tif")
    assert paired(truth, pred) == [("t1.tif", "t1.tif"), ("t2.tif", "t2.tiff"), ("t10.tif", "t10.ome.tif")]


@pytest.mark.parametrize("ending", ["_masks.ome.tif", "_cp_masks.tif", "_labels.tif", "_seg.tif", ".tif"])
def test_endings_that_say_labels_are_not_part_of_the_name(tmp_path: Path, ending: str) -> None:
    truth = write(tmp_path / "truth", "a_lbl.tif", "b_lbl.tif")
    pred = write(tmp_path / "pred", f"a{ending}", f"b{ending}")
    assert paired(truth, pred) == [("a_lbl.tif", f"a{ending}"), ("b_lbl.tif", f"b{ending}")]


@pytest.mark.parametrize(
    "name",
    [
        "{0}/{1}_masks.ome.tif",
        "{0}_{1}_masks.ome.tif",
        "{0}/labels/{1}.tif",
        "{0}/masks/{1}.tif",
    ],
)
def test_the_data_layout_pairs_with_every_shape_of_predictions(tmp_path: Path, name: str) -> None:
    frames = [("Emb1", "t001"), ("Emb1", "t051"), ("Emb2", "t001")]
    truth = write(tmp_path / "data", *(f"{e}/labels/{t}.tif" for e, t in frames))
    write(tmp_path / "data", *(f"{e}/images/{t}.tif" for e, t in frames), "Emb1/labels_repaired/t001.tif")
    pred = write(tmp_path / "pred", *(name.format(e, t) for e, t in frames))
    assert paired(truth, pred) == [(f"{e}/labels/{t}.tif", name.format(e, t)) for e, t in frames]


def test_an_embryo_folder_pairs_with_names_that_hold_the_embryo(tmp_path: Path) -> None:
    truth = write(tmp_path / "Emb7", "labels/t1.tif", "labels/t2.tif")
    pred = write(tmp_path / "pred", "Emb7_t1_masks.tif", "Emb7_t2_masks.tif", "Emb8_t1_masks.tif")
    assert paired(truth, pred) == [
        ("labels/t1.tif", "Emb7_t1_masks.tif"),
        ("labels/t2.tif", "Emb7_t2_masks.tif"),
    ]
    assert [p for _, p in paired(truth / "labels", pred)] == ["Emb7_t1_masks.tif", "Emb7_t2_masks.tif"]


def test_the_same_frame_of_another_embryo_is_no_partner(tmp_path: Path) -> None:
    truth = write(tmp_path / "data", "Emb1/labels/t1.tif", "Emb2/labels/t1.tif")
    assert paired(truth, write(tmp_path / "nested", "Emb3/t1.tif", "Emb4/t1.tif")) == []
    # a bare t1 could be either of the two
    assert paired(truth, write(tmp_path / "flat", "t1.tif", "t2.tif")) == []


def doubt(truth: Path, pred: Path) -> None:
    truths, predictions = find_label_entries(truth), find_label_entries(pred)
    refuse_doubt(truths, predictions, pair_entries(truths, predictions))


def test_folders_of_two_embryos_of_one_data_set_are_refused(tmp_path: Path) -> None:
    frames = ("t000", "t001")
    data = write(tmp_path / "data", *(f"{e}/labels/{t}.tif" for e in ("Emb1", "Emb2") for t in frames))
    pred = write(tmp_path / "pred", *(f"{e}/{t}_masks.ome.tif" for e in ("Emb1", "Emb2") for t in frames))
    for truth in (data / "Emb1", data / "Emb1" / "labels", data / "Emb1" / "labels" / "t000.tif"):
        doubt(truth, pred / "Emb1")
        with pytest.raises(InputError, match=r"different embryos, Emb2 and Emb1"):
            doubt(truth, pred / "Emb2")


def test_folders_beside_each_other_may_be_called_as_they_like(tmp_path: Path) -> None:
    doubt(write(tmp_path / "by_anna", "t0.tif", "t1.tif"), write(tmp_path / "by_ben", "t0.tif", "t1.tif"))
    doubt(tmp_path / "by_anna", write(tmp_path / "run" / "out" / "masks", "t0_masks.tif", "t1_masks.tif"))


def test_a_frame_that_may_be_of_two_embryos_is_refused(tmp_path: Path) -> None:
    truth = write(tmp_path / "data", "Emb1/labels/t1.tif", "Emb2/labels/t1.tif", "Emb2/labels/t2.tif")
    flat = write(tmp_path / "flat", "t1_masks.tif", "t2_masks.tif")
    for one, other in ((truth, flat), (flat, truth)):
        with pytest.raises(InputError, match=r"t1.*may belong to .*Emb1.*t1\.tif or to .*Emb2.*t1\.tif"):
            doubt(one, other)
    doubt(truth, write(tmp_path / "named", "Emb1_t1_masks.tif", "Emb2_t1_masks.tif", "Emb2_t2_masks.tif"))


def test_masks_beside_their_images_are_told_apart(tmp_path: Path) -> None:
    folder = write(tmp_path / "both", "a.tif", "a_masks.ome.tif", "b.tif", "b_masks.ome.tif")
    assert [e.frame.path.name for e in find_label_entries(folder)] == ["a_masks.ome.tif", "b_masks.ome.tif"]
    assert [e.frame.path.name for e in find_image_entries(folder)] == ["a.tif", "b.tif"]


def test_two_single_files_pair_whatever_they_are_called(tmp_path: Path) -> None:
    truth = write(tmp_path, "this.tif") / "this.tif"
    pred = write(tmp_path, "that.tif") / "that.tif"
    assert len(pair_entries(find_label_entries(truth), find_label_entries(pred))) == 1


def test_single_frames_of_different_embryos_are_no_pair(tmp_path: Path) -> None:
    truth = write(tmp_path / "data", "Emb1/labels/t1.tif")
    assert paired(truth, write(tmp_path / "pred", "Emb2/t1.tif")) == []


def test_frames_of_a_film_pair_with_masks_by_time(tmp_path: Path) -> None:
    film = np.zeros((3, 2, 3, 4), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "film_labels.tif", film, metadata={"axes": "TZYX"}, imagej=True)
    pred = write(tmp_path / "pred", *(f"film_t{k:03d}_masks.ome.tif" for k in range(3)))
    pairs = pair_entries(find_label_entries(tmp_path / "film_labels.tif"), find_label_entries(pred))
    assert [(a.frame.time, b.frame.path.name) for a, b in pairs.items()] == [
        (k, f"film_t{k:03d}_masks.ome.tif") for k in range(3)
    ]


@pytest.mark.parametrize(
    ("name", "embryo", "short"),
    [
        ("Emb1/labels/t001.tif", "Emb1", "t001"),
        ("Emb1_t001.tif", "Emb1", "t001"),
        ("fish-3_frame_12_masks.tif", "fish-3", "frame_12"),
        ("t001.tif", "data", "t001"),
        ("control.tif", "control", "control"),
    ],
)
def test_embryo_and_frame_are_read_off_the_name(tmp_path: Path, name: str, embryo: str, short: str) -> None:
    (entry,) = find_label_entries(write(tmp_path / "data", name))
    assert (entry.embryo, entry.short) == (embryo, short)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_label_entries(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no"):
        find_label_entries(tmp_path)
