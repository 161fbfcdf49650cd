"""Reading a slice data set into a `PlaneSet`: from its TIFF files, or from the packed copy."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from nuclei3d.core.training.planes import PlaneArrays, PlaneInfo, PlaneSet
from nuclei3d.core.training.stored_images import quantise_flows, quantise_image
from nuclei3d.errors import InputError

SUMMARY_FILE = "summary.json"
MANIFEST_FILE = "manifest.csv"
PACK_FOLDER = "packed"
PACKED_PARTS = ("train", "validation")
_PACK_FORMAT = 1
_PLANES_AT_ONCE = 64


@dataclass(frozen=True)
class Slices:
    """A slice data set's description.

    Attributes
    ----------
    folder
        Where it lies.
    summary
        Content of summary.json.
    infos
        Rows of manifest.csv by part; empty for the volumes of a 3D network.
    digest
        MD5 of the manifest, which holds the MD5 of every plane, and of the size of nuclei.
    """

    folder: Path
    summary: dict[str, Any]
    infos: dict[str, tuple[PlaneInfo, ...]]
    digest: str

    @property
    def network(self) -> str:
        """Kind of network that this was prepared for: ``views2d`` or ``full3d``."""
        return str(self.summary.get("network", "views2d"))

    @property
    def diameter_px(self) -> float:
        """Diameter of a typical nucleus on the planes."""
        return float(self.summary["diameter_px"])


def read_slices(folder: Path) -> Slices:
    """Read summary.json and manifest.csv.

    Raises
    ------
    InputError
        If the folder is no slice data set.
    """
    summary_path, manifest_path = folder / SUMMARY_FILE, folder / MANIFEST_FILE
    for path in (summary_path, manifest_path):
        if not path.is_file():
            raise InputError(
                f"{folder} is no slice data set: {path.name} is missing; make one with 'nuclei3d prepare'"
            )
    try:
        summary = json.loads(summary_path.read_bytes())
        for name in ("nucleus_diameter_um", "voxel_um", "diameter_px"):
            if not float(summary[name]) > 0:
                raise ValueError(name)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{summary_path} is damaged ({error}); make the slices again with 'nuclei3d prepare'"
        ) from None
    infos: dict[str, list[PlaneInfo]] = {}
    try:
        # the volumes of a 3D network are read by `training_volumes`
        of_planes = summary.get("network", "views2d") == "views2d"
        with manifest_path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file) if of_planes else ():
                infos.setdefault(row["part"], []).append(_info(row))
    except (KeyError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{manifest_path} is damaged ({error}); make the slices again with 'nuclei3d prepare'"
        ) from None
    digest = hashlib.md5(manifest_path.read_bytes(), usedforsecurity=False)
    digest.update(f"{summary['diameter_px']} {summary['nucleus_diameter_um']}".encode())
    return Slices(folder, summary, {part: tuple(rows) for part, rows in infos.items()}, digest.hexdigest())


def _info(row: dict[str, str]) -> PlaneInfo:
    return PlaneInfo(
        file=row["file"],
        embryo=row["embryo"],
        frame=row["frame"],
        view=row["view"],
        index=int(row["index"]),
        nuclei=int(row["nuclei"]),
        min_contrast=float(row["min_contrast"] or "nan"),
        norm_low=float(row["norm_low"]),
        norm_high=float(row["norm_high"]),
        height=int(row["height"]),
        width=int(row["width"]),
    )


def load_planes(slices: Slices, part: str, memory_limit_gb: float = 2.0) -> PlaneSet:
    """Load the planes of ``train``, ``validation`` or ``test``.

    The packed copy of prepare is used if it is that of these planes: a plane is read when it is first drawn,
    and kept in memory if all of them take less than the limit. Without a packed copy the TIFF files are read
    at once, into memory.

    Raises
    ------
    InputError
        If a file is missing, unreadable or of another shape than the manifest says.
    """
    infos = slices.infos.get(part, ())
    packed = _open_pack(slices, part, infos, memory_limit_gb)
    return packed if packed is not None else _read_tiffs(slices.folder, infos)


def pack_planes(folder: Path) -> None:
    """Write the packed copy of the planes that a training reads: ``packed/<part>.bin`` of ``train`` and
    ``validation``, and ``packed/index.json``.

    Uncompressed, 6 bytes a pixel, so that training starts at once: plane by plane intensities (uint16),
    labels (uint16), flows (int8, two a pixel), in the order of the manifest. To be called by prepare on the
    folder that it is filling, as the last step. The same planes give the same bytes.
    """
    slices = read_slices(folder)
    target = folder / PACK_FOLDER
    target.mkdir(exist_ok=True)
    parts: dict[str, Any] = {}
    for part in PACKED_PARTS:
        infos = slices.infos.get(part, ())
        steps, offsets = [], []
        with (target / f"{part}.bin").open("wb") as file, _readers() as pool:
            # a few at a time, so that memory does not grow with their number
            for first in range(0, len(infos), _PLANES_AT_ONCE):
                some = infos[first : first + _PLANES_AT_ONCE]
                for arrays, step, offset in pool.map(lambda info: _read_plane(folder, info), some):
                    file.write(b"".join(array.tobytes() for array in arrays))
                    steps.append(step)
                    offsets.append(offset)
        parts[part] = {"step": steps, "offset": offsets}
    index = {"format": _PACK_FORMAT, "manifest_md5": _manifest_md5(folder), "parts": parts}
    (target / "index.json").write_text(json.dumps(index) + "\n", encoding="utf-8")


def _manifest_md5(folder: Path) -> str:
    """MD5 of the manifest, which names each plane with its MD5."""
    return hashlib.md5((folder / MANIFEST_FILE).read_bytes(), usedforsecurity=False).hexdigest()


def _open_pack(
    slices: Slices, part: str, infos: tuple[PlaneInfo, ...], memory_limit_gb: float
) -> PlaneSet | None:
    """Open the packed copy; None if there is none, or it is that of other planes."""
    folder = slices.folder / PACK_FOLDER
    path = folder / f"{part}.bin"
    try:
        index = json.loads((folder / "index.json").read_bytes())
        if index["format"] != _PACK_FORMAT or index["manifest_md5"] != _manifest_md5(slices.folder):
            return None
        entry = index["parts"][part]
        step, offset = (np.array(entry[name], dtype=np.float64) for name in ("step", "offset"))
        size = path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    places = np.concatenate([[0], np.cumsum([6 * info.pixels for info in infos], dtype=np.int64)])
    if size != places[-1] or len(step) != len(infos):
        return None
    # reading, not mapping: what the system caches then does not count as this process' memory
    file = path.open("rb", buffering=0)
    kept: list[PlaneArrays | None] | None = [None] * len(infos) if size < memory_limit_gb * 1e9 else None

    def read(plane: int) -> PlaneArrays:
        if kept is not None and (known := kept[plane]) is not None:
            return known
        first = int(places[plane])
        data = os.pread(file.fileno(), int(places[plane + 1]) - first, first)
        arrays = _split_plane(data, infos[plane])
        if kept is not None:
            kept[plane] = arrays
        return arrays

    return PlaneSet(infos, step, offset, read)


def _split_plane(data: bytes, info: PlaneInfo) -> PlaneArrays:
    shape, count = (info.height, info.width), info.pixels
    return PlaneArrays(
        np.frombuffer(data, np.uint16, count).reshape(shape),
        np.frombuffer(data, np.uint16, count, 2 * count).reshape(shape),
        np.frombuffer(data, np.int8, 2 * count, 4 * count).reshape(*shape, 2),
    )


def _read_tiffs(folder: Path, infos: tuple[PlaneInfo, ...]) -> PlaneSet:
    with _readers() as pool:
        planes = list(pool.map(lambda info: _read_plane(folder, info), infos))
    arrays = [plane for plane, _, _ in planes]
    return PlaneSet(
        infos,
        np.array([step for _, step, _ in planes], dtype=np.float64),
        np.array([offset for _, _, offset in planes], dtype=np.float64),
        arrays.__getitem__,
    )


def _readers() -> ThreadPoolExecutor:
    # zlib leaves the interpreter lock, so threads decode side by side
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def _read_plane(folder: Path, info: PlaneInfo) -> tuple[PlaneArrays, float, float]:
    """Read a plane's TIFF files; give its arrays, and step and offset of its intensities."""
    image_path = folder / info.file
    image = _read_tiff(image_path, (info.height, info.width))
    # labels, foreground, dy, dx in one file: the labels need not be read again
    targets_path = image_path.with_name(image_path.stem + "_flows.tif")
    targets = _read_tiff(targets_path, (4, info.height, info.width))
    stored, step, offset = quantise_image(image)
    return PlaneArrays(stored, targets[0].astype(np.uint16), quantise_flows(targets[2:4])), step, offset


def _read_tiff(path: Path, shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        array: NDArray[Any] = tifffile.imread(path)
    except (OSError, ValueError, tifffile.TiffFileError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"cannot read {path}: {reason}; make the slices again with 'nuclei3d prepare'"
        ) from None
    if array.shape != shape:
        raise InputError(
            f"{path} has shape {array.shape}, the manifest says {shape}; make the slices again with "
            "'nuclei3d prepare'"
        )
    return array
