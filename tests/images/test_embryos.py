"""Embryos are found by their folders, split without leaks, and read with every check."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from nuclei3d.config.sections import DataParams, SplitParams
from nuclei3d.errors import InputError
from nuclei3d.images.embryos import (
    Embryo,
    EmbryoFrame,
    find_embryos,
    read_labelled,
    split_embryos,
)
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize

VOXEL = VoxelSize(2.0, 0.5, 0.5)


def embryo(name: str, frames: int = 3, labelled: range | None = None) -> Embryo:
    with_labels = range(frames) if labelled is None else labelled
    return Embryo(
        name,
        tuple(
            EmbryoFrame(
                name,
                f"t{i}",
                Path(f"/data/{name}/images/t{i}.tif"),
                Path(f"/data/{name}/labels/t{i}.tif") if i in with_labels else None,
                i,
            )
            for i in range(frames)
        ),
    )


def names(frames: tuple[EmbryoFrame, ...]) -> set[str]:
    return {frame.embryo for frame in frames}


def make_frame(
    data: Path,
    image: np.ndarray[Any, np.dtype[Any]] | None = None,
    labels: np.ndarray[Any, np.dtype[Any]] | None = None,
    label_voxel: VoxelSize = VOXEL,
) -> EmbryoFrame:
    image = np.ones((3, 8, 6), np.uint16) if image is None else image
    labels = np.ones((3, 8, 6), np.uint16) if labels is None else labels
    write_image(data / "emb" / "images" / "t1.tif", image, VOXEL)
    write_image(data / "emb" / "labels" / "t1.tif", labels, label_voxel)
    return find_embryos(data)[0].frames[0]


def test_embryos_and_frames_come_in_natural_order_with_their_labels(tmp_path: Path) -> None:
    volume = np.zeros((2, 4, 4), np.uint16)
    for name in ("emb10", "emb2"):
        for frame in ("t10", "t9", "t100"):
            write_image(tmp_path / name / "images" / f"{frame}.tif", volume, VOXEL)
    write_labels(tmp_path / "emb2" / "labels" / "t10.ome.tif", volume, VOXEL)
    (tmp_path / "notes").mkdir()
    found = find_embryos(tmp_path)
    assert [embryo.name for embryo in found] == ["emb2", "emb10"]
    assert [(frame.frame, frame.index) for frame in found[0].frames] == [("t9", 0), ("t10", 1), ("t100", 2)]
    assert [frame.frame for frame in found[0].labelled] == ["t10"]
    assert found[0].frames[1].label_path == tmp_path / "emb2" / "labels" / "t10.ome.tif"
    assert found[1].labelled == ()


def test_the_real_embryos_are_found(bbbc050: Path) -> None:
    found = find_embryos(bbbc050)
    assert [embryo.name for embryo in found] == [f"Emb{i:02d}" for i in range(1, 12)]
    assert sum(len(embryo.labelled) for embryo in found) == 121
    volume = read_labelled(found[0].frames[-1], DataParams())
    assert volume.image.shape == volume.labels.shape == (51, 124, 127)
    assert volume.voxel_size.zyx == pytest.approx((1.75, 0.8, 0.8))
    assert (found[0].frames[-1].embryo, found[0].frames[-1].frame) == ("Emb01", "t501")


def test_folders_that_are_no_data_set_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_embryos(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no embryo"):
        find_embryos(tmp_path)
    (tmp_path / "emb").mkdir()
    (tmp_path / "emb" / "t0.tif").touch()
    with pytest.raises(InputError, match=r"emb holds volumes: move them into .*/emb/images"):
        find_embryos(tmp_path)
    (tmp_path / "emb" / "images").mkdir()
    with pytest.raises(InputError, match=r"images holds no \.tif"):
        find_embryos(tmp_path)
    with pytest.raises(InputError, match="is itself an embryo"):
        find_embryos(tmp_path / "emb")


def test_a_label_without_image_and_doubled_names_are_refused(tmp_path: Path) -> None:
    make_frame(tmp_path)
    write_labels(tmp_path / "emb" / "labels" / "t01.tif", np.ones((3, 8, 6), np.uint16), VOXEL)
    with pytest.raises(InputError, match=r"t01\.tif has no image of that name"):
        find_embryos(tmp_path)
    (tmp_path / "emb" / "labels" / "t01.tif").rename(tmp_path / "emb" / "labels" / "t1.ome.tif")
    with pytest.raises(InputError, match="same frame name"):
        find_embryos(tmp_path)


def found_labels(data: Path) -> dict[str, str | None]:
    (embryo,) = find_embryos(data)
    return {frame.frame: frame.label_path and frame.label_path.name for frame in embryo.frames}


@pytest.mark.parametrize("name", ["{}_cp_masks.tif", "{}_masks.ome.tif", "{}-labels.tif", "{}_seg.tif"])
def test_labels_may_be_named_as_programs_do(tmp_path: Path, name: str) -> None:
    volume = np.ones((2, 4, 4), np.uint16)
    for frame in ("t0", "t1"):
        write_image(tmp_path / "e" / "images" / f"{frame}.tif", volume, VOXEL)
        write_labels(tmp_path / "e" / "labels" / name.format(frame), volume, VOXEL)
    assert found_labels(tmp_path) == {frame: name.format(frame) for frame in ("t0", "t1")}


def test_labels_of_the_cell_tracking_challenge_belong_to_its_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = np.ones((2, 4, 4), np.uint16)
    for time in range(3):
        write_image(tmp_path / "01" / "images" / f"t{time:03d}.tif", volume, VOXEL)
    write_labels(tmp_path / "01" / "labels" / "man_seg001.tif", volume, VOXEL)
    assert found_labels(tmp_path) == {"t000": None, "t001": "man_seg001.tif", "t002": None}
    assert "01: 1 of 3 frames are labelled" in capsys.readouterr().err


def test_masks_beside_images_are_no_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volume = np.ones((2, 4, 4), np.uint16)
    for name in ("t0", "t0_cp_masks"):
        write_image(tmp_path / "e" / "images" / f"{name}.tif", volume, VOXEL)
    assert found_labels(tmp_path) == {"t0": None}
    assert "1 passed over: t0_cp_masks (they are named as labels" in capsys.readouterr().err


def movie(path: Path, values: list[int]) -> None:
    """Write a time-lapse with one value per time point."""
    path.parent.mkdir(parents=True, exist_ok=True)
    volumes = np.array(values, np.uint16)[:, None, None, None] * np.ones((3, 8, 6), np.uint16)
    metadata = {"axes": "TZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.0}
    tifffile.imwrite(path, volumes, ome=True, metadata=metadata)


@pytest.mark.parametrize("labels", ["film.ome.tif", "film_masks.tif", "hand.tif"])
def test_stacks_over_time_are_frames_each_and_empty_labels_are_unlabelled(
    tmp_path: Path, labels: str
) -> None:
    movie(tmp_path / "e" / "images" / "film.ome.tif", [10, 20, 30, 40])
    movie(tmp_path / "e" / "labels" / labels, [1, 0, 3, 4])
    (embryo,) = find_embryos(tmp_path)
    assert [frame.frame for frame in embryo.frames] == [f"film_t00{time}" for time in range(4)]
    assert [frame.frame for frame in embryo.labelled] == ["film_t000", "film_t002", "film_t003"]
    for frame, image, label in zip(embryo.labelled, (10, 30, 40), (1, 3, 4), strict=True):
        volume = read_labelled(frame, DataParams())
        assert (set(volume.image.flat), set(volume.labels.flat)) == ({image}, {label})


def test_a_stack_of_labels_belongs_to_as_many_images_in_order(tmp_path: Path) -> None:
    for time in (0, 2, 10):
        write_image(
            tmp_path / "e" / "images" / f"t{time}.tif", np.full((3, 8, 6), 10 + time, np.uint16), VOXEL
        )
    movie(tmp_path / "e" / "labels" / "all.tif", [1, 2, 3])
    frames = find_embryos(tmp_path)[0].labelled
    assert [(frame.frame, frame.label_time) for frame in frames] == [("t0", 0), ("t2", 1), ("t10", 2)]
    assert set(read_labelled(frames[2], DataParams()).labels.flat) == {3}
    movie(tmp_path / "e" / "labels" / "all.tif", [1, 2])
    with pytest.raises(InputError, match=r"all\.tif has 2 time points, .*images 3 frames"):
        find_embryos(tmp_path)


def test_numbers_of_labels_may_be_as_large_as_they_like(tmp_path: Path) -> None:
    labels = np.zeros((3, 8, 6), np.uint32)
    labels[0], labels[1] = 2**32 - 1, 10**9
    frame = make_frame(tmp_path, labels=labels)
    read = read_labelled(frame, DataParams()).labels
    np.testing.assert_array_equal(read[:, 0, 0], [2, 1, 0])


def test_links_work_and_dangling_ones_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = make_frame(tmp_path / "real")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "emb").symlink_to(tmp_path / "real" / "emb")
    (tmp_path / "data" / "emb2").symlink_to(tmp_path / "unmounted")
    assert frame.label_path is not None
    (frame.label_path.parent / "t2.tif").symlink_to(tmp_path / "unmounted" / "t2.tif")
    assert found_labels(tmp_path / "data") == {"t1": "t1.tif"}
    said = capsys.readouterr().err
    assert "data: 1 passed over: emb2 (links to what is not there)" in said
    assert "labels: 1 passed over: t2.tif (links to what is not there)" in said


def test_without_lists_the_last_embryo_tests_and_the_second_last_validates(
    capsys: pytest.CaptureFixture[str],
) -> None:
    split = split_embryos([embryo(name) for name in ("a", "b", "c", "d")], SplitParams())
    assert (names(split.train), names(split.validation), names(split.test)) == ({"a", "b"}, {"c"}, {"d"})
    assert split.of("validation") == split.validation
    assert "d tests, c validates" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not 'dev'"):
        split.of("dev")


def test_unlabelled_embryos_and_frames_take_no_part() -> None:
    embryos = [embryo("a", 5, range(1, 3)), embryo("b"), embryo("c"), embryo("z", 3, range(0))]
    split = split_embryos(embryos, SplitParams())
    assert [frame.frame for frame in split.train] == ["t1", "t2"]
    assert names(split.test) == {"c"}


def test_lists_name_the_embryos_and_an_empty_train_takes_the_rest() -> None:
    embryos = [embryo(name) for name in ("a", "b", "c", "d")]
    split = split_embryos(embryos, SplitParams(train=("d",), validation=("a",)))
    assert (names(split.train), names(split.validation), names(split.test)) == ({"d"}, {"a"}, set())
    split = split_embryos(embryos, SplitParams(validation=("a",), test=("b",)))
    assert names(split.train) == {"c", "d"}


def test_a_training_on_all_embryos_holds_none_out_and_says_so(capsys):
    split = split_embryos([embryo("a"), embryo("b")], SplitParams(train=("a", "b")))
    assert (names(split.train), split.validation, split.test) == ({"a", "b"}, (), ())
    assert "none validates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SplitParams(train=("a",), validation=("bb1",)), "names the embryo 'bb1'.*did you mean 'bb'"),
        (SplitParams(train=("a", "bb"), validation=("bb",)), "'bb' is in train and validation"),
        (SplitParams(train=("a",), validation=("z",)), "'z', which has no labelled frame"),
        (SplitParams(train=("a",), test=("bb",)), "no embryo is left for validation"),
        (SplitParams(validation=("a", "bb"), test=("c",)), "no embryo is left for train"),
        (SplitParams(by="time", train=("a",)), "data.split.by is time"),
    ],
)
def test_wrong_lists_are_one_clear_line(params: SplitParams, message: str) -> None:
    embryos = [embryo("a"), embryo("bb"), embryo("c"), embryo("z", 3, range(0))]
    with pytest.raises(InputError, match=message):
        split_embryos(embryos, params)


def test_one_embryo_is_not_split_at_random() -> None:
    with pytest.raises(InputError, match=r"'a' is the only labelled embryo.*data\.split\.by=time"):
        split_embryos([embryo("a", 50)], SplitParams())
    with pytest.raises(InputError, match="only 2 embryos have labels"):
        split_embryos([embryo("a"), embryo("b")], SplitParams())
    with pytest.raises(InputError, match="no embryo has labelled frames"):
        split_embryos([embryo("a", 3, range(0))], SplitParams())


def test_blocks_of_time_lie_in_order_with_the_gap_between() -> None:
    split = split_embryos([embryo("a", 97)], SplitParams(by="time", gap=2))
    times = [[frame.index for frame in split.of(part)] for part in ("train", "validation", "test")]
    assert times == [list(range(63)), list(range(65, 80)), list(range(82, 97))]


@given(
    lengths=st.lists(st.integers(10, 60), min_size=1, max_size=3),
    gap=st.integers(1, 4),
    step=st.integers(1, 5),
    fraction=st.floats(0.01, 0.49),
)
def test_no_split_by_time_ever_leaks(lengths: list[int], gap: int, step: int, fraction: float) -> None:
    embryos = [embryo(str(i), n, range(0, n, step)) for i, n in enumerate(lengths)]
    params = SplitParams(by="time", gap=gap, validation_fraction=fraction, test_fraction=0.2)
    try:
        split = split_embryos(embryos, params)
    except InputError:
        return  # too few frames for such gaps
    for part in (split.train, split.validation, split.test):
        assert names(part) == {one.name for one in embryos}
    for before, after in ((split.train, split.validation), (split.validation, split.test)):
        for one, other in itertools.product(before, after):
            assert one.embryo != other.embryo or other.index - one.index > gap


def test_too_few_frames_for_the_gaps_are_refused() -> None:
    with pytest.raises(InputError, match=r"'a' has 6 labelled frames.*gaps of 3"):
        split_embryos([embryo("a", 6)], SplitParams(by="time", gap=3))


def test_one_embryo_under_two_names_is_a_leak(tmp_path: Path) -> None:
    make_frame(tmp_path)
    (tmp_path / "twin").symlink_to(tmp_path / "emb")
    with pytest.raises(InputError, match="are the same file"):
        split_embryos(find_embryos(tmp_path), SplitParams(train=("emb",), validation=("twin",)))


def test_image_and_labels_are_read_together(tmp_path: Path) -> None:
    image = np.arange(144, dtype=np.float32).reshape(3, 8, 6)
    volume = read_labelled(make_frame(tmp_path, image), DataParams())
    np.testing.assert_array_equal(volume.image, image)
    assert volume.labels.dtype == np.uint32
    assert volume.voxel_size == VOXEL


def test_shapes_and_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    frame = make_frame(tmp_path / "shape", labels=np.ones((3, 8, 7), np.uint16))
    with pytest.raises(InputError, match=r"t1\.tif has the shape 3 x 8 x 6 and its labels .* 3 x 8 x 7"):
        read_labelled(frame, DataParams())
    frame = make_frame(tmp_path / "scale", label_voxel=VoxelSize(2.0, 1.0, 1.0))
    with pytest.raises(InputError, match=r"says voxels of 2 x 0\.5 x 0\.5 um.*its labels .* 2 x 1 x 1 um"):
        read_labelled(frame, DataParams())
    assert read_labelled(frame, DataParams(voxel_size_um=(2.0, 1.0, 1.0))).voxel_size.x == 1.0


def test_nothing_but_nan_and_wrong_labels_are_refused_and_empty_labels_told(tmp_path, capsys):
    nan = np.full((3, 8, 6), np.nan, np.float32)
    with pytest.raises(InputError, match="no finite number"):
        read_labelled(make_frame(tmp_path / "nan", nan), DataParams())
    with pytest.raises(InputError, match="float32 values such as nan where labels"):
        read_labelled(make_frame(tmp_path / "float", labels=nan), DataParams())
    with pytest.raises(InputError, match="negative label -2"):
        read_labelled(make_frame(tmp_path / "neg", labels=np.full((3, 8, 6), -2, np.int16)), DataParams())
    assert not read_labelled(
        make_frame(tmp_path / "zero", labels=np.zeros((3, 8, 6), "u1")), DataParams()
    ).labels.any()
    assert "holds no label" in capsys.readouterr().err


def test_a_frame_without_labels_or_scale_says_what_is_missing(tmp_path: Path) -> None:
    import tifffile

    frame = make_frame(tmp_path)
    (tmp_path / "emb" / "labels" / "t1.tif").unlink()
    with pytest.raises(InputError, match="has no labels"):
        read_labelled(find_embryos(tmp_path)[0].frames[0], DataParams())
    for path in (tmp_path / "emb" / "labels" / "t1.tif", frame.image_path):
        tifffile.imwrite(path, np.ones((6, 8, 6), np.uint16))
    with pytest.raises(InputError, match=r"does not state its voxel size.*data\.voxel_size_um"):
        read_labelled(frame, DataParams())


def test_what_is_unknown_moves_with_the_labels(tmp_path: Path) -> None:
    labels = np.zeros((6, 20, 20), np.int16)
    labels[2:4, 4:10, 4:10] = 3
    labels[:, 12:] = -1
    for kind in ("images", "labels"):
        (tmp_path / "a" / kind).mkdir(parents=True)
    write_image(tmp_path / "a" / "images" / "t.tif", np.abs(labels).astype(np.uint16), VOXEL)
    tifffile.imwrite(tmp_path / "a" / "labels" / "t.tif", labels)
    (frame,) = find_embryos(tmp_path)[0].labelled
    still = read_labelled(frame, DataParams())
    assert still.unknown is not None
    np.testing.assert_array_equal(still.labels, np.maximum(labels, 0))
    moved = read_labelled(frame, DataParams(label_shift_um={"a": (2.0, 1.0, 0.0)}))
    np.testing.assert_array_equal(
        moved.unknown, np.roll(still.unknown, 2, axis=1) & (np.arange(20) > 1)[:, None]
    )
    overlap = (moved.labels == 3) & np.roll(still.labels == 3, (1, 2), (0, 1))
    assert overlap.sum() > 60
    assert not moved.labels[moved.unknown].any()
    other = read_labelled(frame, DataParams(label_shift_um={"b": (2.0, 1.0, 0.0)}))
    np.testing.assert_array_equal(other.labels, still.labels)
