"""OME-Zarr is read in all current versions, by chunks, and written so that others accept it."""

from pathlib import Path
from typing import Any

import numpy as np
import ome_zarr_models
import pytest
import zarr
from numpy.typing import NDArray

from nuclei3d.errors import InputError
from nuclei3d.images.frames import find_frames, read_labels
from nuclei3d.images.ome_zarr import create_zarr, is_zarr
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.outputs import whole_folder

VOXEL = VoxelSize(2.0, 0.5, 0.25)


def ramp(*shape: int) -> NDArray[np.uint16]:
    return np.arange(int(np.prod(shape)), dtype=np.uint16).reshape(shape)


def write_image(
    path: Path,
    array: NDArray[Any],
    axes: str,
    version: str = "0.4",
    unit: str | None = "micrometer",
    channels: tuple[str, ...] = (),
    scale: tuple[float, float, float] = VOXEL.zyx,
) -> None:
    """Write an image with two levels as the specification says, without the code under test."""
    kinds = {"t": "time", "c": "channel"}
    named = [{"name": axis, "type": kinds.get(axis, "space")} for axis in axes]
    for axis in named:
        if axis["type"] == "space" and unit:
            axis["unit"] = unit
    per_axis = dict(zip("zyx", scale, strict=True))
    scales = [per_axis.get(axis, 1.0) for axis in axes]
    halves = [n * 2 if axis in "yx" else n for n, axis in zip(scales, axes, strict=True)]
    datasets = [
        {"path": name, "coordinateTransformations": [{"type": "scale", "scale": numbers}]}
        for name, numbers in (("full", scales), ("half", halves))
    ]
    content: dict[str, Any] = {"multiscales": [{"axes": named, "datasets": datasets, "name": "image"}]}
    if channels:
        content["omero"] = {"channels": [{"label": name} for name in channels]}
    zarr_format = 2 if version == "0.4" else 3
    if version == "0.4":
        content["multiscales"][0]["version"] = "0.4"
    else:
        content = {"ome": {"version": version, **content}}
    group = zarr.open_group(str(path), mode="w", zarr_format=zarr_format, attributes=content)
    for name, data in (("full", array), ("half", array[..., ::2, ::2])):
        made = group.create_array(
            name, shape=data.shape, dtype=data.dtype, chunks=(1,) * (data.ndim - 2) + (4, 4)
        )
        made[...] = data


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_full_resolution_and_scale_are_read(tmp_path: Path, version: str) -> None:
    image = ramp(3, 8, 6)
    write_image(tmp_path / "a.ome.zarr", image, "zyx", version)
    (frame,) = find_frames(tmp_path / "a.ome.zarr")
    assert frame.name == "a"
    assert frame.shape == (3, 8, 6)
    assert frame.voxel_size == VOXEL
    np.testing.assert_array_equal(frame.read(), image)
    box = (slice(1, 3), slice(3, 7), slice(0, 5))
    np.testing.assert_array_equal(frame.read_block(box), image[box])


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_time_and_channels_as_in_tiff(tmp_path: Path, version: str) -> None:
    movie = ramp(4, 2, 3, 8, 6)
    write_image(tmp_path / "a.zarr", movie, "tczyx", version, channels=("membrane", "H2B"))
    with pytest.raises(InputError, match=r"2 channels: 0 \(membrane\), 1 \(H2B\)"):
        find_frames(tmp_path / "a.zarr")
    frames = find_frames(tmp_path / "a.zarr", channel="H2B")
    assert [frame.name for frame in frames] == ["a_t000", "a_t001", "a_t002", "a_t003"]
    np.testing.assert_array_equal(frames[2].read(), movie[2, 1])


def test_units_are_converted_and_missing_units_are_no_scale(tmp_path: Path) -> None:
    write_image(tmp_path / "a.zarr", ramp(3, 8, 6), "zyx", unit="nanometer", scale=(2000.0, 500.0, 250.0))
    assert find_frames(tmp_path / "a.zarr")[0].voxel_size == VOXEL
    write_image(tmp_path / "b.zarr", ramp(3, 8, 6), "zyx", unit=None)
    (frame,) = find_frames(tmp_path / "b.zarr")
    with pytest.raises(InputError, match="axes have no unit of length"):
        frame.require_voxel_size()


