"""What a stranger sends reads one file, costs what was foretold, and is answered in harmless words."""

import base64
import io
import json
import os
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

from nuclei3d.config.sections import PredictParams
from nuclei3d.console import printable, say
from nuclei3d.errors import InputError, TooLargeError
from nuclei3d.experiment.invocation import (
    Admission,
    RequestParams,
    VolumeLimits,
    check_cost,
    open_frame,
    path_below,
    read_request_params,
    take_apart,
)
from nuclei3d.images.frames import find_frames
from nuclei3d.images.ome_zarr import create_zarr
from nuclei3d.images.tiff import write_image
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.folder import ModelInfo

INFO = ModelInfo(diameter_px=17, nucleus_diameter_um=8.5)
SERVED = Admission(VolumeLimits(max_network_voxels=20_000_000), INFO, PredictParams())
OWN, OTHER = "urn:uuid:00000000-0000-0000-0000-000000000001", "urn:uuid:00000000-0000-0000-0000-000000000002"
SIZES = 'SizeX="8" SizeY="8" SizeZ="2" SizeC="1" SizeT="1"'
SPELLINGS = {
    "plain": f'<UUID FileName="../secret.tif">{OTHER}</UUID>',
    "prefix with a hyphen": f'<a-b:UUID xmlns:a-b="x" FileName="../secret.tif">{OTHER}</a-b:UUID>',
    "CDATA": f'<UUID FileName="../secret.tif"><![CDATA[{OTHER}]]></UUID>',
    "a tag that ends in UUID": f'<NoUUID FileName="../secret.tif">{OTHER}</NoUUID>',
    "no text": '<UUID FileName="../secret.tif"/>',
}


@pytest.fixture(autouse=True)
def _in_seconds() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 30


def ome(
    inside: str = "",
    *,
    before: str = "",
    data: str = 'IFD="0" PlaneCount="2"',
    sizes: str = SIZES,
    after: str = "",
) -> str:
    return (
        f'<?xml version="1.0"?>{before}<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        f'UUID="{OWN}"><Image ID="Image:0"><AnnotationRef ID="A:0"/><Pixels ID="Pixels:0" '
        f'DimensionOrder="XYZCT" Type="uint8" {sizes} PhysicalSizeX="1" PhysicalSizeY="1" PhysicalSizeZ="2">'
        f"<TiffData {data}>{inside}</TiffData></Pixels></Image>{after}</OME>"
    )


def modulo(along: str) -> str:
    return (
        '<StructuredAnnotations><XMLAnnotation ID="A:0" Namespace="openmicroscopy.org/modulo">'
        f"<Value><Modulo>{along}</Modulo></Value></XMLAnnotation></StructuredAnnotations>"
    )


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    (tmp_path / "sent").mkdir()
    tifffile.imwrite(tmp_path / "secret.tif", np.full((2, 8, 8), 42, np.uint8))
    return tmp_path / "sent" / "0.tif"


def write(file: Path, description: str) -> Path:
    tifffile.imwrite(file, np.zeros((2, 8, 8), np.uint8), description=description, metadata=None)
    return file


def pages(count: int, last: int = 0) -> bytes:
    """A TIFF of `count` pages of one pixel; the last points to the page `last` - 1, or to none."""
    entries = [(256, 4, 1), (257, 4, 1), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 4, 1), (279, 4, 1)]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    size = 2 + len(directory) + 4
    parts = [b"II*\0" + struct.pack("<I", 16) + bytes(8)]
    for number in range(count):
        following = 16 + (number + 1) * size if number < count - 1 else 16 + (last - 1) * size if last else 0
        parts.append(struct.pack("<H", len(entries)) + directory + struct.pack("<I", following))
    return b"".join(parts)


def test_a_file_that_names_only_itself_is_read(sent: Path) -> None:
    write(sent, ome(f'<UUID FileName="old.ome.tif">{OWN}</UUID>'))
    frame, voxel_size = open_frame(sent, RequestParams(), 1000)
    assert voxel_size == VoxelSize(2, 1, 1)
    assert not frame.read().any()


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("before", ["", f'<!-- <OME UUID="{OTHER}"> -->'], ids=["", "comment"])
def test_no_spelling_makes_the_service_read_another_file(sent: Path, spelling: str, before: str) -> None:
    write(sent, ome(SPELLINGS[spelling], before=before))
    with pytest.raises(InputError, match="multi-file"):
        open_frame(sent, RequestParams(), 10**9)


