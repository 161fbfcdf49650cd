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
    path: Path,
    array: NDArray[Any],
    axes: str = "ZYX",
    compression: str | None = None,
    bigtiff: bool = False,
    **metadata: Any,
) -> None:
    sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.0}
    metadata = {"axes": axes, **sizes, **metadata}
    tifffile.imwrite(path, array, ome=True, compression=compression, bigtiff=bigtiff, metadata=metadata)


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
    with pytest.raises(InputError, match=r"folder holds no \.tif.*; give a folder that does"):
        find_frames(tmp_path / "folder")
    for place, meant in {"b/b10": "b/b10", "a": "a", "a/images": "a/images"}.items():
        tifffile.imwrite(made(tmp_path / "folder" / place) / "t0.tif", np.zeros((3, 8, 8), np.uint8))
        with pytest.raises(InputError, match=rf"folder holds no \.tif.*; did you mean .*/folder/{meant}\?"):
            find_frames(tmp_path / "folder")


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


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


def write_series(path: Path, **more: Any) -> None:
    """Write an image of other scale and channels before each of two volumes, and a picture of the slide."""
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(ramp((9, 9, 3), "uint8"), photometric="rgb", metadata={"axes": "YXS", "Name": "macro"})
        for name, z, scale in (("overview", 4, 10.0), ("embryo", 3, 0.25), *more.get("others", ())):
            metadata = {
                "axes": "CZYX",
                "Name": name,
                "PhysicalSizeX": scale,
                "PhysicalSizeY": scale,
                "PhysicalSizeZ": 8 * scale,
                "Channel": {"Name": [f"{name} A", f"{name} B"]},
            }
            writer.write(ramp((2, z, 5, 7)) + z, metadata=metadata)


def test_scale_and_channels_are_those_of_the_image_that_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_series(tmp_path / "a.ome.tif")
    (frame,) = find_frames(tmp_path / "a.ome.tif", channel="embryo B")
    np.testing.assert_array_equal(frame.read(), (ramp((2, 3, 5, 7)) + 3)[1])
    assert frame.require_voxel_size().zyx == pytest.approx((2.0, 0.25, 0.25))
    said = capsys.readouterr().err
    assert "2 passed over: 0 (macro, 9 x 9 x 3), 1 (overview, 2 x 4 x 5 x 7)" in said
    (frame,) = find_frames(tmp_path / "a.ome.tif", channel="overview A", image=1)
    assert frame.require_voxel_size().zyx == pytest.approx((80.0, 10.0, 10.0))
    assert pickle.loads(pickle.dumps(frame)).read().shape == (4, 5, 7)


def test_of_several_images_one_is_chosen(tmp_path: Path) -> None:
    write_series(tmp_path / "two.ome.tif", others=[("embryo 2", 6, 0.5)])
    with pytest.raises(
        InputError, match=r"2 images: .*2 \(embryo, 2 x 3 x 5 x 7\), 3 \(embryo 2.*data\.image"
    ):
        find_frames(tmp_path / "two.ome.tif", channel=0)
    for image in (3, "3", "Embryo 2"):
        (frame,) = find_frames(tmp_path / "two.ome.tif", channel=0, image=image)
        assert (frame.shape, frame.require_voxel_size().x) == ((6, 5, 7), 0.5)
    for wrong in (4, "embryo 3", -1):
        with pytest.raises(InputError, match=f"image '{wrong}' is none of its images: 0 "):
            find_frames(tmp_path / "two.ome.tif", channel=0, image=wrong)


@pytest.mark.parametrize("planes", [3, 4])
def test_three_or_four_planes_are_a_stack_not_colours(tmp_path: Path, planes: int) -> None:
    stack = ramp((planes, 20, 30), "uint8")
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="rgb", planarconfig="separate")
    (frame,) = find_frames(tmp_path / "a.tif")
    np.testing.assert_array_equal(frame.read(), stack)


