"""A time-lapse comes back as it came, at the right scale, as other people's readers see it."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
import zarr
from numpy.typing import NDArray
from ome_zarr_models import open_ome_zarr

from nuclei3d.digests import digest_of
from nuclei3d.images.frames import find_frames
from nuclei3d.images.ome_zarr import BESIDE_THE_IMAGE
from nuclei3d.images.tiff import write_labels
from nuclei3d.stages.pairing import find_label_entries
from nuclei3d.stages.time_lapse import write_series

SHAPE = (3, 4, 20, 30)
SCALE = [90.0, 2.0, 0.5, 0.25]


def labels_over_time(highest: int = 9) -> NDArray[Any]:
    labels = np.random.default_rng(0).integers(0, 9, SHAPE).astype(np.uint32)
    labels[2, 1, 2, 3] = highest
    return labels


def write_tiff(path: Path) -> None:
    tifffile.imwrite(
        path,
        np.zeros(SHAPE, np.uint16),
        ome=True,
        metadata={
            "axes": "TZYX",
            "PhysicalSizeZ": 2.0,
            "PhysicalSizeY": 0.5,
            "PhysicalSizeX": 0.25,
            "TimeIncrement": 1.5,
            "TimeIncrementUnit": "min",
        },
    )


def write_zarr(path: Path, version: str) -> None:
    """Write as ome-zarr-py does, with a hand-made label image beside the image."""
    axes = [{"name": "t", "type": "time", "unit": "minute"}]
    axes += [{"name": "c", "type": "channel"}]
    axes += [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"]
    level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.5, 1, 2.0, 0.5, 0.25]}]}
    multiscales = [{"axes": axes, "datasets": [level], "name": "image"}]
    by_hand: dict[str, Any] = {"labels": ["by_hand"]}
    content: dict[str, Any] = {"multiscales": multiscales}
    if version == "0.4":
        multiscales[0]["version"] = "0.4"
    else:
        content, by_hand = ({"ome": {"version": "0.5", **each}} for each in (content, by_hand))
    form = 2 if version == "0.4" else 3
    group = zarr.open_group(str(path), mode="w", zarr_format=form, attributes=content)
    group.create_array("0", shape=(3, 1, 4, 20, 30), dtype="uint16", chunks=(1, 1, 4, 20, 30))
    group.create_group("labels", attributes=by_hand)


def series_of(source: Path, out: Path, labels: NDArray[Any], **options: Any) -> list[Path]:
    frames = find_frames(source)
    masks = [out / f"{frame.name}_masks.ome.tif" for frame in frames]
    for path, volume in zip(masks, labels, strict=True):
        write_labels(path, volume, frames[0].require_voxel_size())
    options = {"into_input": False, **options}
    return write_series(frames, masks, [frame.name for frame in frames], out, **options)


@pytest.mark.parametrize(("highest", "dtype"), [(9, "uint16"), (70_000, "uint32")])
def test_a_stack_over_time_gives_one(tmp_path: Path, highest: int, dtype: str) -> None:
    write_tiff(tmp_path / "film.ome.tif")
    labels = labels_over_time(highest)
    (path,) = series_of(tmp_path / "film.ome.tif", tmp_path / "out", labels)
    assert path == tmp_path / "out" / "film_masks.ome.tif"
    with tifffile.TiffFile(path) as file:
        assert (file.series[0].axes, str(file.series[0].dtype)) == ("TZYX", dtype)
        np.testing.assert_array_equal(file.asarray(), labels)
        pixels = ElementTree.fromstring(file.ome_metadata).find("{*}Image/{*}Pixels")
        assert pixels is not None
        assert [float(pixels.attrib[f"PhysicalSize{axis}"]) for axis in "ZYX"] == SCALE[1:]
        assert (float(pixels.attrib["TimeIncrement"]), pixels.attrib["TimeIncrementUnit"]) == (90.0, "s")
        # what ImageJ itself reads: its own description, and the resolution
        second = [tag.value for tag in file.pages.first.tags if tag.code == 270][-1]
        described = dict(line.split("=") for line in second.split("\n") if line)
        assert (described["images"], described["slices"], described["frames"]) == ("12", "4", "3")
        assert (described["hyperstack"], described["unit"]) == ("true", "micron")
        assert (float(described["spacing"]), float(described["finterval"])) == (2.0, 90.0)
    frame = find_frames(path)[2]
    assert (frame.time_step_s, frame.require_voxel_size().zyx) == (90.0, (2.0, 0.5, 0.25))


def test_the_same_bytes_each_time_and_written_only_where_something_changed(tmp_path: Path) -> None:
    write_tiff(tmp_path / "film.ome.tif")
    (path,) = series_of(tmp_path / "film.ome.tif", tmp_path / "a", labels_over_time())
    (other,) = series_of(tmp_path / "film.ome.tif", tmp_path / "b", labels_over_time())
    assert path.read_bytes() == other.read_bytes()
    before = path.stat().st_mtime_ns
    series_of(tmp_path / "film.ome.tif", tmp_path / "a", labels_over_time())
    assert path.stat().st_mtime_ns == before
    path.unlink()
    series_of(tmp_path / "film.ome.tif", tmp_path / "a", labels_over_time())
    assert path.read_bytes() == other.read_bytes()


def test_a_stack_that_something_else_replaced_is_written_again(tmp_path: Path) -> None:
    write_tiff(tmp_path / "film.ome.tif")
    (path,) = series_of(tmp_path / "film.ome.tif", tmp_path / "out", labels_over_time())
    expected = path.read_bytes()
    # such as the masks of a single frame of that name, or of a run that was killed before it noted them
    write_labels(path, labels_over_time()[0], find_frames(path)[0].require_voxel_size())
    other = path.read_bytes()
    series_of(tmp_path / "film.ome.tif", tmp_path / "out", labels_over_time())
    assert path.read_bytes() == expected
    # which may be somebody's work
    (kept,) = (tmp_path / "out" / ".predicted" / "changed").iterdir()
    assert kept.read_bytes() == other


def test_labels_in_the_input_that_were_corrected_there_are_laid_aside(tmp_path: Path) -> None:
    source, labels = tmp_path / "film.ome.zarr", labels_over_time()
    write_zarr(source, "0.5")
    _, place = series_of(source, tmp_path / "out", labels, into_input=True)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    series_of(source, tmp_path / "out", labels, into_input=True)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
    zarr.open_group(str(place), mode="r+")["0"][0, 0] = 7
    series_of(source, tmp_path / "out", labels, into_input=True)
    (kept,) = (tmp_path / "out" / ".predicted" / "changed").iterdir()
    assert (zarr.open_group(str(kept), mode="r")["0"][0, 0] == 7).all()
    np.testing.assert_array_equal(zarr.open_group(str(place), mode="r")["0"][...], labels)


def scale_of(group: Any) -> list[float]:
    return list(group.ome_attributes.multiscales[0].datasets[0].coordinateTransformations[0].scale)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_an_ome_zarr_gives_one_with_labels(tmp_path: Path, version: str) -> None:
    write_zarr(tmp_path / "film.ome.zarr", version)
    labels = labels_over_time()
    (path,) = series_of(tmp_path / "film.ome.zarr", tmp_path / "out", labels)
    assert path == tmp_path / "out" / "film_masks.ome.zarr"
    image = open_ome_zarr(zarr.open_group(str(path), mode="r"))
    assert scale_of(image) == SCALE
    found = open_ome_zarr(zarr.open_group(str(path / "labels" / "nuclei3d"), mode="r"))
    assert scale_of(found) == SCALE
    assert type(found).__name__ == "ImageLabel"
    for array in (
        "labels/nuclei3d/0",
        zarr.open_group(str(path)).attrs["ome"]["multiscales"][0]["datasets"][0]["path"],
    ):
        np.testing.assert_array_equal(zarr.open_group(str(path), mode="r")[array][...], labels)
    assert [entry.frame.time for entry in find_label_entries(path)] == [0, 1, 2]


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_masks_go_into_the_input_itself_by_choice(tmp_path: Path, version: str) -> None:
    source = tmp_path / "film.ome.zarr"
    write_zarr(source, version)
    zarr.consolidate_metadata(str(source))
    before = digest_of(source, without=BESIDE_THE_IMAGE)
    labels = labels_over_time()
    for _ in range(2):
        _, place = series_of(source, tmp_path / "out", labels, into_input=True)
    assert place == source / "labels" / "nuclei3d"
    found = open_ome_zarr(zarr.open_group(str(place), mode="r"))
    assert (type(found).__name__, scale_of(found)) == ("ImageLabel", SCALE)
    np.testing.assert_array_equal(zarr.open_group(str(place), mode="r")["0"][...], labels)
    group = zarr.open_group(str(source), mode="r")
    listed = group["labels"].attrs if version == "0.4" else group["labels"].attrs["ome"]
    assert listed["labels"] == ["by_hand", "nuclei3d"]
    # the image is as it was: its frames are not predicted again
    assert digest_of(source, without=BESIDE_THE_IMAGE) == before
    assert (place / ".zattrs").is_file() == (version == "0.4")


def test_one_frame_stays_one_file(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.ome.tif",
        np.zeros(SHAPE[1:], np.uint16),
        ome=True,
        metadata={"axes": "ZYX", "PhysicalSizeX": 1, "PhysicalSizeY": 1, "PhysicalSizeZ": 1},
    )
    assert series_of(tmp_path / "a.ome.tif", tmp_path / "out", labels_over_time()[:1]) == []


def test_an_evaluation_takes_the_frames_and_their_series_for_the_same(tmp_path: Path) -> None:
    write_tiff(tmp_path / "film.ome.tif")
    series_of(tmp_path / "film.ome.tif", tmp_path / "out", labels_over_time())
    entries = find_label_entries(tmp_path / "out")
    assert [(entry.key, entry.frame.time) for entry in entries] == [(f"film_t00{t}", None) for t in range(3)]
    for path in (tmp_path / "out").glob("film_t*"):
        path.unlink()
    entries = find_label_entries(tmp_path / "out")
    assert [(entry.key, entry.frame.time) for entry in entries] == [(f"film_t00{t}", t) for t in range(3)]
