"""Labels of other programs: what Cellpose and ImageJ write is read back, and a pickle runs nothing."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from roifile import ROI_TYPE, ImagejRoi, roiwrite

from nuclei3d.errors import InputError
from nuclei3d.images.foreign_labels import read_rois, read_seg
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.export.cellpose import write_rois, write_seg


def balls() -> np.ndarray:
    """Two nuclei that touch, and one in the corner, numbered with gaps."""
    z, y, x = np.ogrid[:6, :30, :40]
    labels = np.zeros((6, 30, 40), np.uint32)
    for number, (cz, cy, cx) in {3: (2, 12, 12), 7: (3, 13, 21), 900: (5, 28, 38)}.items():
        labels[(((z - cz) * 2) ** 2 + (y - cy) ** 2 + (x - cx) ** 2 < 30) & (labels == 0)] = number
    return labels


def test_what_cellpose_saves_is_read_back(tmp_path: Path) -> None:
    labels = balls()
    image = np.random.default_rng(0).integers(0, 99, labels.shape).astype(np.uint16)
    path = write_seg(tmp_path, "t0", image, labels, VoxelSize(2.0, 0.5, 0.5))
    assert np.array_equal(read_seg(path) > 0, labels > 0)
    # as its GUI does: flows and images beside the masks, numbers of numpy's, in Fortran's order, big-endian
    content = {
        "masks": np.asfortranarray(labels.astype(">u4")),
        "flows": [np.zeros((2, 3), np.float32), [], np.array([None, "x"], object)],
        "diameter": np.float64(12.5),
        "filename": "t0.tif",
        "colors": np.zeros((3, 3), np.uint8),
    }
    np.save(path, content, allow_pickle=True)
    read = read_seg(path)
    assert np.array_equal(read, labels)
    assert read.dtype == np.uint32
    np.save(path, labels)
    assert np.array_equal(read_seg(path), labels)


class Runs:
    """A pickle that would run a command, as anyone can write one."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def npy(pickled: bytes) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    header += b" " * (118 - len(header) - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickled


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil_seg.npy", tmp_path / "trace"
    np.save(path, {"masks": np.zeros((2, 2, 2), int), "x": Runs(f"touch {trace}")}, allow_pickle=True)
    np.load(path, allow_pickle=True)
    assert trace.exists(), "the pickle is no danger: the test would prove nothing"
    trace.unlink()
    with pytest.raises(InputError, match=r"posix\.system|nt\.system"):
        read_seg(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy._core.multiarray\n_reconstruct.__globals__\n.",
        # bytes taken for objects: addresses of the attacker's choice
        b"cnumpy\nndarray\n)\x81(K\x01(K\x01tcnumpy\ndtype\n(S'V8'\ntR\x89C\x08AAAAAAAAtb.",
        b"cnumpy._core.multiarray\n_reconstruct\n)\x81K\x00b.",
        b"garbage",
        b"",
        pickle.dumps({"nothing": 1}),
        pickle.dumps({"masks": [1, 2]}),
    ],
)
def test_anything_but_arrays_is_refused_in_one_line(tmp_path: Path, pickled: bytes) -> None:
    path = tmp_path / "odd_seg.npy"
    path.write_bytes(npy(pickled))
    with pytest.raises(InputError, match=r"odd_seg\.npy holds (what is no array|no masks)") as caught:
        read_seg(path)
    assert "\n" not in str(caught.value)


def test_exported_regions_come_back_voxel_by_voxel(tmp_path: Path) -> None:
    labels = balls()
    path = write_rois(tmp_path / "t0_rois.zip", labels)
    read, unnumbered = read_rois(path, labels.shape)
    assert np.array_equal(read, labels)
    assert unnumbered == 0


def region(corners: list[tuple[int, int]], plane: int, name: str) -> ImagejRoi:
    """A polygon with corners (x, y), as Fiji stores one drawn by hand; planes count from 1."""
    return ImagejRoi.frompoints(np.array(corners), name=name, position=plane - 1)


def test_regions_drawn_anew_join_what_they_overlap(tmp_path: Path) -> None:
    square = [(2, 2), (8, 2), (8, 8), (2, 8)]
    far = [(20, 20), (25, 20), (25, 24), (20, 24)]
    rois = [
        region(square, 2, "0005-0002"),
        region([(3, 2), (9, 2), (9, 8), (3, 8)], 3, "0003-0005-0006"),  # Fiji's own name: plane, y, x
        region(far, 2, "0002-0022-0022"),
        region(far, 3, "0003-0022-0022"),
    ]
    path = tmp_path / "drawn.zip"
    roiwrite(path, rois)
    labels, unnumbered = read_rois(path, (4, 30, 30))
    assert unnumbered == 3
    expected = np.zeros((4, 30, 30), int)
    expected[1, 2:8, 2:8] = 5
    expected[2, 2:8, 3:9] = 5
    expected[1:3, 20:24, 20:25] = 6
    assert np.array_equal(labels, expected)


@pytest.mark.parametrize(
    ("roi", "message"),
    [
        (region([(1, 1), (5, 1), (5, 5)], 0, "a"), "belongs to no plane"),
        (region([(1, 1), (5, 1), (5, 5)], 9, "a"), "lies in plane 9 .* the image has 4 planes"),
        (region([(90, 90), (95, 90), (95, 95)], 1, "a"), "holds no pixel of the image"),
        (ImagejRoi(roitype=ROI_TYPE.LINE, name="a", position=1, x2=5, y2=5), "holds no pixel of the image"),
    ],
)
def test_regions_that_are_no_nuclei_are_refused(tmp_path: Path, roi: ImagejRoi, message: str) -> None:
    path = tmp_path / "a.roi"
    roi.tofile(path)
    with pytest.raises(InputError, match=message):
        read_rois(path, (4, 30, 30))


def test_a_file_that_holds_no_regions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match="no set of ImageJ's regions"):
        read_rois(tmp_path / "a.zip", (4, 30, 30))
