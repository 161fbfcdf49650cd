"""Written files have the same bytes each time and the right scale in every reader."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from nuclei3d.errors import InputError
from nuclei3d.images import tiff
from nuclei3d.images.frames import find_frames, read_labels
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize

VOXEL = VoxelSize(2.0, 0.348, 0.174)


def labels(dtype: str = "uint32", highest: int = 700) -> np.ndarray[Any, np.dtype[Any]]:
    return np.random.default_rng(0).integers(0, highest, (4, 9, 8)).astype(dtype)


def ome_pixels(path: Path) -> ElementTree.Element:
    with tifffile.TiffFile(path) as file:
        assert file.ome_metadata is not None
        pixels = ElementTree.fromstring(file.ome_metadata).find("{*}Image/{*}Pixels")
    assert pixels is not None
    return pixels


def test_ome_metadata_hold_sizes_and_units(tmp_path: Path) -> None:
    write_labels(tmp_path / "a_masks.ome.tif", labels(), VOXEL)
    pixels = ome_pixels(tmp_path / "a_masks.ome.tif")
    assert [float(pixels.attrib[f"PhysicalSize{axis}"]) for axis in "ZYX"] == [2.0, 0.348, 0.174]
    assert {pixels.attrib[f"PhysicalSize{axis}Unit"] for axis in "ZYX"} == {"µm"}
    assert [int(pixels.attrib[f"Size{axis}"]) for axis in "TCZYX"] == [1, 1, 4, 9, 8]


def test_the_file_is_valid_ome_by_the_schema_names_of_its_parts(tmp_path: Path) -> None:
    write_labels(tmp_path / "a.tif", labels(), VOXEL)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.is_ome
        assert [(series.kind, series.axes, series.shape) for series in file.series] == [
            ("ome", "ZYX", (4, 9, 8))
        ]
        assert file.pages.first.description.startswith("<?xml")


def test_imagejs_own_reader_finds_the_scale_too(tmp_path: Path) -> None:
    # ImageJ takes spacing and unit from the description that starts with "ImageJ=", which overrides an
    # earlier one, and pixels per unit from the resolution tags (seen with ImageJ 1.52i on such a file).
    write_image(tmp_path / "a.tif", labels("uint16"), VOXEL)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        page = file.pages.first
        assert page.description1.startswith("ImageJ=")
        described = file.imagej_metadata
        assert described is not None
        assert (described["spacing"], described["unit"], described["slices"]) == (2.0, "micron", 4)
        for name, edge in (("XResolution", 0.174), ("YResolution", 0.348)):
            pixels, microns = page.tags[name].value
            assert microns / pixels == pytest.approx(edge)
        # ImageJ misreads a predictor on 16 bits and knows none on floats
        assert page.predictor == 1


def test_labels_take_16_bits_where_they_fit(tmp_path: Path) -> None:
    for highest, dtype in ((65535, "uint16"), (65536, "uint32")):
        volume = np.zeros((2, 4, 4), np.int64)
        volume[1, 2, 3] = highest
        write_labels(tmp_path / "a.tif", volume, VOXEL)
        assert tifffile.imread(tmp_path / "a.tif").dtype == dtype
        np.testing.assert_array_equal(read_labels(tmp_path / "a.tif"), volume)


def test_labels_are_compressed(tmp_path: Path) -> None:
    write_labels(tmp_path / "a.tif", np.zeros((20, 100, 100), np.uint16), VOXEL)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.pages.first.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
    assert (tmp_path / "a.tif").stat().st_size < 20 * 100 * 100 * 2 / 10


def test_bytes_are_the_same_each_time_and_differ_with_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_labels(tmp_path / name, labels(), VOXEL)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    write_labels(tmp_path / "other", labels()[::-1], VOXEL)
    uuids = []
    for name in ("a", "other"):
        with tifffile.TiffFile(tmp_path / name) as file:
            uuids.append(ElementTree.fromstring(file.ome_metadata or "").attrib["UUID"])
    assert uuids[0] != uuids[1]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    image=npst.arrays(
        dtype=st.sampled_from(
            ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"]
        ),
        shape=npst.array_shapes(min_dims=3, max_dims=3, min_side=2, max_side=9),
    ),
    edges=st.tuples(*[st.floats(0.01, 100)] * 3),
)
def test_any_image_comes_back_with_voxels_and_scale(tmp_path, image, edges):
    path = tmp_path / "round.ome.tif"
    write_image(path, image, VoxelSize(*edges))
    (frame,) = find_frames(path)
    np.testing.assert_array_equal(frame.read(), image)
    assert frame.require_voxel_size().zyx == pytest.approx(edges)
    np.testing.assert_array_equal(tifffile.imread(path), image)


def test_volumes_too_large_for_a_classic_tiff_become_bigtiff(tmp_path, monkeypatch):
    assert tiff.CLASSIC_TIFF_BYTES < 2**32
    monkeypatch.setattr(tiff, "CLASSIC_TIFF_BYTES", 1000)
    write_image(tmp_path / "a.tif", np.zeros((5, 10, 10), np.uint16), VOXEL)
    write_image(tmp_path / "b.tif", np.zeros((5, 10, 11), np.uint16), VOXEL)
    for name, big in (("a.tif", False), ("b.tif", True)):
        with tifffile.TiffFile(tmp_path / name) as file:
            assert file.is_bigtiff is big
        assert find_frames(tmp_path / name)[0].voxel_size == VOXEL


def test_what_is_no_volume_or_no_label_is_refused(tmp_path: Path) -> None:
    for wrong in (labels()[0], labels().astype(np.float32), -1 - labels().astype(np.int16)):
        with pytest.raises(ValueError, match="labels"):
            write_labels(tmp_path / "a.tif", wrong, VOXEL)
    with pytest.raises(ValueError, match="complex64"):
        write_image(tmp_path / "a.tif", labels().astype(np.complex64), VOXEL)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_labels(tmp_path / "file" / "a.ome.tif", labels(), VOXEL)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 60000, (20, 100, 100)).astype(np.uint16)
    with pytest.raises(InputError, match=r"cannot write .*a\.ome\.tif"):
        write_image(tmp_path / "a.ome.tif", noise, VOXEL)
    assert list(tmp_path.iterdir()) == []