def test_the_scale_of_all_levels_multiplies_that_of_the_first(tmp_path: Path) -> None:
    write_image(tmp_path / "a.zarr", ramp(3, 8, 6), "zyx", scale=(1.0, 1.0, 1.0))
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="r+")
    multiscales = list(group.attrs["multiscales"])
    multiscales[0]["coordinateTransformations"] = [{"type": "scale", "scale": list(VOXEL.zyx)}]
    group.attrs["multiscales"] = multiscales
    assert find_frames(tmp_path / "a.zarr")[0].voxel_size == VOXEL


@pytest.mark.parametrize(
    ("axes", "voxel_size"),
    [
        (["z", "y", "x"], None),
        ([{"name": "z"}, {"name": "y"}, {"name": "x"}], None),
        ([{"name": axis, "unit": "micrometer"} for axis in "zyx"], VOXEL),
    ],
)
def test_metadata_that_break_the_rules_are_read_as_far_as_they_go(tmp_path, axes, voxel_size):
    write_image(tmp_path / "a.zarr", ramp(3, 8, 6), "zyx")
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="r+")
    multiscales = list(group.attrs["multiscales"])
    multiscales[0]["axes"] = axes
    group.attrs["multiscales"] = multiscales
    group.attrs["omero"] = {"channels": [{"label": "H2B"}]}
    with pytest.raises(RuntimeError):
        ome_zarr_models.open_ome_zarr(group)
    (frame,) = find_frames(tmp_path / "a.zarr")
    assert frame.voxel_size == voxel_size
    np.testing.assert_array_equal(frame.read(), ramp(3, 8, 6))


def test_only_the_chunks_of_a_block_are_read(tmp_path: Path) -> None:
    image = ramp(3, 8, 8) + 1
    write_image(tmp_path / "a.zarr", image, "zyx", "0.5")
    for chunk in (tmp_path / "a.zarr" / "full" / "c" / "0").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"damaged")
    (frame,) = find_frames(tmp_path / "a.zarr")
    box = (slice(1, 3), slice(0, 8), slice(0, 8))
    np.testing.assert_array_equal(frame.read_block(box), image[box])
    with pytest.raises(InputError, match=r"a\.zarr is damaged"):
        frame.read()


def test_folders_may_mix_tiff_and_zarr(tmp_path: Path) -> None:
    from nuclei3d.images.tiff import write_image as write_tiff

    write_image(tmp_path / "t2.ome.zarr", ramp(3, 8, 6), "zyx")
    write_tiff(tmp_path / "t1.tif", ramp(3, 8, 6), VOXEL)
    assert [(frame.name, is_zarr(frame.path)) for frame in find_frames(tmp_path)] == [
        ("t1", False),
        ("t2", True),
    ]


def test_created_images_come_back_and_satisfy_the_specification(tmp_path: Path) -> None:
    image = ramp(5, 20, 30)
    array = create_zarr(tmp_path / "a.ome.zarr", image.shape, image.dtype, VOXEL, (2, 16, 64))
    assert array.chunks == (2, 16, 30)
    for z in range(0, 5, 2):
        array[z : z + 2] = image[z : z + 2]
    (frame,) = find_frames(tmp_path / "a.ome.zarr")
    assert (frame.shape, frame.voxel_size) == (image.shape, VOXEL)
    np.testing.assert_array_equal(frame.read(), image)
    model = ome_zarr_models.open_ome_zarr(zarr.open_group(str(tmp_path / "a.ome.zarr"), mode="r"))
    assert type(model).__name__ == "Image"
    assert model.ome_zarr_version == "0.5"


def test_created_labels_are_marked_as_labels(tmp_path: Path) -> None:
    create_zarr(tmp_path / "a.ome.zarr", (3, 8, 6), "uint32", VOXEL, (3, 8, 6), labels=True)[1, 2, 3] = 70000
    model = ome_zarr_models.open_ome_zarr(zarr.open_group(str(tmp_path / "a.ome.zarr"), mode="r"))
    assert type(model).__name__ == "ImageLabel"
    labels = read_labels(tmp_path / "a.ome.zarr")
    assert labels.dtype == np.uint32
    assert labels[1, 2, 3] == labels.max() == 70000