def test_flat_pictures_in_a_folder_are_passed_over_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ome(tmp_path / "t0.tif", ramp())
    tifffile.imwrite(tmp_path / "preview.tif", ramp((5, 7)))
    tifffile.imwrite(tmp_path / "preview_rgb.tif", ramp((5, 7, 3), "uint8"), photometric="rgb")
    assert [frame.name for frame in find_frames(tmp_path)] == ["t0"]
    assert "2 passed over: preview.tif, preview_rgb.tif (flat images)" in capsys.readouterr().err
    (tmp_path / "t0.tif").unlink()
    with pytest.raises(InputError, match=r"preview\.tif is no volume"):
        find_frames(tmp_path)


def test_links_work_and_dangling_ones_and_other_formats_are_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "folder"
    cache.mkdir()
    folder.mkdir()
    write_ome(cache / "md5.tif", ramp())
    (cache / "md5.tif").rename(cache / "4fd1")
    (folder / "t0.tif").symlink_to(cache / "4fd1")
    (folder / "t1.tif").symlink_to(cache / "gone")
    (folder / "t2.png").write_bytes(b"")
    (folder / "notes.csv").write_bytes(b"")
    (tmp_path / "linked").symlink_to(folder)
    (frame,) = find_frames(folder)
    np.testing.assert_array_equal(frame.read(), ramp())
    assert find_frames(folder)[0].name == "t0"
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    assert "1 passed over: t1.tif (links to what is not there)" in said
    assert "1 passed over: t2.png (no .tif, .tiff or .zarr)" in said
    assert [frame.name for frame in find_frames(tmp_path / "linked")] == ["t0"]
    with pytest.raises(InputError, match=r"t1\.tif is a link to .*gone, which is not there"):
        find_frames(folder / "t1.tif")


def test_big_tiff_and_its_suffix(tmp_path: Path) -> None:
    write_ome(tmp_path / "a.ome.btf", ramp(), bigtiff=True)
    (frame,) = find_frames(tmp_path)
    assert (frame.name, frame.require_voxel_size().z) == ("a", 2.0)


def write_lsm(path: Path, movie: NDArray[np.uint16], names: list[str], compression: str | None) -> None:
    """Write (T, Z, C, Y, X) as Zeiss does: a page a plane, channels apart, then a small picture."""
    times, depth, channels, height, width = movie.shape
    info = np.zeros(1, tifffile.TIFF.CZ_LSMINFO)
    sizes = {"DimensionX": width, "DimensionY": height, "DimensionZ": depth}
    sizes |= {"DimensionChannels": channels, "DimensionTime": times, "ScanType": 6}
    # metres and seconds
    scale = {"VoxelSizeX": 0.25e-6, "VoxelSizeY": 0.5e-6, "VoxelSizeZ": 2e-6, "TimeIntervall": 90.0}
    head = {"MagicNumber": 67127628, "StructureSize": info.itemsize}
    for name, value in (head | sizes | scale).items():
        info[name] = value
    with tifffile.TiffWriter(path, byteorder="<") as writer:
        for t, z in np.ndindex(times, depth):
            more = {"extratags": [(34412, 1, info.itemsize, info.tobytes(), True)]} if t == z == 0 else {}
            options = {"planarconfig": "separate", "photometric": "minisblack", "metadata": None}
            writer.write(movie[t, z], compression=compression, rowsperstrip=4, **options, **more)
            writer.write(movie[t, z, :, :2, :2], subfiletype=1, **options)
    colours = bytes(4 * channels)
    listed = b"".join(len(name + "0").to_bytes(4, "little") + name.encode() + b"\0" for name in names)
    end, data = path.stat().st_size, bytearray(path.read_bytes())
    at = data.index(info.tobytes()) + info.dtype.fields["OffsetChannelColors"][1]
    data[at : at + 4] = end.to_bytes(4, "little")
    header = [24 + len(colours) + len(listed), channels, channels, 24, 24 + len(colours), 0]
    path.write_bytes(bytes(data) + np.array(header, "<u4").tobytes() + colours + listed)


