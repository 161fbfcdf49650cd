"""Corrected labels come home: from every program, all or none, and never over others without a word."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from nuclei3d.config import Params, load_params
from nuclei3d.errors import InputError, MachineError
from nuclei3d.images.embryos import find_embryos, read_labelled
from nuclei3d.images.frames import read_labels
from nuclei3d.images.ome_zarr import create_zarr
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.export.cellpose import write_rois, write_seg
from nuclei3d.stages.import_labels import Changes, compare_labels, import_labels

SIZE = VoxelSize(2.0, 1.0, 1.0)
SHAPE = (12, 40, 48)


def balls(*centres: tuple[int, int, int], radius: float = 6.0) -> NDArray[np.uint32]:
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    labels = np.zeros(SHAPE, np.uint32)
    for number, (cz, cy, cx) in enumerate(centres, start=1):
        labels[(2 * (z - cz)) ** 2 + (y - cy) ** 2 + (x - cx) ** 2 <= radius**2] = number
    return labels


LABELS = balls((6, 12, 12), (6, 28, 14), (5, 20, 36))


def image_of(labels: NDArray[np.uint32]) -> NDArray[np.uint16]:
    noise = np.random.default_rng(0).normal(100, 5, labels.shape)
    return (noise + 400 * (labels > 0)).astype(np.uint16)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    write_image(tmp_path / "raw" / "t000.tif", image_of(LABELS), SIZE)
    return tmp_path / "raw" / "t000.tif"


def save(kind: str, folder: Path, labels: NDArray[np.uint32]) -> Path:
    folder.mkdir(exist_ok=True)
    if kind == "cellpose":
        tifffile.imwrite(folder / "t000_cp_masks.tif", labels.astype(np.uint16))
        return folder / "t000_cp_masks.tif"
    if kind == "seg":
        return write_seg(folder, "t000", image_of(labels), labels, SIZE)
    if kind == "rois":
        return write_rois(folder / "e1_t000_rois.zip", labels)
    if kind == "zarr":
        array = create_zarr(folder / "t000.zarr", labels.shape, np.uint32, SIZE, SHAPE)
        array[:] = labels
        return folder / "t000.zarr"
    write_labels(folder / "t000_masks.ome.tif", labels, SIZE)
    return folder / "t000_masks.ome.tif"


@pytest.mark.parametrize("kind", ["cellpose", "seg", "rois", "zarr", "predict"])
def test_labels_of_every_program_become_a_labelled_frame(tmp_path: Path, image: Path, kind: str) -> None:
    data = tmp_path / "data"
    result = import_labels(Params(), [save(kind, tmp_path / kind, LABELS)], data, "e1", image)
    assert result.frames[0].changes == Changes(added=3, removed=0, changed=0, unchanged=0)
    assert result.warnings == ()
    (embryo,) = find_embryos(data)
    volume = read_labelled(embryo.labelled[0], Params().data)
    assert (embryo.name, embryo.labelled[0].frame) == ("e1", "t000")
    assert np.array_equal(volume.labels, LABELS)
    assert np.array_equal(volume.image, image_of(LABELS))
    assert volume.voxel_size == SIZE
    assert volume.unknown is None


def test_what_changed_is_counted_whatever_the_numbers() -> None:
    moved = balls((6, 12, 12), (6, 29, 14), (5, 5, 40))
    renumbered = np.array([0, 9, 4, 7], np.uint32)[moved]
    assert compare_labels(LABELS, renumbered) == Changes(added=1, removed=1, changed=1, unchanged=1)


def test_labels_that_are_there_are_replaced_only_when_told(tmp_path: Path, image: Path) -> None:
    data, target = tmp_path / "data", tmp_path / "data/e1/labels/t000.tif"
    import_labels(Params(), [save("predict", tmp_path / "a", LABELS)], data, "e1", image)
    before = target.read_bytes(), target.stat().st_mtime_ns
    corrected = [save("cellpose", tmp_path / "b", balls((6, 12, 12), (6, 28, 14)))]
    with pytest.raises(InputError, match=r"t000\.tif is there already.* 1 removed.*--overwrite") as caught:
        import_labels(Params(), corrected, data, "e1")
    assert "\n" not in str(caught.value)
    assert (target.read_bytes(), target.stat().st_mtime_ns) == before
    result = import_labels(Params(), corrected, data, "e1", overwrite=True)
    assert result.frames[0].changes == Changes(added=0, removed=1, changed=0, unchanged=2)
    assert read_labels(target).max() == 2
    # the same again is no change
    written = target.stat().st_mtime_ns
    assert not import_labels(Params(), corrected, data, "e1").frames[0].written
    assert target.stat().st_mtime_ns == written


def test_a_lone_image_of_the_data_set_does_not_take_labels_of_another_name(
    tmp_path: Path, image: Path
) -> None:
    data = tmp_path / "data"
    import_labels(Params(), [save("predict", tmp_path / "a", LABELS)], data, "e1", image)
    other = tmp_path / "t009.tif"
    write_labels(other, LABELS, SIZE)
    with pytest.raises(InputError, match="none is called 't009'"):
        import_labels(Params(), [other], data, "e1", overwrite=True)
    # named together they belong together
    assert import_labels(Params(), [other], data, "e2", image).frames[0].frame == "t000"


def test_all_files_come_or_none(tmp_path: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(image.with_name("t001.tif"), image_of(LABELS), SIZE)
    good = save("predict", tmp_path / "a", LABELS)
    bad = tmp_path / "a" / "t001_masks.tif"
    tifffile.imwrite(bad, LABELS[:, :-1].astype(np.uint16))
    with pytest.raises(InputError, match=r"t001_masks\.tif 12 x 39 x 48 .* expected the same"):
        import_labels(Params(), [good, bad], tmp_path / "data", "e1", image.parent)
    assert not (tmp_path / "data").exists()
    assert "copied from" not in capsys.readouterr().err
    import_labels(Params(), [good], tmp_path / "data", "e1", image)
    assert f"copied from {image}" in capsys.readouterr().err


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, Path]:
    """An image that takes more than a small disk, and labels of it that take less."""
    write_image(tmp_path / "t000.tif", image_of(np.tile(LABELS, (1, 3, 3))), SIZE)
    write_labels(tmp_path / "t000_masks.tif", np.tile(LABELS, (1, 3, 3)), SIZE)
    return tmp_path / "t000.tif", tmp_path / "t000_masks.tif"


def test_a_full_disk_leaves_nothing_half(tmp_path: Path, large: tuple[Path, Path], small_disk: None) -> None:
    with pytest.raises(MachineError, match=r"cannot write .*images/t000\.tif: .*; free some space"):
        import_labels(Params(), [large[1]], tmp_path / "data", "e1", large[0])
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_what_nobody_looked_at_is_kept_apart(tmp_path: Path, image: Path) -> None:
    partial = LABELS.astype(np.int16)
    partial[:, :, 24:] = -1
    tifffile.imwrite(tmp_path / "t000_masks.tif", partial)
    data, mask = tmp_path / "data", tmp_path / "data/e1/labels/t000_known.tif"
    result = import_labels(Params(), [tmp_path / "t000_masks.tif"], data, "e1", image)
    assert (result.frames[0].nuclei, result.frames[0].known_share) == (2, 0.5)
    unknown = read_labelled(find_embryos(data)[0].labelled[0], Params().data).unknown
    assert unknown is not None
    assert np.array_equal(unknown, partial == -1)
    # a mask beside the file counts as well, and goes where all is known at last
    again = import_labels(Params(), [data / "e1/labels/t000.tif"], data, "e2", image)
    assert again.frames[0].known_share == 0.5
    whole = [save("predict", tmp_path / "a", LABELS)]
    result = import_labels(Params(), whole, data, "e1", overwrite=True)
    assert result.frames[0].changes == Changes(added=1, removed=0, changed=0, unchanged=2)
    assert not mask.exists()


def test_labels_replace_those_of_the_frame_whatever_their_name(tmp_path: Path, image: Path) -> None:
    write_image(tmp_path / "data/e1/images/t000.tif", image_of(LABELS), SIZE)
    there = tmp_path / "data/e1/labels/t000_masks.tif"
    write_labels(there, balls((6, 12, 12)), SIZE)
    import_labels(Params(), [save("seg", tmp_path / "a", LABELS)], tmp_path / "data", "e1", overwrite=True)
    assert np.array_equal(read_labels(there), LABELS)
    assert [path.name for path in there.parent.iterdir()] == [there.name]


def test_a_time_lapse_becomes_frames(tmp_path: Path) -> None:
    film = np.stack([image_of(LABELS)] * 3)
    masks = np.stack([LABELS, np.zeros_like(LABELS), LABELS]).astype(np.uint16)
    size = {"axes": "TZYX", "spacing": 2.0, "unit": "um"}
    for name, array in (("film", film), ("film_masks", masks)):
        tifffile.imwrite(tmp_path / f"{name}.tif", array, imagej=True, resolution=(1, 1), metadata=size)
    data = tmp_path / "data"
    result = import_labels(Params(), [tmp_path / "film_masks.tif"], data, "e1", tmp_path / "film.tif")
    # nobody has labelled the one in between
    assert [frame.frame for frame in result.frames] == ["film_t000", "film_t002"]
    assert [frame.frame for frame in find_embryos(data)[0].labelled] == ["film_t000", "film_t002"]


def test_an_image_as_python_saves_it_is_copied_in_a_type_that_all_read(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "t000.tif", image_of(LABELS).astype(np.int64))
    params = load_params(None, ["data.voxel_size_um=[2,1,1]"])
    masks = [save("cellpose", tmp_path / "a", LABELS)]
    import_labels(params, masks, tmp_path / "data", "e1", tmp_path / "t000.tif")
    copied = tifffile.imread(tmp_path / "data/e1/images/t000.tif")
    assert copied.dtype == np.uint16
    assert np.array_equal(copied, image_of(LABELS))


def test_what_is_odd_is_said(tmp_path: Path, image: Path) -> None:
    odd = np.roll(LABELS, (0, 3, 0), axis=(0, 1, 2))
    result = import_labels(Params(), [save("predict", tmp_path / "a", odd)], tmp_path / "data", "e1", image)
    assert any("lie off the image by a constant" in words and "y +" in words for words in result.warnings)
    binary = (LABELS > 0).astype(np.uint32)
    result = import_labels(Params(), [save("rois", tmp_path / "b", binary)], tmp_path / "data", "e2", image)
    assert any("one label, 1, for everything" in words for words in result.warnings)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("t000.tif", image_of(LABELS), "these are intensities, not labels"),
        ("t000.tif", LABELS + np.float32(0.5), "expected whole numbers"),
        ("t009.tif", LABELS.astype(np.uint16), "none is called 't009'"),
    ],
)
def test_what_cannot_be_labels_is_refused(
    tmp_path: Path, image: Path, name: str, array: NDArray[np.generic], message: str
) -> None:
    # a second image: a lone one would belong to whatever name
    write_image(image.with_name("t001.tif"), image_of(LABELS), SIZE)
    (tmp_path / "a").mkdir()
    tifffile.imwrite(tmp_path / "a" / name, array)
    with pytest.raises(InputError, match=message):
        import_labels(Params(), [tmp_path / "a" / name], tmp_path / "data", "e1", image.parent)
    assert not list(tmp_path.glob("data/e1/labels/*"))


def test_another_voxel_size_is_refused_unless_given(tmp_path: Path, image: Path) -> None:
    write_labels(tmp_path / "t000_masks.tif", LABELS, VoxelSize(1.0, 1.0, 1.0))
    with pytest.raises(InputError, match=r"says voxels of 2 x 1 x 1 um .* 1 x 1 x 1 um"):
        import_labels(Params(), [tmp_path / "t000_masks.tif"], tmp_path / "data", "e1", image)
    params = load_params(None, ["data.voxel_size_um=[2,1,1]"])
    import_labels(params, [tmp_path / "t000_masks.tif"], tmp_path / "data", "e1", image)


def test_a_voxel_size_that_the_labels_alone_state_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tifffile.imwrite(tmp_path / "t000.tif", image_of(LABELS))
    labels = save("predict", tmp_path / "a", LABELS)
    import_labels(Params(), [labels], tmp_path / "data", "e1", tmp_path / "t000.tif")
    assert (
        f"t000.tif states no voxel size: 2 x 1 x 1 um (z, y, x) is that of {labels}"
        in capsys.readouterr().err
    )
    import_labels(Params(), [labels], tmp_path / "data", "e1", tmp_path / "t000.tif")
    assert "no voxel size" not in capsys.readouterr().err


@pytest.mark.parametrize("embryo", ["a/b", ".hidden", ".."])
def test_an_embryo_is_a_folder_of_the_data_set(tmp_path: Path, image: Path, embryo: str) -> None:
    with pytest.raises(InputError, match="no name for an embryo's folder"):
        import_labels(Params(), [save("predict", tmp_path / "a", LABELS)], tmp_path / "data", embryo, image)