def test_a_pipe_is_neither_read_nor_waited_for(sent: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tif")
    write(sent, ome(f'<UUID FileName="../pipe.tif">{OTHER}</UUID>'))
    with pytest.raises(InputError, match="multi-file"):
        open_frame(sent, RequestParams(), 10**9)
    with pytest.raises(InputError, match="regular file"):
        find_frames(tmp_path / "pipe.tif")
    with pytest.raises(InputError, match="regular file"):
        path_below(tmp_path, "pipe.tif")
    (tmp_path / "a.zarr").mkdir()
    os.mkfifo(tmp_path / "a.zarr" / "zarr.json")
    with pytest.raises(InputError, match="links"):
        path_below(tmp_path, "a.zarr")
    with pytest.raises(InputError, match="is a folder"):
        open_frame(tmp_path / "sent", RequestParams(), 10**9)


@pytest.mark.parametrize(
    "description",
    [
        ome(data='IFD="0" PlaneCount="300000000"'),
        ome(data='IFD="0" NumPlanes="300000000"'),
        ome(data='IFD="300000000"'),
        ome(sizes=SIZES.replace('SizeZ="2"', 'SizeZ="300000000"')),
        ome(sizes=SIZES.replace('SizeC="1" SizeT="1"', 'SizeC="20000" SizeT="20000"')),
        ome("</TiffData>" + '<TiffData IFD="0" PlaneCount="2"/>' * 20_000 + "<TiffData>"),
        ome(after=modulo('<ModuloAlongZ Type="phase" Start="0" End="500000000"/>')),
        ome(after=modulo('<ModuloAlongZ Type="phase" Start="0" End="1" Step="1e-9"/>')),
        ome(after="<a/>" * 500_001),
    ],
    ids=["PlaneCount", "NumPlanes", "IFD", "SizeZ", "SizeC", "TiffData", "End", "Step", "elements"],
)
def test_planes_are_counted_before_they_are_made(sent: Path, description: str) -> None:
    with pytest.raises(TooLargeError, match="more than"):
        open_frame(write(sent, description), RequestParams(), 10**9)


@pytest.mark.parametrize(
    "description",
    [
        ome(before='<!DOCTYPE a [<!ENTITY b "c">]>'),
        ome(before='<!DOCTYPE a SYSTEM "file:///etc/hostname">'),
        ome(data='IFD="0" PlaneCount="many"'),
        ome(after=modulo('<ModuloAlongZ Type="phase" Start="0" End="1" Step="0"/>')),
        ome(after="<a>" * 100),
    ],
    ids=["entity", "external", "count", "step", "broken"],
)
def test_what_is_wrong_with_metadata_is_one_line(sent: Path, description: str) -> None:
    with pytest.raises(InputError) as raised:
        open_frame(write(sent, description), RequestParams(), 10**9)
    assert "\n" not in str(raised.value)
    assert str(sent.parent) not in str(raised.value)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(
    "leading", ["../../out.zarr/0", "0/../../../out.zarr/0", "{top}/out.zarr/0", "file://{top}/out.zarr/0"]
)
def test_an_ome_zarr_leads_nowhere_else(tmp_path: Path, version: str, leading: str) -> None:
    for name in ("out.zarr", "root/in.zarr"):
        create_zarr(
            tmp_path / name, (2, 8, 8), np.uint16, VoxelSize(2.0, 0.5, 0.5), (2, 8, 8), version=version
        )
    metadata = tmp_path / "root/in.zarr" / (".zattrs" if version == "0.4" else "zarr.json")
    written = metadata.read_text()
    metadata.write_text(written.replace('"path": "0"', f'"path": "{leading.format(top=tmp_path)}"'))
    assert metadata.read_text() != written
    with pytest.raises(InputError, match="no array that is there"):
        open_frame(path_below(tmp_path / "root", "in.zarr"), RequestParams(), 10**9)


@pytest.mark.parametrize("chunk", ["link", "link to a folder", "pipe", "dangling link"])
def test_chunks_are_files_of_the_store(tmp_path: Path, chunk: str) -> None:
    root = tmp_path / "root"
    array = create_zarr(root / "a.zarr", (2, 8, 8), np.uint16, VoxelSize(2.0, 0.5, 0.5), (2, 8, 8))
    array[:] = 1
    file = next(item for item in (root / "a.zarr" / "0" / "c").rglob("*") if item.is_file())
    assert path_below(root, "a.zarr").is_dir()
    if chunk == "link to a folder":
        file.parent.parent.rename(tmp_path / "outside")
        file.parent.parent.symlink_to(tmp_path / "outside")
    else:
        file.rename(tmp_path / "outside")
        if chunk == "pipe":
            os.mkfifo(file)
        else:
            file.symlink_to(tmp_path / ("outside" if chunk == "link" else "gone"))
    with pytest.raises(InputError, match="holds links"):
        path_below(root, "a.zarr")


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../root/../secret.tif",
        "{top}/secret.tif",
        "a/../../secret.tif",
        "linked/secret.tif",
        "~/a",
        ".",
        "a" * 5000,
        "a\x00",
        "\ud800.tif",
        "zip://a.zip!secret.tif",
        "a.zip/secret.tif",
        "%2e%2e/secret.tif",
        "",
    ],
)
def test_no_path_leaves_the_root(tmp_path: Path, path: str) -> None:
    """A ZIP is neither entered nor read; a folder is none of its files."""
    root = tmp_path / "root"
    root.mkdir()
    write_image(tmp_path / "secret.tif", np.zeros((2, 8, 8), np.uint8), VoxelSize(1, 1, 1))
    (root / "linked").symlink_to(tmp_path)
    with zipfile.ZipFile(root / "a.zip", "w") as archive:
        archive.write(tmp_path / "secret.tif", "../secret.tif")
    with pytest.raises(InputError) as raised:
        open_frame(path_below(root, path.format(top=tmp_path)), RequestParams(), 10**9)
    assert str(raised.value).isprintable()
    with pytest.raises(InputError, match=r"^the volume"):
        open_frame(path_below(root, "a.zip"), RequestParams(), 10**9)


