"""The prepared data set: what prepare writes and a training reads, planes and volumes in one form.

A sample is (Z, Y, X); a plane has depth 1. Each lies in a file of its own, ``<part>/<name>.bin``, which is
read or mapped without decoding. All is little endian: five float64 (step and offset of the intensities, mean
square of the flow along z, y and x, nan for planes), then labels (uint16, or uint32 where there are more than
65535), intensities (uint16) and flows (int8, Z, Y, X, components). A plane takes 6 bytes a pixel.
"""

from __future__ import annotations

import csv
import hashlib
import math
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError, model_validator

from nuclei3d.config import Params
from nuclei3d.digests import digests_of
from nuclei3d.errors import InputError, first_problem
from nuclei3d.flows import flows_2d
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.outputs import write_table, write_text
from nuclei3d.training.samples import (
    UNKNOWN_FLOW,
    SampleArrays,
    SampleInfo,
    SampleNuclei,
    SampleSet,
    SampleView,
    measure_flow_power,
    quantise_flows,
    quantise_image,
)

SUMMARY_FILE = "summary.json"
MANIFEST_FILE = "manifest.csv"
NUCLEI_FILE = "nuclei.csv"

_MEND = "make the data set again with 'nuclei3d prepare'"
_HEADER = 5 * 8
_PLACE = ("part", "file", "embryo", "frame")
_CONTENT = ("nuclei", "min_contrast", "norm_low", "norm_high")
_PLANE_COLUMNS = (*_PLACE, "view", "index", *_CONTENT, "height", "width", "md5")
_VOLUME_COLUMNS = (
    *(*_PLACE, *_CONTENT, "depth", "height", "width", "voxel_z_um", "voxel_y_um", "voxel_x_um"),
    *("step", "offset", "flow_power_z", "flow_power_y", "flow_power_x", "md5"),
)
_NUCLEI_COLUMNS = ("file", "label", "z", "y", "x", "volume_um3", "contrast")


@dataclass(frozen=True)
class StoredSample:
    """A sample that was written; `md5` is that of the file.

    `nuclei`, float64 (n, 5), has (z, y, x) of the centre in voxels, volume in um3, contrast (nan where
    unknown); it is empty for planes.
    """

    part: str
    info: SampleInfo
    nuclei: NDArray[np.float64]
    step: float
    offset: float
    flow_power: tuple[float, ...]
    md5: str


