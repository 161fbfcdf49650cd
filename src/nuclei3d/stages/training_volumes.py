"""Reading the data set of a 3D network into a `VolumeSet`, without reading its voxels."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from nuclei3d.core.training.volume_set import NucleusTable, VolumeArrays, VolumeInfo, VolumeSet
from nuclei3d.errors import InputError
from nuclei3d.stages.training_planes import MANIFEST_FILE, Slices
from nuclei3d.volumes.voxel_size import VoxelSize

NUCLEI_FILE = "nuclei.csv"
SUFFIXES = ("_img", "_lbl", "_flows")
"""Of the files of a volume: intensities, labels, flows."""

_MEND = "make the data set again with 'nuclei3d prepare'"


def load_volumes(slices: Slices, part: str) -> VolumeSet:
    """Open the volumes of ``train``, ``validation`` or ``test``; voxels are mapped from their files.

    Raises
    ------
    InputError
        If a file is missing, unreadable or of another shape than the manifest says.
    """
    folder = slices.folder
    try:
        with (folder / MANIFEST_FILE).open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["part"] == part]
        with (folder / NUCLEI_FILE).open(newline="", encoding="utf-8") as file:
            nuclei: dict[str, list[list[float]]] = {row["file"]: [] for row in rows}
            for row in csv.DictReader(file):
                if row["file"] in nuclei:
                    names = ("z", "y", "x", "volume_um3", "contrast")
                    nuclei[row["file"]].append([float(row[name] or "nan") for name in names])
        infos = tuple(_info(row) for row in rows)
        step, offset = (np.array([float(row[name]) for row in rows]) for name in ("step", "offset"))
        power = [[float(row[f"flow_power_{axis}"] or "nan") for axis in "zyx"] for row in rows]
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}; {_MEND}") from None
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{folder}: the manifest is damaged ({error}); {_MEND}") from None
    tables = []
    for info in infos:
        table = np.array(nuclei[info.file], dtype=np.float32).reshape(-1, 5)
        tables.append(NucleusTable(table[:, :3], table[:, 3], table[:, 4]))
    arrays = [_map(folder, info) for info in infos]
    return VolumeSet(
        infos=infos,
        step=step,
        offset=offset,
        nuclei=tuple(tables),
        flow_power=np.array(power).reshape(-1, 3),
        read=arrays.__getitem__,
    )


def _info(row: dict[str, str]) -> VolumeInfo:
    return VolumeInfo(
        file=row["file"],
        embryo=row["embryo"],
        frame=row["frame"],
        nuclei=int(row["nuclei"]),
        min_contrast=float(row["min_contrast"] or "nan"),
        norm_low=float(row["norm_low"]),
        norm_high=float(row["norm_high"]),
        shape=(int(row["depth"]), int(row["height"]), int(row["width"])),
        voxel_size=VoxelSize.of([float(row[f"voxel_{axis}_um"]) for axis in "zyx"]),
    )


def _map(folder: Path, info: VolumeInfo) -> VolumeArrays:
    maps = []
    for suffix in SUFFIXES:
        path = folder / f"{info.file}{suffix}.npy"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}; {_MEND}") from None
        if array.shape[:3] != info.shape:
            raise InputError(f"{path} has shape {array.shape}, the manifest says {info.shape}; {_MEND}")
        # a plain view of the map: what compiled code takes
        maps.append(np.asarray(array))
    return VolumeArrays(maps[0], maps[1], maps[2])