@pytest.mark.parametrize("last", [0, 150], ids=["a chain", "a ring"])
def test_pages_are_counted_before_they_are_read(sent: Path, last: int) -> None:
    sent.write_bytes(pages(30_000 if not last else 200, last))
    with pytest.raises(TooLargeError, match="planes"):
        open_frame(sent, RequestParams(), 10**9)


def test_a_stack_of_one_pixel_planes_is_not_listed(sent: Path) -> None:
    lines = "ImageJ=1.54f\nimages=3000000\nslices=2\nframes=1500000\nhyperstack=true\n"
    tifffile.imwrite(sent, np.zeros((3_000_000, 1, 1), np.uint8)[:1], description=lines, metadata=None)
    with sent.open("ab") as file:
        file.write(bytes(3_000_000))
    with pytest.raises(InputError):
        open_frame(sent, RequestParams(), 10**9)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("anisotropy", [1e6, 0, -1, 1e-9, float("inf")]),
        ("diameter_um", [1e300, 1e-300, 0]),
        ("stitch_max_gap", [10**12, -1]),
        ("orthogonal_step", [10**9]),
        ("flow3d_smooth", [1e9]),
        ("voxel_size_um", [[1e9, 1, 1], [1, 1e-9, 1]]),
        ("view_weights", [[1e300, 1, 1], [1] * 4]),
        ("views", [["xy"] * 4, [[]] * 100_000]),
        ("cellprob_threshold", [1e300]),
        ("min_volume_um3", [1e300]),
        ("max_volume_um3", [1e300]),
        ("channel", ["x" * 1000]),
    ],
)
def test_every_number_has_bounds(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(InputError, match=name) as raised:
            read_request_params({name: value})
        assert len(str(raised.value)) < 600


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    write_image(tmp_path / "a.ome.tif", np.zeros((16, 64, 64), np.uint16), VoxelSize(2.0, 0.5, 0.5))
    return tmp_path / "a.ome.tif"


@pytest.mark.parametrize(
    ("name", "value"), [("anisotropy", 1000), ("diameter_um", 0.5), ("voxel_size_um", [1000, 0.5, 0.5])]
)
def test_the_parameter_that_makes_a_request_large_is_named(volume: Path, name: str, value: object) -> None:
    assert check_cost(volume, RequestParams(), SERVED) == 589_824
    asked = read_request_params({name: value, "mode": "ortho", "flip_average": True})
    with pytest.raises(TooLargeError, match=f"parameter '{name}' .* makes it large"):
        check_cost(volume, asked, SERVED)


def test_a_large_volume_is_refused_as_such_and_rows_count_together(volume: Path) -> None:
    small = Admission(VolumeLimits(max_network_voxels=600_000), INFO, PredictParams())
    seen = check_cost(volume, RequestParams(), small)
    with pytest.raises(TooLargeError, match="send fewer or smaller"):
        check_cost(volume, RequestParams(), small, before=seen)


def body(folder: Path, content: bytes) -> Path:
    (folder / "body.json").write_bytes(content)
    return folder / "body.json"


def test_sixty_megabytes_of_brackets_are_not_parsed(tmp_path: Path) -> None:
    content = b'{"dataframe_records":[{"volume":""}],"params":{"views":[' + b"[]," * 20_000_000 + b"[]]}}"
    with pytest.raises(TooLargeError, match="values"):
        take_apart(SERVED, body(tmp_path, content), tmp_path)


def test_rows_have_a_limit(tmp_path: Path) -> None:
    content = json.dumps({"dataframe_records": [{"path": "a"}] * 65}).encode()
    with pytest.raises(TooLargeError, match="65 rows"):
        take_apart(SERVED, body(tmp_path, content), tmp_path)


def test_a_damaged_volume_tells_no_path(tmp_path: Path) -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((4, 64, 64), np.uint16), compression="zlib")
    cut = base64.b64encode(file.getvalue()[:-100]).decode()
    content = json.dumps({"dataframe_records": [{"volume": cut}]}).encode()
    with pytest.raises(InputError, match=r"^the volume") as raised:
        take_apart(SERVED, body(tmp_path, content), tmp_path)
    assert str(tmp_path) not in str(raised.value)