@pytest.mark.parametrize("compression", [None, "lzw"])
def test_a_zeiss_lsm_has_its_scale_channels_and_times(tmp_path: Path, compression: str | None) -> None:
    movie = ramp((2, 3, 3, 8, 9))
    write_lsm(tmp_path / "a.lsm", movie, ["DAPI", "mCherry", "Cy5"], compression)
    frames = find_frames(tmp_path / "a.lsm", channel="mcherry")
    assert [frame.name for frame in frames] == ["a_t000", "a_t001"]
    assert frames[0].require_voxel_size().zyx == pytest.approx((2.0, 0.5, 0.25))
    assert frames[0].time_step_s == 90
    np.testing.assert_array_equal(frames[1].read(), movie[1, :, 1])
    box = np.s_[1:3, 5:8, 2:7]
    np.testing.assert_array_equal(frames[1].read_block(box), movie[1, :, 1][box])
    with pytest.raises(InputError, match=r"3 channels: 0 \(DAPI\), 1 \(mCherry\), 2 \(Cy5\)"):
        find_frames(tmp_path / "a.lsm")


@pytest.mark.parametrize("unit", [None, "min"])
def test_the_time_step_is_read(tmp_path: Path, unit: str | None) -> None:
    movie = ramp((4, *SHAPE))
    more = {"TimeIncrementUnit": unit} if unit else {}
    write_ome(tmp_path / "a.ome.tif", movie, "TZYX", TimeIncrement=2.5, **more)
    assert find_frames(tmp_path / "a.ome.tif")[3].time_step_s == (150.0 if unit else 2.5)
    write_imagej(tmp_path / "b.tif", movie, "TZYX")
    assert find_frames(tmp_path / "b.tif")[0].time_step_s is None
    metadata = {"axes": "TZYX", "finterval": 600.0}
    tifffile.imwrite(tmp_path / "c.tif", movie, imagej=True, metadata=metadata)
    assert find_frames(tmp_path / "c.tif")[0].time_step_s == 600.0


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


def test_float_labels_that_their_type_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    labels = np.zeros((4, 8, 8), np.float32)
    labels[1], labels[2] = 2**24 + 3, 2**24 + 4  # the same number
    tifffile.imwrite(tmp_path / "float.tif", labels, metadata={"axes": "ZYX"})
    with pytest.raises(InputError, match=r"float\.tif holds labels above 16777216 as float32"):
        read_labels(tmp_path / "float.tif")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_whole_float_labels_are_read(tmp_path: Path, dtype: str) -> None:
    labels = ramp(dtype=dtype)
    labels[2] = 2**24 if dtype == "float32" else 2**32 - 1
    tifffile.imwrite(tmp_path / "a.tif", labels, metadata={"axes": "ZYX"})
    found = read_labels(tmp_path / "a.tif")
    assert found.dtype == np.uint32
    np.testing.assert_array_equal(found, labels)


def test_broken_and_negative_labels_are_refused(tmp_path: Path) -> None:
    write_ome(tmp_path / "negative.tif", ramp(dtype="int16") - 1)
    for value, shown in ((1.5, "1.5"), (np.nan, "nan"), (np.inf, "inf")):
        labels = ramp(dtype="float32")
        labels[1, 2, 3] = value
        write_imagej(tmp_path / "float.tif", labels)
        with pytest.raises(InputError, match=rf"float\.tif holds float32 values such as {shown} "):
            read_labels(tmp_path / "float.tif")
    tifffile.imwrite(tmp_path / "large.tif", np.full(SHAPE, 2.0**32), metadata={"axes": "ZYX"})
    with pytest.raises(InputError, match=r"at most 2\*\*32 - 1"):
        read_labels(tmp_path / "large.tif")
    with pytest.raises(InputError, match=r"negative\.tif holds the negative label -1"):
        read_labels(tmp_path / "negative.tif")


def test_coloured_labels_get_advice_that_can_be_followed(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "rgb.tif", ramp((3, 5, 7, 3), "uint8"), photometric="rgb")
    with pytest.raises(InputError, match=r"rgb\.tif is a picture in colours .*napari: File > Save") as caught:
        read_labels(tmp_path / "rgb.tif")
    assert "data.channel" not in str(caught.value)


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
