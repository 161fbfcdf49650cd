"""Microscopes' own formats give volumes as TIFF does; without a reader one line says what to install."""

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nuclei3d.errors import InputError
from nuclei3d.images.frames import find_frames

CUBE = np.arange(2 * 2 * 3 * 5 * 7, dtype=np.uint16).reshape(2, 2, 3, 5, 7)
"""Time, channel, z, y, x."""


def write_imaris(path: Path) -> None:
    """Write as Imaris does: padded chunks, attributes as arrays of characters, numbered from 0."""
    h5py = pytest.importorskip("h5py")

    def text(value: object) -> NDArray[Any]:
        return np.frombuffer(str(value).encode(), "S1")

    with h5py.File(path, "w") as file:
        image = file.create_group("DataSetInfo/Image")
        extents = {"X": 7, "Y": 5, "Z": 3, "ExtMin0": 10, "ExtMin1": 0, "ExtMin2": -6, "Unit": "um"}
        for name, value in {**extents, "ExtMax0": 11.75, "ExtMax1": 2.5, "ExtMax2": 0}.items():
            image.attrs[name] = text(value)
        for channel, name in enumerate(("membrane", "H2B")):
            file.create_group(f"DataSetInfo/Channel {channel}").attrs["Name"] = text(name)
        times = file.create_group("DataSetInfo/TimeInfo")
        times.attrs["TimePoint1"] = text("2024-05-01 10:00:00.000")
        times.attrs["TimePoint2"] = text("2024-05-01 10:02:30.000")
        for time, channels in enumerate(CUBE):
            for channel, volume in enumerate(channels):
                place = f"DataSet/ResolutionLevel 0/TimePoint {time}/Channel {channel}/Data"
                file[place] = np.pad(volume, ((0, 1), (0, 3), (0, 1)), constant_values=999)


def test_imaris_files_have_channels_times_and_scale(tmp_path: Path) -> None:
    write_imaris(tmp_path / "film.ims")
    with pytest.raises(InputError, match=r"0 \(membrane\), 1 \(H2B\)"):
        find_frames(tmp_path / "film.ims")
    frames = find_frames(tmp_path, channel="H2B")
    assert [(frame.name, frame.time_step_s) for frame in frames] == [("film_t000", 150), ("film_t001", 150)]
    assert frames[0].require_voxel_size().zyx == pytest.approx((2.0, 0.5, 0.25))
    np.testing.assert_array_equal(frames[1].read(), CUBE[1, 1])
    box = (slice(1, 3), slice(2, 5), slice(0, 4))
    np.testing.assert_array_equal(frames[0].read_block(box), CUBE[0, 1][box])


def lif_image(name: str, stack: NDArray[np.uint16], block: str) -> str:
    """Describe an image (t, c, z, y, x) of 2 x 0.5 x 0.25 um, in metres as Leica does; planes lie t, z, c."""
    times, channels, depth, height, width = stack.shape
    steps = {1: (width, 0.25e-6, 2), 2: (height, 0.5e-6, 2 * width)}
    steps[3] = (depth, 2e-6, 2 * width * height * channels)
    steps[4] = (times, 30.0, 2 * width * height * channels * depth)
    dimensions = "".join(
        f'<DimensionDescription DimID="{axis}" NumberOfElements="{n}" Origin="0" '
        f'Length="{edge * (n - 1)}" Unit="{"s" if axis == 4 else "m"}" BitInc="0" BytesInc="{inc}"/>'
        for axis, (n, edge, inc) in steps.items()
        if n > 1
    )
    described = "".join(
        f'<ChannelDescription DataType="0" ChannelTag="0" Resolution="16" NameOfMeasuredQuantity="" Min="0" '
        f'Max="65535" Unit="" LUTName="{colour}" IsLUTInverted="0" BytesInc="{2 * width * height * i}" '
        'BitInc="0"/>'
        for i, colour in zip(range(channels), ("Green", "Red"), strict=False)
    )
    return (
        f'<Element Name="{name}" Visibility="1"><Data><Image><ImageDescription>'
        f"<Channels>{described}</Channels><Dimensions>{dimensions}</Dimensions></ImageDescription></Image>"
        f'</Data><Memory Size="{stack.nbytes}" MemoryBlockID="{block}"/></Element>'
    )


