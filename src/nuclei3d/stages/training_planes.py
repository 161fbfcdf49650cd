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

from nuclei3d.core.planes import PlaneInfo, PlaneSet, quantise_flows, quantise_image
from nuclei3d.errors import InputError

SUMMARY_FILE = "summary.json"
MANIFEST_FILE = "manifest.csv"
PACK_FOLDER = "packed"
_PACK_FORMAT = 1


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
        Rows of manifest.csv by part.
    digest
        MD5 of the manifest, which holds the MD5 of every plane, and of the size of nuclei.
    """

    folder: Path
    summary: dict[str, Any]
    infos: dict[str, tuple[PlaneInfo, ...]]
    digest: str

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
        with manifest_path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
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


def load_planes(slices: Slices, part: str, memory_limit_gb: float = 4.0) -> PlaneSet:
    """Load the planes of ``train``, ``validation`` or ``test``.

    The packed copy of prepare is used if it is that of these planes: read into memory if it takes less than
    the limit, else mapped. Without one the TIFF files are read (into memory).

    Raises
    ------
    InputError
        If a file is missing, unreadable or of another shape than the manifest says.
    """
    infos = slices.infos.get(part, ())
    packed = _open_pack(slices, part, infos, memory_limit_gb)
    return packed if packed is not None else _read_tiffs(slices.folder, infos)


def pack_planes(folder: Path) -> None:
    """Write the packed copy of all parts of a slice data set: ``packed/<part>.npy`` and
    ``packed/index.json``.

    6 bytes a pixel, uncompressed, so that training starts at once. To be called by prepare on the folder that
    it is still filling, as the last step. The same planes give the same bytes.
    """
    slices = read_slices(folder)
    target = folder / PACK_FOLDER
    target.mkdir(exist_ok=True)
    parts: dict[str, Any] = {}
    for part, infos in sorted(slices.infos.items()):
        count = sum(info.pixels for info in infos)
        array = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            target / f"{part}.npy", mode="w+", dtype=np.uint16, shape=(3, count)
        )
        steps, offsets = _fill(folder, infos, array[0], array[1], array[2].view(np.int8).reshape(-1, 2))
        array.flush()
        parts[part] = {"pixels": count, "step": steps.tolist(), "offset": offsets.tolist()}
    index = {"format": _PACK_FORMAT, "digest": _rows_digest(slices), "parts": parts}
    (target / "index.json").write_text(json.dumps(index) + "\n", encoding="utf-8")


def _rows_digest(slices: Slices) -> str:
    """MD5 of the manifest, which names each plane with its MD5; the summary is allowed to change."""
    return hashlib.md5((slices.folder / MANIFEST_FILE).read_bytes(), usedforsecurity=False).hexdigest()


def _open_pack(
    slices: Slices, part: str, infos: tuple[PlaneInfo, ...], memory_limit_gb: float
) -> PlaneSet | None:
    folder = slices.folder / PACK_FOLDER
    try:
        index = json.loads((folder / "index.json").read_bytes())
        entry = index["parts"][part]
        if index["format"] != _PACK_FORMAT or index["digest"] != _rows_digest(slices):
            return None
        count = sum(info.pixels for info in infos)
        path = folder / f"{part}.npy"
        small = path.stat().st_size < memory_limit_gb * 1e9
        array = np.load(path, mmap_mode=None if small else "r", allow_pickle=False)
        if array.shape != (3, count) or array.dtype != np.uint16:
            return None
        return PlaneSet(
            infos=infos,
            pixels=array[0],
            labels=array[1],
            flows=array[2].view(np.int8).reshape(-1, 2),
            step=np.array(entry["step"], dtype=np.float64),
            offset=np.array(entry["offset"], dtype=np.float64),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_tiffs(folder: Path, infos: tuple[PlaneInfo, ...]) -> PlaneSet:
    count = sum(info.pixels for info in infos)
    pixels, labels = np.empty(count, np.uint16), np.empty(count, np.uint16)
    flows = np.empty((count, 2), np.int8)
    step, offset = _fill(folder, infos, pixels, labels, flows)
    return PlaneSet(infos, pixels, labels, flows, step, offset)


def _fill(
    folder: Path,
    infos: tuple[PlaneInfo, ...],
    pixels: NDArray[np.uint16],
    labels: NDArray[np.uint16],
    flows: NDArray[np.int8],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read the TIFF files of all planes into flat arrays; give each plane's step and offset."""
    starts = np.concatenate([[0], np.cumsum([info.pixels for info in infos], dtype=np.int64)])
    step, offset = np.ones(len(infos)), np.zeros(len(infos))

    def read_one(plane: int) -> None:
        info = infos[plane]
        here = slice(starts[plane], starts[plane + 1])
        image_path = folder / info.file
        image = _read_tiff(image_path, (info.height, info.width))
        # labels, foreground, dy, dx in one file: the labels need not be read again
        targets_path = image_path.with_name(image_path.stem + "_flows.tif")
        targets = _read_tiff(targets_path, (4, info.height, info.width))
        stored, step[plane], offset[plane] = quantise_image(image)
        pixels[here] = stored.ravel()
        labels[here] = targets[0].astype(np.uint16).ravel()
        flows[here] = quantise_flows(targets[2:4]).reshape(2, -1).T

    # zlib leaves the interpreter lock, so threads decode side by side
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(read_one, range(len(infos))):
            pass
    return step, offset


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