class SliceSummary(BaseModel):
    """What summary.json says: the facts of a slice data set, by part where there are several.

    `data` is the folder that it was cut from. A typical training nucleus measures `nucleus_diameter_um`, or
    `diameter_px` on planes with pixels of `voxel_um`; `voxel_z_um` is told of volumes alone, as are
    `volumes` and `targets`, and `planes` of planes. `contrast_quintiles` part the training nuclei by
    contrast. `training` is what `nuclei3d.networks.folder.TrainingRange` takes, `frame_digests` what its
    `TrainingFrames` does. `embryo_diameters_um` is there where each embryo was brought to the common scale
    by its own nuclei. `params` has what decided the samples, `md5` is theirs, `sources` tells for each frame
    its part and the digests of its files.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    data: Path
    nucleus_diameter_um: PositiveFloat
    voxel_um: PositiveFloat
    diameter_px: PositiveFloat
    contrast_quintiles: tuple[float, ...]
    frames: dict[str, int] = {}
    embryos: dict[str, tuple[str, ...]] = {}
    network: Literal["views2d", "full3d"] = "views2d"
    planes: dict[str, int] | None = None
    volumes: dict[str, int] | None = None
    training_nuclei: int = 0
    labels_left_out: int = 0
    training: dict[str, tuple[float, float]] | None = None
    params: dict[str, Any] = {}
    md5: str
    frame_digests: dict[str, dict[str, str]] | None = None
    warnings: tuple[str, ...] | None = None
    voxel_z_um: PositiveFloat | None = None
    targets: Literal["heat", "tanh"] | None = None
    sources: dict[str, tuple[str, str]] | None = None
    embryo_diameters_um: dict[str, float] | None = None

    @model_validator(mode="after")
    def _check_contrast(self) -> Self:
        if list(self.contrast_quintiles) != sorted(self.contrast_quintiles):
            raise ValueError("contrast_quintiles must ascend")
        return self

    @property
    def samples(self) -> dict[str, int]:
        """Number of planes or volumes by part."""
        return self.planes or self.volumes or {}


@dataclass(frozen=True)
class Slices:
    """A data set's description.

    `infos` are the rows of manifest.csv by part, `md5s` those of the samples by file; `digest` is the MD5 of
    the manifest, which holds the MD5 of every sample, of the size of nuclei, and of the table of nuclei.
    """

    folder: Path
    summary: SliceSummary
    infos: dict[str, tuple[SampleInfo, ...]]
    md5s: dict[str, str]
    digest: str

    def check_content(self) -> None:
        """Raise InputError where a sample is no longer what prepare wrote; unchanged files are not read."""
        files = [self.folder / f"{name}.bin" for name in self.md5s]
        for file, found, expected in zip(files, digests_of(files), self.md5s.values(), strict=True):
            if found != expected:
                raise InputError(f"{file} was changed since prepare wrote it; {_MEND}")

    def normalization(self, params: Params) -> dict[str, Any]:
        """Give what prepare normalised with, which params.yaml may no longer say."""
        prepared = self.summary.params.get("normalization", {})
        return params.normalization.model_dump() | dict(prepared)


def plane_flows(labels: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.float32]:
    """Compute the flows (2, Y, X) of a plane as they are stored, here and for Cellpose."""
    # half precision is more than the targets hold; in a TIFF the zeroed digits compress to almost nothing
    return flows_2d(labels).astype(np.float16).astype(np.float32)


def store_sample(
    folder: Path,
    part: str,
    info: SampleInfo,
    image: NDArray[np.generic],
    labels: NDArray[np.unsignedinteger[Any]],
    flows: NDArray[np.floating[Any]],
    nuclei: NDArray[np.float64] | None = None,
    unknown: NDArray[np.bool_] | None = None,
) -> StoredSample:
    """Write a sample into the data set that is being made; the same arrays give the same bytes.

    Image and labels are (Z, Y, X), labels 1..n with 0 for background; flows are (components, Z, Y, X), from
    -1 to 1; `unknown` (Z, Y, X) is where nobody looked and labels are 0. The folder of the part is there.
    """
    pixels, step, offset = quantise_image(image)
    power = measure_flow_power(flows, labels)
    stored_flows = quantise_flows(flows)
    if unknown is not None:
        stored_flows[unknown] = UNKNOWN_FLOW
    digest = hashlib.md5(usedforsecurity=False)
    with _path(folder, info).open("wb") as file:
        for values, kind in (
            (np.array([step, offset, *power]), "<f8"),
            (labels, _label_type(info)),
            (pixels, "<u2"),
            (stored_flows, "i1"),
        ):
            array = np.ascontiguousarray(values, dtype=kind)
            file.write(array.data)
            digest.update(array.data)
    table = np.empty((0, 5)) if nuclei is None else nuclei
    return StoredSample(part, info, table, step, offset, power, digest.hexdigest())


def describe_samples(folder: Path, summary: SliceSummary, samples: Sequence[StoredSample]) -> None:
    """Write summary.json, manifest.csv and, of volumes, nuclei.csv."""
    solid = not samples[0].info.is_plane
    columns: tuple[str, ...] = _VOLUME_COLUMNS if solid else _PLANE_COLUMNS
    if any(sample.info.unknown for sample in samples):
        columns = (*columns, "unknown")
    write_table(folder / MANIFEST_FILE, columns, ([_row(s)[name] for name in columns] for s in samples))
    if solid:
        rows = (
            (
                sample.info.file,
                label,
                *(f"{value:.6g}" for value in values[:4]),
                f"{values[4]:.6g}" if np.isfinite(values[4]) else "",
            )
            for sample in samples
            for label, values in enumerate(sample.nuclei, start=1)
        )
        write_table(folder / NUCLEI_FILE, _NUCLEI_COLUMNS, rows)
    write_text(folder / SUMMARY_FILE, summary.model_dump_json(indent=2, exclude_none=True) + "\n")


def _row(sample: StoredSample) -> dict[str, Any]:
    row = {"part": sample.part, **asdict(sample.info), "md5": sample.md5}
    row |= {"step": sample.step, "offset": sample.offset}
    row |= dict(zip(("depth", "height", "width"), sample.info.shape, strict=True))
    for axis, edge, power in zip("zyx", sample.info.voxel_size.zyx, sample.flow_power, strict=True):
        row |= {f"voxel_{axis}_um": edge, f"flow_power_{axis}": power}
    return row


def read_summary(path: Path) -> SliceSummary:
    """Read the summary.json of a slice data set, given as the file or the data set."""
    file = path / SUMMARY_FILE if path.is_dir() else path
    try:
        return SliceSummary.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; nuclei3d prepare writes it") from None
    except ValidationError as error:
        field, _, reason = first_problem(error)
        what = f"{file} is damaged or no summary.json of a slice data set"
        raise InputError(f"{what} ({field}: {reason}); {_MEND}") from None


def read_slices(folder: Path) -> Slices:
    """Read summary.json and manifest.csv."""
    manifest_path = folder / MANIFEST_FILE
    for path in (folder / SUMMARY_FILE, manifest_path):
        if not path.is_file():
            raise InputError(
                f"{folder} is no slice data set: {path.name} is missing; make one with 'nuclei3d prepare'"
            )
    summary = read_summary(folder)
    infos: dict[str, list[SampleInfo]] = {}
    md5s: dict[str, str] = {}
    try:
        with manifest_path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                infos.setdefault(row["part"], []).append(_info(row, summary.voxel_um))
                md5s[row["file"]] = row["md5"]
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{manifest_path} is damaged ({error}); {_MEND}") from None
    digest = hashlib.md5(manifest_path.read_bytes(), usedforsecurity=False)
    digest.update(f"{summary.diameter_px} {summary.nucleus_diameter_um}".encode())
    if (folder / NUCLEI_FILE).is_file():
        digest.update((folder / NUCLEI_FILE).read_bytes())
    by_part = {part: tuple(rows) for part, rows in infos.items()}
    return Slices(folder, summary, by_part, md5s, digest.hexdigest())


def _info(row: dict[str, str], voxel_um: float) -> SampleInfo:
    view: Any = row.get("view", "volume")
    if view not in get_args(SampleView):
        raise ValueError(f"view {view}")
    return SampleInfo(
        file=row["file"],
        embryo=row["embryo"],
        frame=row["frame"],
        view=view,
        index=int(row.get("index", 0)),
        shape=(int(row.get("depth", 1)), int(row["height"]), int(row["width"])),
        voxel_size=VoxelSize.of([float(row.get(f"voxel_{axis}_um", voxel_um)) for axis in "zyx"]),
        nuclei=int(row["nuclei"]),
        min_contrast=float(row["min_contrast"] or "nan"),
        norm_low=float(row["norm_low"]),
        norm_high=float(row["norm_high"]),
        unknown=float(row.get("unknown", 0)),
    )


def load_samples(slices: Slices, part: str, memory_limit_gb: float = 2.0) -> SampleSet:
    """Open the samples of ``train``, ``validation`` or ``test``.

    Planes are read when they are first drawn, and kept if all of them take less than the limit; volumes are
    mapped. A file that is missing or of another size than the manifest says raises InputError at once.
    """
    folder, infos = slices.folder, slices.infos.get(part, ())
    # the heads tell early of a file that is missing or damaged; on a network drive opening takes its time
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        heads = np.array(list(pool.map(lambda info: _read_head(folder, info), infos))).reshape(-1, 5)
    keep = sum(map(_stored_bytes, infos)) < memory_limit_gb * 1e9
    kept: dict[int, SampleArrays] = {}

    def read(sample: int) -> SampleArrays:
        arrays = kept.get(sample)
        if arrays is None:
            arrays = _read_arrays(folder, infos[sample])
            if keep or not infos[sample].is_plane:
                kept[sample] = arrays
        return arrays

    return SampleSet(infos, heads[:, 0], heads[:, 1], _read_nuclei(folder, infos), heads[:, 2:], read)


def _path(folder: Path, info: SampleInfo) -> Path:
    return folder / f"{info.file}.bin"


def _label_type(info: SampleInfo) -> str:
    return "<u2" if info.nuclei < 2**16 else "<u4"


def _stored_bytes(info: SampleInfo) -> int:
    components = 2 if info.is_plane else 3
    return _HEADER + math.prod(info.shape) * (np.dtype(_label_type(info)).itemsize + 2 + components)


def _read_head(folder: Path, info: SampleInfo) -> NDArray[np.float64]:
    path, expected = _path(folder, info), _stored_bytes(info)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == expected:
                return np.frombuffer(file.read(_HEADER), "<f8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; {_MEND}") from None
    shape = " x ".join(map(str, info.shape))
    raise InputError(f"{path} has {size} bytes, not the {expected} of the manifest's {shape}; {_MEND}")


def _read_arrays(folder: Path, info: SampleInfo) -> SampleArrays:
    with _path(folder, info).open("rb") as file:
        # planes are read, not mapped: what the system caches then does not count as this process' memory
        data = file.read() if info.is_plane else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    count = math.prod(info.shape)
    labels = np.frombuffer(data, _label_type(info), count, _HEADER)
    pixels = np.frombuffer(data, "<u2", count, _HEADER + labels.nbytes)
    flows = np.frombuffer(data, np.int8, offset=_HEADER + labels.nbytes + pixels.nbytes)
    shape = info.shape
    return SampleArrays(pixels.reshape(shape), labels.reshape(shape), flows.reshape(*shape, -1))


def _read_nuclei(folder: Path, infos: Sequence[SampleInfo]) -> tuple[SampleNuclei, ...]:
    """Read the tables of the nuclei of volumes; those of planes are empty."""
    found: dict[str, list[list[float]]] = {info.file: [] for info in infos}
    if infos and not infos[0].is_plane:
        path = folder / NUCLEI_FILE
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if row["file"] in found:
                        found[row["file"]].append([float(row[name] or "nan") for name in _NUCLEI_COLUMNS[2:]])
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; {_MEND}") from None
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}); {_MEND}") from None
    tables = (np.array(found[info.file], dtype=np.float32).reshape(-1, 5) for info in infos)
    return tuple(SampleNuclei(table[:, :3], table[:, 3], table[:, 4]) for table in tables)