def write_lif(path: Path, images: dict[str, NDArray[np.uint16]]) -> None:
    """Write a Leica file: a header in XML, then the data of each image."""
    elements = "".join(
        lif_image(name, stack, f"MemBlock_{i}") for i, (name, stack) in enumerate(images.items())
    )
    header = (
        '<LMSDataContainerHeader Version="2"><Element Name="project" Visibility="1"><Data/>'
        f'<Memory Size="0" MemoryBlockID="MemBlock_none"/><Children>{elements}</Children></Element>'
        "</LMSDataContainerHeader>"
    ).encode("utf-16-le")
    content = struct.pack("<IIBI", 0x70, len(header) + 5, 0x2A, len(header) // 2) + header
    for i, stack in enumerate(images.values()):
        block = f"MemBlock_{i}".encode("utf-16-le")
        content += struct.pack("<IIBQBI", 0x70, len(block) + 14, 0x2A, stack.nbytes, 0x2A, len(block) // 2)
        content += block + stack.transpose(0, 2, 1, 3, 4).tobytes()
    path.write_bytes(content)


def test_leica_files_have_scenes_channels_times_and_scale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bioio_lif")
    write_lif(tmp_path / "a.lif", {"overview": CUBE[:1, :1, :1], "embryo": CUBE})
    frames = find_frames(tmp_path / "a.lif", channel=1)
    assert "1 passed over: 0 (" in capsys.readouterr().err
    assert [frame.name for frame in frames] == ["a_t000", "a_t001"]
    assert frames[0].require_voxel_size().zyx == pytest.approx((2.0, 0.5, 0.25))
    np.testing.assert_array_equal(frames[1].read(), CUBE[1, 1])
    box = (slice(1, 3), slice(2, 5), slice(0, 4))
    np.testing.assert_array_equal(frames[0].read_block(box), CUBE[0, 1][box])
    write_lif(tmp_path / "two.lif", {"A": CUBE[:1, :1], "B": CUBE[1:, :1]})
    with pytest.raises(InputError, match=r"holds 2 images: 0 \(.*choose one with --set data\.image=NUMBER"):
        find_frames(tmp_path / "two.lif")
    (frame,) = find_frames(tmp_path / "two.lif", image=1)
    np.testing.assert_array_equal(frame.read(), CUBE[1, 0])


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("a.lif", "bioio", r"nuclei3d\[formats\]"),
        ("a.nd2", "bioio", r"nuclei3d\[formats\]"),
        ("a.ims", "h5py", r"nuclei3d\[formats\]"),
        ("a.czi", "bioio", "bioio bioio-czi"),
    ],
)
def test_without_a_reader_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        InputError, match=f"need a reader; install it with: pip install '{package}'"
    ) as caught:
        find_frames(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_in_a_folder_what_has_no_reader_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nuclei3d.images.tiff import write_image
    from nuclei3d.images.voxel_size import VoxelSize

    write_image(tmp_path / "t0.tif", CUBE[0, 0], VoxelSize(2.0, 0.5, 0.5))
    (tmp_path / "raw.czi").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "bioio", None)
    assert [frame.name for frame in find_frames(tmp_path)] == ["t0"]
    assert "1 passed over: raw.czi (no reader is installed)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.lif", "a.nd2", "a.ims"])
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, name: str) -> None:
    pytest.importorskip("bioio_lif")
    pytest.importorskip("bioio_nd2")
    pytest.importorskip("h5py")
    (tmp_path / name).write_bytes(b"no picture" * 100)
    with pytest.raises(InputError, match="cannot be read") as caught:
        find_frames(tmp_path / name)
    assert "\n" not in str(caught.value)
