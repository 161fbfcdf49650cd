"""Frames come out of every kind of file with the right axes, type and scale; bad files in one clear line."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nuclei3d.errors import InputError, missing
from nuclei3d.images.embryos import find_embryos
from nuclei3d.images.frames import check_image, find_frames, read_labels
from nuclei3d.images.voxel_size import VoxelSize

SHAPE = (3, 5, 7)


def ramp(shape: tuple[int, ...] = SHAPE, dtype: str = "uint16") -> NDArray[Any]:
    return np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)


def write_imagej(path: Path, array: NDArray[Any], axes: str = "ZYX", unit: str = "um", **more: Any) -> None:
    metadata = {"axes": axes, "spacing": 2.0, "unit": unit}
    tifffile.imwrite(path, array, imagej=True, resolution=(4.0, 2.0), metadata=metadata, **more)


def write_ome(
    path: Path, array: NDArray[Any], axes: str = "ZYX", compression: str | None = None, **metadata: Any
) -> None:
    sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.0}
    tifffile.imwrite(
        path, array, ome=True, compression=compression, metadata={"axes": axes, **sizes, **metadata}
    )


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"]
)
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"bigtiff": True}, {"byteorder": ">"}])
def test_every_type_and_storage_gives_its_voxels_back(tmp_path, dtype, options):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, ramp(dtype=dtype), ome=True, metadata={"axes": "ZYX"}, **options)
    (frame,) = find_frames(path)
    assert frame.name == "a"
    assert frame.dtype == np.dtype(dtype)
    assert frame.read().dtype == np.dtype(dtype)
    np.testing.assert_array_equal(frame.read(), ramp(dtype=dtype))


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"compression": "lzw", "tile": (16, 16)}])
def test_a_block_is_that_part_of_the_volume(tmp_path: Path, options: dict[str, Any]) -> None:
    volume = ramp((6, 40, 33))
    tifffile.imwrite(tmp_path / "a.tif", volume, ome=True, metadata={"axes": "ZYX"}, **options)
    (frame,) = find_frames(tmp_path / "a.tif")
    box = (slice(1, 4), slice(7, 40), slice(0, 30))
    np.testing.assert_array_equal(frame.read_block(box), volume[box])
    assert frame.read_block((slice(2, 2), slice(None), slice(None))).shape == (0, 40, 33)


def test_a_block_of_a_compressed_file_decodes_its_own_planes_only(tmp_path, monkeypatch):
    write_ome(tmp_path / "a.tif", ramp((9, 8, 8)), compression="zlib")
    (frame,) = find_frames(tmp_path / "a.tif")
    decoded = []
    for kind in (tifffile.TiffPage, tifffile.TiffFrame):
        whole = kind.asarray

        def count(page: Any, *args: Any, whole: Any = whole, **more: Any) -> Any:
            decoded.append(page.index)
            return whole(page, *args, **more)

        monkeypatch.setattr(kind, "asarray", count)
    frame.read_block((slice(3, 5), slice(None), slice(None)))
    assert sorted(set(decoded)) == [3, 4]


def test_a_block_of_a_huge_file_is_mapped_not_read(tmp_path: Path) -> None:
    # 6.4 GB that take almost nothing on disk: a sparse BigTIFF
    mapped = tifffile.memmap(
        tmp_path / "huge.tif", shape=(800, 2000, 2000), dtype="uint16", bigtiff=True, metadata={"axes": "ZYX"}
    )
    mapped[777, 1999, 1998] = 5
    mapped.flush()
    del mapped
    (frame,) = find_frames(tmp_path / "huge.tif")
    assert frame.shape == (800, 2000, 2000)
    block = frame.read_block((slice(776, 779), slice(1998, 2000), slice(1996, 2000)))
    assert (block[1, 1, 2], block.sum()) == (5, 5)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_time_axis_gives_one_frame_per_time_point(tmp_path: Path, compression: str | None) -> None:
    movie = ramp((12, 3, 5, 7))
    tifffile.imwrite(
        tmp_path / "movie.ome.tif", movie, ome=True, metadata={"axes": "TZYX"}, compression=compression
    )
    frames = find_frames(tmp_path / "movie.ome.tif")
    assert [frame.time for frame in frames] == list(range(12))
    assert [frame.name for frame in frames][:2] == ["movie_t000", "movie_t001"]
    np.testing.assert_array_equal(frames[7].read(), movie[7])


def test_imagej_hyperstacks_with_time_and_channels(tmp_path: Path) -> None:
    stack = ramp((4, 3, 2, 5, 7))
    write_imagej(tmp_path / "a.tif", stack, "TZCYX")
    with pytest.raises(InputError, match="2 channels: 0, 1; choose one"):
        find_frames(tmp_path / "a.tif")
    frames = find_frames(tmp_path / "a.tif", channel=1)
    assert len(frames) == 4
    np.testing.assert_array_equal(frames[2].read(), stack[2, :, 1])


def test_channels_are_chosen_by_name_or_number(tmp_path: Path) -> None:
    stack = ramp((2, 3, 5, 7))
    write_ome(tmp_path / "a.ome.tif", stack, "CZYX", Channel={"Name": ["membrane", "H2B"]})
    for channel in ("H2B", "h2b", 1, "1"):
        (frame,) = find_frames(tmp_path / "a.ome.tif", channel=channel)
        np.testing.assert_array_equal(frame.read(), stack[1])
    with pytest.raises(InputError, match=r"0 \(membrane\), 1 \(H2B\)"):
        find_frames(tmp_path / "a.ome.tif")
    for wrong in ("DAPI", 2, -1):
        with pytest.raises(InputError, match=r"none of its channels: 0 \(membrane\)"):
            find_frames(tmp_path / "a.ome.tif", channel=wrong)


def test_colours_are_channels(tmp_path: Path) -> None:
    stack = ramp((3, 5, 7, 3), "uint8")
    tifffile.imwrite(tmp_path / "rgb.tif", stack, photometric="rgb")
    with pytest.raises(InputError, match=r"0 \(red\), 1 \(green\), 2 \(blue\)"):
        find_frames(tmp_path / "rgb.tif")
    (frame,) = find_frames(tmp_path / "rgb.tif", channel="green")
    np.testing.assert_array_equal(frame.read(), stack[..., 1])


def test_singleton_axes_drop(tmp_path: Path) -> None:
    write_imagej(tmp_path / "a.tif", ramp((1, 3, 1, 5, 7)), "TZCYX")
    write_ome(tmp_path / "b.tif", ramp((1, 1, 3, 5, 7)), "TCZYX")
    for frame in find_frames(tmp_path):
        assert frame.time is None
        np.testing.assert_array_equal(frame.read(), ramp())


def test_a_plain_stack_of_pages_is_a_volume(tmp_path: Path) -> None:
    volume = ramp((6, 5, 7))
    with tifffile.TiffWriter(tmp_path / "plain.tif") as writer:
        for plane in volume:
            writer.write(plane, metadata=None, contiguous=False)
    tifffile.imwrite(tmp_path / "shaped.tif", volume)
    for frame in find_frames(tmp_path):
        np.testing.assert_array_equal(frame.read(), volume)
        assert frame.voxel_size is None


@pytest.mark.parametrize(
    ("unit", "micrometres"),
    [("um", 1), ("micron", 1), ("\\u00B5m", 1), ("microns", 1), ("nm", 1e-3), ("mm", 1e3)],
)
def test_imagej_scales_become_micrometres(tmp_path: Path, unit: str, micrometres: float) -> None:
    path = tmp_path / "a.tif"
    spacing, per_pixel = 2.0 / micrometres, 1 / micrometres
    metadata = {"axes": "ZYX", "spacing": spacing, "unit": unit}
    tifffile.imwrite(path, ramp(), imagej=True, resolution=(4 / per_pixel, 2 / per_pixel), metadata=metadata)
    (frame,) = find_frames(path)
    assert frame.require_voxel_size().zyx == pytest.approx((2.0, 0.5, 0.25), rel=1e-6)


@pytest.mark.parametrize(("unit", "micrometres"), [("CENTIMETER", 1e4), ("INCH", 25400.0)])
def test_resolution_tags_count_where_imagej_names_no_unit(tmp_path, unit, micrometres):
    path = tmp_path / "a.tif"
    metadata = {"axes": "ZYX", "spacing": 2.0 / micrometres}
    resolution = (4 * micrometres, 2 * micrometres)
    tifffile.imwrite(path, ramp(), imagej=True, resolution=resolution, resolutionunit=unit, metadata=metadata)
    (frame,) = find_frames(path)
    assert frame.require_voxel_size().zyx == pytest.approx((2.0, 0.5, 0.25), rel=1e-5)


def test_ome_scales_become_micrometres(tmp_path: Path) -> None:
    sizes = {
        "PhysicalSizeX": 250,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.0005,
        "PhysicalSizeYUnit": "mm",
    }
    write_ome(tmp_path / "a.ome.tif", ramp(), **sizes)
    (frame,) = find_frames(tmp_path / "a.ome.tif")
    assert frame.require_voxel_size().zyx == pytest.approx((2.0, 0.5, 0.25))


def test_the_real_embryos_state_their_scale(bbbc050: Path) -> None:
    (frame,) = find_frames(bbbc050 / "Emb01" / "images" / "t001.tif")
    assert frame.require_voxel_size().zyx == pytest.approx((1.75, 0.8, 0.8))
    assert frame.shape == (51, 124, 127)
    np.testing.assert_array_equal(frame.read(), tifffile.imread(frame.path))
    labels = read_labels(bbbc050 / "Emb01" / "labels" / "t501.tif")
    np.testing.assert_array_equal(labels, tifffile.imread(bbbc050 / "Emb01" / "labels" / "t501.tif"))


def test_a_real_embryo_stripped_of_its_scale_says_how_to_give_it(bbbc050: Path, tmp_path: Path) -> None:
    volume = tifffile.imread(bbbc050 / "Emb01" / "images" / "t001.tif")
    tifffile.imwrite(tmp_path / "bare.tif", volume)
    (frame,) = find_frames(tmp_path / "bare.tif")
    assert frame.voxel_size is None
    with pytest.raises(InputError, match=r"bare\.tif does not state its voxel size.*data\.voxel_size_um="):
        frame.require_voxel_size()


HALF = {"resolution": (4, 4), "metadata": {"axes": "ZYX", "unit": "um"}}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda path: tifffile.imwrite(path, ramp(), imagej=True, **HALF),
            r"y = 0\.25 um, x = 0\.25 um, but not the spacing of z",
        ),
        (lambda path: write_imagej(path, ramp(), unit="pixel"), "its unit is 'pixel'"),
        (lambda path: write_imagej(path, ramp(), unit="pixels"), "its unit is 'pixels'"),
        (lambda path: write_ome(path, ramp(), PhysicalSizeZ=2.0, PhysicalSizeZUnit="m"), "cannot be"),
    ],
)
def test_half_a_scale_pixels_and_impossible_scales_are_none(tmp_path: Path, write: Any, message: str) -> None:
    write(tmp_path / "a.tif")
    (frame,) = find_frames(tmp_path / "a.tif")
    with pytest.raises(InputError, match=message):
        frame.require_voxel_size()


def test_a_given_voxel_size_wins_and_the_user_is_told_once(tmp_path, capsys):
    for name in ("a", "b"):
        write_ome(tmp_path / f"{name}.tif", ramp())
    given = VoxelSize(1.0, 0.3, 0.3)
    frames = find_frames(tmp_path, voxel_size=given)
    assert {frame.voxel_size for frame in frames} == {given}
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "2 x 0.5 x 0.25 um" in told
    assert "1 x 0.3 x 0.3 um" in told
    find_frames(tmp_path / "b.tif", voxel_size=given)
    find_frames(tmp_path, voxel_size=VoxelSize(2.0, 0.5, 0.25))
    assert capsys.readouterr().err == ""


def test_folders_are_listed_in_natural_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("t10.tif", "t2.tif", "t1.ome.tif", "T3.TIFF", "._t2.tif"):
        write_ome(tmp_path / name, ramp())
    (tmp_path / "notes.txt").write_text("")
    assert [frame.name for frame in find_frames(tmp_path)] == ["t1", "t2", "T3", "t10"]


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    write_ome(tmp_path / "a.tif", ramp())
    write_ome(tmp_path / "a.ome.tif", ramp())
    with pytest.raises(InputError, match="outputs of the same name"):
        find_frames(tmp_path)


def test_a_frame_is_cheap_to_print_and_can_be_sent_to_another_process(tmp_path: Path) -> None:
    write_ome(tmp_path / "a.tif", ramp())
    (frame,) = find_frames(tmp_path)
    assert repr(frame) == "Frame('a', 3 x 5 x 7 uint16, 2 x 0.5 x 0.25 um (z, y, x))"
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(frame)).read(), ramp())


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("kind", ["imagej", "ome", "zlib", "plain"])
def test_a_truncated_file_is_one_clear_line(tmp_path: Path, kind: str, kept: float) -> None:
    volume = np.random.default_rng(0).integers(0, 60000, (8, 32, 32)).astype(np.uint16)
    path = tmp_path / "a.tif"
    if kind == "imagej":
        write_imagej(path, volume)
    elif kind == "plain":
        with tifffile.TiffWriter(path) as writer:
            for plane in volume:
                writer.write(plane, metadata=None, contiguous=False)
    else:
        tifffile.imwrite(path, volume, ome=True, compression="zlib" if kind == "zlib" else None)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=r"a\.tif is damaged or truncated") as caught:
        find_frames(path)[0].read()
    assert "\n" not in str(caught.value)


def test_a_file_cut_behind_its_data_does_not_lose_its_scale_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_ome(path, ramp((8, 32, 32)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"a\.tif is damaged or truncated"):
        find_frames(path)


def test_damage_within_the_data_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_ome(path, ramp((8, 32, 32)), compression="zlib")
    with tifffile.TiffFile(path) as file:
        offset = file.pages[3].dataoffsets[0]
    content = bytearray(path.read_bytes())
    content[offset : offset + 20] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.tif is damaged"):
        find_frames(path)[0].read()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    compression=st.sampled_from([None, "zlib"]),
    place=st.integers(0, 4000),
    value=st.integers(0, 255),
    cut=st.one_of(st.none(), st.integers(1, 4000)),
)
def test_any_damage_gives_a_volume_or_one_clear_line(tmp_path, compression, place, value, cut):
    path = tmp_path / "a.tif"
    write_ome(path, ramp((4, 16, 16)), compression=compression)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content if cut is None else content[:cut])
    complaint = None
    try:
        volume = find_frames(path)[0].read()
    except InputError as error:
        complaint = str(error)
    if complaint is None:
        assert volume.ndim == 3
    else:
        assert "\n" not in complaint
        assert "a.tif" in complaint


def test_missing_empty_and_foreign_files_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty.tif").write_bytes(b"")
    (tmp_path / "text.tif").write_text("no picture")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"nowhere\.tif does not exist"):
        find_frames(tmp_path / "nowhere.tif")
    with pytest.raises(InputError, match=r"empty\.tif is empty"):
        find_frames(tmp_path / "empty.tif")
    with pytest.raises(InputError, match=r"text\.tif is not a TIFF file"):
        find_frames(tmp_path / "text.tif")
    with pytest.raises(InputError, match=r"folder holds no \.tif"):
        find_frames(tmp_path / "folder")


@pytest.mark.parametrize(
    ("shape", "axes", "hint"),
    [
        ((5, 7), "YX", "give a 3D stack"),
        ((4, 5, 7), "TYX", "time axis is really z"),
        ((4, 5, 7), "CYX", "channels"),
    ],
)
def test_flat_images_are_refused(tmp_path: Path, shape: tuple[int, ...], axes: str, hint: str) -> None:
    write_ome(tmp_path / "flat.tif", ramp(shape), axes)
    with pytest.raises(InputError, match=f"flat.tif is no volume.*{hint}"):
        find_frames(tmp_path / "flat.tif")


def test_axes_without_meaning_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "odd.tif", ramp((2, 6, 8, 5)))
    with pytest.raises(InputError, match="axes of unknown meaning"):
        find_frames(tmp_path / "odd.tif")


def test_several_images_in_one_file_are_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "two.ome.tif", ome=True) as writer:
        writer.write(ramp(), metadata={"axes": "ZYX"})
        writer.write(ramp((4, 5, 7)), metadata={"axes": "ZYX"})
    with pytest.raises(InputError, match="holds 2 images"):
        find_frames(tmp_path / "two.ome.tif")


def write_ome_set(folder: Path, movie: NDArray[Any]) -> None:
    """Write one file per time point whose OME-XML names all of them, as microscopes do."""
    names = [f"set_{time}.ome.tif" for time in range(len(movie))]
    uuids = [f"0000000{time}-0000-4000-8000-000000000000" for time in range(len(movie))]
    _, depth, height, width = movie.shape
    data = "".join(
        f'<TiffData FirstT="{t}" FirstZ="{z}" IFD="{z}" PlaneCount="1"><UUID FileName="{names[t]}">'
        f"urn:uuid:{uuids[t]}</UUID></TiffData>"
        for t in range(len(movie))
        for z in range(depth)
    )
    for t, volume in enumerate(movie):
        xml = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{uuids[t]}">'
            f'<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="{width}" '
            f'SizeY="{height}" SizeZ="{depth}" SizeC="1" SizeT="{len(movie)}" PhysicalSizeX="0.25" '
            f'PhysicalSizeY="0.5" PhysicalSizeZ="2"><Channel ID="Channel:0:0"/>{data}</Pixels></Image></OME>'
        )
        with tifffile.TiffWriter(folder / names[t]) as writer:
            for z, plane in enumerate(volume):
                writer.write(plane, description=xml if z == 0 else None, metadata=None, contiguous=False)


def test_files_of_a_multi_file_ome_tiff_are_one_movie(tmp_path: Path) -> None:
    movie = ramp((3, 4, 5, 7))
    write_ome_set(tmp_path, movie)
    frames = find_frames(tmp_path)
    assert [frame.time for frame in frames] == [0, 1, 2]
    for frame, volume in zip(frames, movie, strict=True):
        np.testing.assert_array_equal(frame.read(), volume)
    (tmp_path / "set_1.ome.tif").unlink()
    with pytest.raises(InputError, match="plane 4 is not in this file; put the other files"):
        find_frames(tmp_path)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "int32"])
def test_labels_of_any_integer_type_become_uint32(tmp_path: Path, dtype: str) -> None:
    write_ome(tmp_path / "a.tif", ramp(dtype=dtype))
    labels = read_labels(tmp_path / "a.tif")
    assert labels.dtype == np.uint32
    np.testing.assert_array_equal(labels, ramp())


def test_float_and_negative_labels_are_refused(tmp_path: Path) -> None:
    write_imagej(tmp_path / "float.tif", ramp(dtype="float32"))
    write_ome(tmp_path / "negative.tif", ramp(dtype="int16") - 1)
    with pytest.raises(InputError, match=r"float\.tif holds float32 values where labels"):
        read_labels(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"negative\.tif holds the negative label -1"):
        read_labels(tmp_path / "negative.tif")


def test_a_movie_is_no_label_volume(tmp_path: Path) -> None:
    write_ome(tmp_path / "a.tif", ramp((2, *SHAPE)), "TZYX")
    with pytest.raises(InputError, match="holds 2 frames"):
        read_labels(tmp_path / "a.tif")


def test_images_must_be_volumes_of_numbers() -> None:
    image = ramp(dtype="float32")
    check_image(image, "a.tif")
    for fill in (np.nan, np.inf):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), constant_values=fill)
        check_image(padded, "a.tif")
        with pytest.raises(InputError, match=r"a\.tif holds no finite number; NaN may stand around an image"):
            check_image(np.full_like(image, fill), "a.tif")
        check_image(np.full_like(image, fill), "a.tif", part=True)
    with pytest.raises(InputError, match=r"no volume \(shape 5 x 7\)"):
        check_image(image[0], "a.tif")
    with pytest.raises(InputError, match="complex"):
        check_image(image.astype(complex), "a.tif")


@pytest.mark.parametrize(
    ("read", "path"),
    [
        (find_embryos, "data"),
        (find_frames, "data/embryo_c/images"),
        (find_frames, "data/embryo_c/images/t000.tif"),
    ],
)
def test_what_is_still_in_dvc_says_how_to_get_it(tmp_path, monkeypatch, read, path):
    (tmp_path / "data.dvc").write_text("outs: []")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as raised:
        read(path)
    assert str(raised.value) == f"{path} is tracked by DVC but not here yet; get it with: dvc pull data.dvc"


def test_a_wrong_name_in_a_folder_that_was_fetched_is_just_missing(tmp_path):
    (tmp_path / "data.dvc").write_text("outs: []")
    (tmp_path / "data").mkdir()
    assert str(missing(tmp_path / "data" / "embryo_z", "no embryo_z")) == "no embryo_z"