@pytest.mark.parametrize(
    "request_",
    [
        {"dataframe_records": [{"path": "\x1b]0;owned\x07" + "a" * 10_000}]},
        {"dataframe_records": [{"\x1b[2J" + "b" * 10_000: 1}]},
        {"\x1b[2J" + "c" * 10_000: 1},
        {"dataframe_records": [{"path": "a"}], "params": {"\x9b31m" + "d" * 10_000: 1}},
        {"dataframe_records": [{"path": "a"}], "params": {"mode": "\u202e" + "e" * 10_000}},
    ],
)
def test_what_is_echoed_is_short_and_printable(tmp_path: Path, request_: dict[str, object]) -> None:
    served = SERVED._replace(limits=VolumeLimits(root=tmp_path))
    with pytest.raises(InputError) as raised:
        take_apart(served, body(tmp_path, json.dumps(request_).encode()), tmp_path)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 700


def test_a_volume_is_spoken_of_in_harmless_words(tmp_path: Path) -> None:
    names = [f"\u202ered {number}" * 20 for number in range(50)]
    metadata = {"axes": "CZYX", "Channel": {"Name": names}}
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((50, 2, 8, 8), np.uint8), ome=True, metadata=metadata)
    for channel in (None, "\x1f"):
        with pytest.raises(InputError, match="channel") as raised:
            open_frame(tmp_path / "a.tif", RequestParams(channel=channel), 10**9)
        assert str(raised.value).isprintable()
        assert len(str(raised.value)) < 700


def test_a_terminal_is_never_sent_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[31mb\x9bc\r\u202ed\ne")
    assert capsys.readouterr().err == "a\\x1b[31mb\\x9bc\\r\\u202ed\ne\n"
    assert printable("x" * 300) == "x" * 200 + "..."
