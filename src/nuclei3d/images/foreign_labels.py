"""Labels as other programs keep them: Cellpose's ``_seg.npy`` and ImageJ's regions (``.roi``, ``.zip``)."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nuclei3d.errors import InputError, reason_of

FOREIGN_LABELS = (".npy", ".zip", ".roi")
_TYPES = re.compile(r"[biuf][1248]|[SU]\d+|O8?")
# As `export` names regions: nucleus, plane, and the piece where there are several.
_NUMBERED = re.compile(r"(\d+)-(\d+)(-\d+)?(\.roi)?")
#: Regions of neighbouring planes belong to one nucleus from this intersection over union on.
_SAME_NUCLEUS = 0.25


class _Dtype:
    """Stands for numpy.dtype; only types of plain values and objects can be made of it."""

    def __init__(self, kind: object = "", *_: object) -> None:
        self.kind = kind
        self.order: Any = "|"

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.order = state[1]

    def plain(self) -> np.dtype[Any]:
        if not isinstance(self.kind, str) or not _TYPES.fullmatch(self.kind):
            raise pickle.UnpicklingError(f"values of type {self.kind!r}")
        return np.dtype(self.kind).newbyteorder(self.order)


class _Array:
    """Stands for numpy.ndarray: `value` is an array of numbers, or a list where it holds objects."""

    def __init__(self, *_: object) -> None:
        self.value: Any = None

    def __setstate__(self, state: Sequence[Any]) -> None:
        _, shape, dtype, fortran, content = state
        kind = dtype.plain()
        if kind.hasobject:
            self.value = list(content)
        else:
            self.value = np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C")


class _Scalar:
    """Stands for one number of numpy's, which nobody asks for."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _ArraysOnly(pickle.Unpickler):
    """Reads plain containers and arrays. No object is made but those above, and none of numpy's own."""

    def find_class(self, module: str, name: str) -> Any:
        """Give what stands for a class of numpy's; all else is refused."""
        module = module.replace("numpy._core", "numpy.core")
        admitted = {
            ("numpy.core.multiarray", "_reconstruct"): _Array,
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
            ("numpy.core.multiarray", "scalar"): _Scalar,
        }
        if (module, name) not in admitted:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return admitted[module, name]


def read_seg(path: Path) -> NDArray[Any]:
    """Read the labels of Cellpose's ``_seg.npy``, or a plain array, as they are stored.

    The file is a pickle, which can hold any program: nothing of it is called. InputError is raised if it
    holds anything but arrays and plain containers, or no masks.
    """
    with path.open("rb") as file:
        try:
            content = _read_npy(file)
        except Exception as error:  # a damaged pickle raises anything
            reason = reason_of(error, 120)
            raise InputError(
                f"{path} holds what is no array, or is damaged ({reason}); save the masks from Cellpose as "
                "TIFF (File > Save masks as PNG/tif) and import that"
            ) from None
    if isinstance(content, np.ndarray):
        return content
    if isinstance(content, _Array) and isinstance(content.value, list) and len(content.value) == 1:
        content = content.value[0]
    masks = content.get("masks") if isinstance(content, dict) else None
    if not isinstance(masks, _Array) or not isinstance(masks.value, np.ndarray):
        raise InputError(f"{path} holds no masks; save it from Cellpose's GUI (Ctrl+S)")
    return np.array(masks.value, dtype=masks.value.dtype.newbyteorder("="))


def _read_npy(file: BinaryIO) -> Any:
    """Read an array, or, of one that holds objects, what stands for it."""
    version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
    read_header = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    _, _, dtype = read_header(file)  # type: ignore[no-untyped-call]
    if dtype.hasobject:
        return _ArraysOnly(file).load()
    file.seek(0)
    return np.load(file, allow_pickle=False)


def read_rois(path: Path, shape: tuple[int, int, int]) -> tuple[NDArray[np.uint32], int]:
    """Draw ImageJ's regions, one a nucleus and plane, as labels (Z, Y, X) of that shape.

    A region called ``<label>-<plane>``, as ``nuclei3d export`` names them, has that number. Any other, such
    as one that was drawn anew, belongs to the nucleus that it overlaps in the plane before or after, else to
    a new one; how many these are is given too. Regions hold the pixels whose centres they hold; where two
    overlap the later one counts. InputError is raised for lines and points, regions that belong to no plane,
    and those beside the image.
    """
    from roifile import ImagejRoi

    try:
        found = ImagejRoi.fromfile(path)
    except Exception as error:  # roifile and zipfile raise whatever is wrong with the bytes
        raise InputError(f"{path} is no set of ImageJ's regions, or damaged ({error})") from None
    labels = np.zeros(shape, np.uint32)
    unnumbered: list[tuple[int, tuple[NDArray[np.intp], ...]]] = []
    for roi in found if isinstance(found, list) else [found]:
        z, pixels = _draw(roi, shape, path)
        match = _NUMBERED.fullmatch(roi.name)
        if match and int(match[2]) == z + 1 and 0 < int(match[1]) < 2**32:
            labels[z][pixels] = int(match[1])
        else:
            unnumbered.append((z, pixels))
    newest = int(labels.max(initial=0))
    for z, pixels in sorted(unnumbered, key=lambda item: item[0]):
        number = _overlapped(labels, z, pixels)
        if not number:
            number = newest = newest + 1
        labels[z][pixels] = number
    return labels, len(unnumbered)


def _draw(roi: Any, shape: tuple[int, int, int], path: Path) -> tuple[int, tuple[NDArray[np.intp], ...]]:
    """Give the plane of a region and its pixels (rows, columns)."""
    from skimage.draw import polygon

    z = int(roi.z_position or roi.position) - 1
    if z < 0:
        raise InputError(
            f"{path}: the region {roi.name} belongs to no plane; in Fiji's ROI manager choose More > Options "
            "> Associate 'Show All' ROIs with slices, and draw it anew"
        )
    if z >= shape[0] or roi.t_position > 1:
        raise InputError(
            f"{path}: the region {roi.name} lies in plane {z + 1} (time {max(roi.t_position, 1)}), the image "
            f"has {shape[0]} planes; give the regions of one frame with its image"
        )
    area = np.zeros(shape[1:], bool)
    # polygons, freehand, traced, rectangles, ovals; not lines, points and angles
    paths = roi.coordinates(multi=True) if int(roi.roitype) in (0, 1, 2, 7, 8) else []
    for corners in paths:
        # counted from the corner of the first pixel, whose centre is at .5; a path in a path is a hole
        x, y = np.asarray(corners, np.float64).reshape(-1, 2).T - 0.5
        area[polygon(y, x, area.shape)] ^= True  # type: ignore[no-untyped-call]
    if not area.any():
        raise InputError(
            f"{path}: the region {roi.name} holds no pixel of the image ({shape[1]} x {shape[2]}); remove "
            "what is no outline of a nucleus, or give the image that the regions were drawn on"
        )
    return z, np.nonzero(area)


def _overlapped(labels: NDArray[np.uint32], z: int, pixels: tuple[NDArray[np.intp], ...]) -> int:
    """Give the label of a neighbouring plane that a region overlaps enough; 0 if none."""
    for neighbour in (z - 1, z + 1):
        if 0 <= neighbour < len(labels):
            plane = labels[neighbour]
            numbers, shared = np.unique(plane[pixels], return_counts=True)
            for number, both in sorted(zip(numbers, shared, strict=True), key=lambda item: -item[1]):
                union = np.count_nonzero(plane == number) + len(pixels[0]) - both
                if number and both >= _SAME_NUCLEUS * union:
                    return int(number)
    return 0