def test_labels_are_found_in_the_labels_group_of_an_image(tmp_path: Path) -> None:
    image, truth = ramp(3, 8, 6), ramp(3, 8, 6) % 5
    write_image(tmp_path / "a.zarr", image, "zyx", "0.5")
    group = zarr.open_group(str(tmp_path / "a.zarr" / "labels"), mode="w", zarr_format=3)
    group.attrs["ome"] = {"version": "0.5", "labels": ["nuclei"]}
    create_zarr(tmp_path / "a.zarr" / "labels" / "nuclei", (3, 8, 6), "uint16", VOXEL, (1, 8, 6))[...] = truth
    np.testing.assert_array_equal(read_labels(tmp_path / "a.zarr"), truth)
    np.testing.assert_array_equal(find_frames(tmp_path / "a.zarr")[0].read(), image)
    create_zarr(tmp_path / "a.zarr" / "labels" / "cells", (3, 8, 6), "uint16", VOXEL, (1, 8, 6))
    with pytest.raises(InputError, match="several label images: cells, nuclei"):
        read_labels(tmp_path / "a.zarr")


def test_one_image_of_bioformats2raw_is_stepped_into(tmp_path: Path) -> None:
    zarr.open_group(
        str(tmp_path / "a.zarr"), mode="w", zarr_format=2, attributes={"bioformats2raw.layout": 3}
    )
    write_image(tmp_path / "a.zarr" / "0", ramp(1, 1, 3, 8, 6), "tczyx")
    np.testing.assert_array_equal(find_frames(tmp_path / "a.zarr")[0].read(), ramp(3, 8, 6))
    write_image(tmp_path / "a.zarr" / "1", ramp(1, 1, 3, 8, 6), "tczyx")
    with pytest.raises(InputError, match="holds several images"):
        find_frames(tmp_path / "a.zarr")


def test_a_bare_array_is_a_volume_without_scale(tmp_path: Path) -> None:
    array = zarr.create_array(store=str(tmp_path / "a.zarr"), shape=(3, 8, 6), dtype="uint16")
    array[...] = ramp(3, 8, 6)
    (frame,) = find_frames(tmp_path / "a.zarr")
    assert frame.voxel_size is None
    np.testing.assert_array_equal(frame.read(), ramp(3, 8, 6))
    zarr.create_array(store=str(tmp_path / "b.zarr"), shape=(2, 3, 8, 6), dtype="uint16")
    with pytest.raises(InputError, match="4 axes without names"):
        find_frames(tmp_path / "b.zarr")


def test_foreign_and_broken_groups_are_one_clear_line(tmp_path: Path) -> None:
    zarr.open_group(str(tmp_path / "empty.zarr"), mode="w")
    with pytest.raises(InputError, match="no OME-Zarr image"):
        find_frames(tmp_path / "empty.zarr")
    write_image(tmp_path / "a.zarr", ramp(3, 8, 6), "zyx", "0.5")
    (tmp_path / "a.zarr" / "full" / "zarr.json").unlink()
    with pytest.raises(InputError, match="name no array that is there") as caught:
        find_frames(tmp_path / "a.zarr")
    assert "\n" not in str(caught.value)
    (tmp_path / "a.zarr" / "zarr.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as zarr"):
        find_frames(tmp_path / "a.zarr")


def test_an_unwritable_place_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        create_zarr(tmp_path / "file" / "a.zarr", (3, 8, 6), "uint16", VOXEL, (3, 8, 6))


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 60000, (4, 200, 200)).astype(np.uint16)

    def write() -> None:
        with whole_folder(tmp_path / "a.ome.zarr") as folder:
            create_zarr(folder, noise.shape, noise.dtype, VOXEL, (4, 200, 200))[...] = noise

    with pytest.raises(InputError, match=r"cannot write .*a\.ome\.zarr"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        with whole_folder(tmp_path / name) as folder:
            create_zarr(folder, (3, 8, 6), "uint16", VOXEL, (1, 8, 6))[...] = ramp(3, 8, 6)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append([(path.relative_to(tmp_path / name), path.read_bytes()) for path in files])
    assert contents[0] == contents[1]
