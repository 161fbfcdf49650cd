"""What is trained, by the kind of network: the network to start from, and its examples.

Reading a slice data set: from its TIFF files, or from the packed copy.

Reading the data set of a 3D network, without reading its voxels.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import network_from_state, new_network
from nuclei3d.networks.folder import load_model, read_state, require_model
from nuclei3d.networks.planning import plan_architecture, plan_patch
from nuclei3d.networks.unet3d import (
    Targets,
    VolumeNetwork,
    VolumeSpec,
    count_parameters,
    describe,
    new_volume_network,
    same_architecture,
)
from nuclei3d.training.crops import CropGrid
from nuclei3d.training.examples import Examples
from nuclei3d.training.samples import (
    SampleArrays,
    SampleInfo,
    SampleNuclei,
    SampleSet,
    SampleView,
    quantise_flows,
    quantise_image,
)

if TYPE_CHECKING:
    from torch import nn

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
    infos: dict[str, tuple[SampleInfo, ...]]
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
    infos: dict[str, list[SampleInfo]] = {}
    try:
        # the volumes of a 3D network are read by `training_volumes`
        of_planes = summary.get("network", "views2d") == "views2d"
        with manifest_path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file) if of_planes else ():
                infos.setdefault(row["part"], []).append(_info(row, float(summary["voxel_um"])))
    except (KeyError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{manifest_path} is damaged ({error}); make the slices again with 'nuclei3d prepare'"
        ) from None
    digest = hashlib.md5(manifest_path.read_bytes(), usedforsecurity=False)
    digest.update(f"{summary['diameter_px']} {summary['nucleus_diameter_um']}".encode())
    return Slices(folder, summary, {part: tuple(rows) for part, rows in infos.items()}, digest.hexdigest())


_VIEWS: dict[str, SampleView] = {"xy": "xy", "xz": "xz", "yz": "yz"}


def _info(row: dict[str, str], voxel_um: float) -> SampleInfo:
    return SampleInfo(
        file=row["file"],
        embryo=row["embryo"],
        frame=row["frame"],
        view=_VIEWS[row["view"]],
        index=int(row["index"]),
        shape=(1, int(row["height"]), int(row["width"])),
        voxel_size=VoxelSize(voxel_um, voxel_um, voxel_um),
        nuclei=int(row["nuclei"]),
        min_contrast=float(row["min_contrast"] or "nan"),
        norm_low=float(row["norm_low"]),
        norm_high=float(row["norm_high"]),
    )


def load_planes(slices: Slices, part: str, memory_limit_gb: float = 2.0) -> SampleSet:
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
    slices: Slices, part: str, infos: tuple[SampleInfo, ...], memory_limit_gb: float
) -> SampleSet | None:
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
    places = np.concatenate([[0], np.cumsum([6 * math.prod(info.shape) for info in infos], dtype=np.int64)])
    if size != places[-1] or len(step) != len(infos):
        return None
    # reading, not mapping: what the system caches then does not count as this process' memory
    file = path.open("rb", buffering=0)
    kept: list[SampleArrays | None] | None = [None] * len(infos) if size < memory_limit_gb * 1e9 else None

    def read(plane: int) -> SampleArrays:
        if kept is not None and (known := kept[plane]) is not None:
            return known
        first = int(places[plane])
        data = os.pread(file.fileno(), int(places[plane + 1]) - first, first)
        arrays = _split_plane(data, infos[plane])
        if kept is not None:
            kept[plane] = arrays
        return arrays

    return _plane_set(infos, step, offset, read)


def _plane_set(
    infos: tuple[SampleInfo, ...],
    step: NDArray[np.float64],
    offset: NDArray[np.float64],
    read: Callable[[int], SampleArrays],
) -> SampleSet:
    power = np.full((len(infos), 3), np.nan)
    return SampleSet(infos, step, offset, (SampleNuclei.unknown(),) * len(infos), power, read)


def _split_plane(data: bytes, info: SampleInfo) -> SampleArrays:
    shape, count = info.shape, math.prod(info.shape)
    return SampleArrays(
        np.frombuffer(data, np.uint16, count).reshape(shape),
        np.frombuffer(data, np.uint16, count, 2 * count).reshape(shape),
        np.frombuffer(data, np.int8, 2 * count, 4 * count).reshape(*shape, 2),
    )


def _read_tiffs(folder: Path, infos: tuple[SampleInfo, ...]) -> SampleSet:
    with _readers() as pool:
        planes = list(pool.map(lambda info: _read_plane(folder, info), infos))
    arrays = [plane for plane, _, _ in planes]
    return _plane_set(
        infos,
        np.array([step for _, step, _ in planes], dtype=np.float64),
        np.array([offset for _, _, offset in planes], dtype=np.float64),
        arrays.__getitem__,
    )


def _readers() -> ThreadPoolExecutor:
    # zlib leaves the interpreter lock, so threads decode side by side
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def _read_plane(folder: Path, info: SampleInfo) -> tuple[SampleArrays, float, float]:
    """Read a plane's TIFF files; give its arrays, and step and offset of its intensities."""
    image_path = folder / info.file
    image = _read_tiff(image_path, info.shape[1:])
    # labels, foreground, dy, dx in one file: the labels need not be read again
    targets_path = image_path.with_name(image_path.stem + "_flows.tif")
    targets = _read_tiff(targets_path, (4, *info.shape[1:]))
    stored, step, offset = quantise_image(image)
    labels, flows = targets[0].astype(np.uint16), quantise_flows(targets[2:4])
    return SampleArrays(stored[None], labels[None], flows[None]), step, offset


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


NUCLEI_FILE = "nuclei.csv"
SUFFIXES = ("_img", "_lbl", "_flows")
"""Of the files of a volume: intensities, labels, flows."""

_MEND = "make the data set again with 'nuclei3d prepare'"


def load_volumes(slices: Slices, part: str) -> SampleSet:
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
        infos = tuple(_info_volumes(row) for row in rows)
        step, offset = (np.array([float(row[name]) for row in rows]) for name in ("step", "offset"))
        power = [[float(row[f"flow_power_{axis}"] or "nan") for axis in "zyx"] for row in rows]
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}; {_MEND}") from None
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{folder}: the manifest is damaged ({error}); {_MEND}") from None
    tables = []
    for info in infos:
        table = np.array(nuclei[info.file], dtype=np.float32).reshape(-1, 5)
        tables.append(SampleNuclei(table[:, :3], table[:, 3], table[:, 4]))
    arrays = [_map(folder, info) for info in infos]
    return SampleSet(
        infos=infos,
        step=step,
        offset=offset,
        nuclei=tuple(tables),
        flow_power=np.array(power).reshape(-1, 3),
        read=arrays.__getitem__,
    )


def _info_volumes(row: dict[str, str]) -> SampleInfo:
    return SampleInfo(
        file=row["file"],
        embryo=row["embryo"],
        frame=row["frame"],
        view="volume",
        index=0,
        nuclei=int(row["nuclei"]),
        min_contrast=float(row["min_contrast"] or "nan"),
        norm_low=float(row["norm_low"]),
        norm_high=float(row["norm_high"]),
        shape=(int(row["depth"]), int(row["height"]), int(row["width"])),
        voxel_size=VoxelSize.of([float(row[f"voxel_{axis}_um"]) for axis in "zyx"]),
    )


def _map(folder: Path, info: SampleInfo) -> SampleArrays:
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
    return SampleArrays(maps[0], maps[1], maps[2])


@dataclass(frozen=True)
class Training:
    """A network to train and its examples.

    Attributes
    ----------
    network
        To start from.
    start_digest
        Digest of where its weights come from.
    spec
        Of a 3D network; None for a 2D one.
    examples
        What it is trained on.
    infos
        The planes (volumes) that crops are drawn from.
    planes
        What a 2D network is trained on; None for a 3D one.
    plan
        What there is, in words.
    """

    network: nn.Module
    start_digest: str
    spec: VolumeSpec | None
    examples: Examples
    infos: tuple[SampleInfo, ...]
    planes: SampleSet | None
    plan: str


def open_training(params: Params, described: Slices) -> Training:
    """Open the data set and make the network.

    Raises
    ------
    InputError
        If the data set was prepared for the other kind of network, is unusable, or the weights to start from
        are.
    """
    wanted = params.train.network
    if described.network != wanted:
        raise InputError(
            f"{described.folder} was prepared for train.network '{described.network}', not '{wanted}'; run "
            f"'nuclei3d prepare --set train.network={wanted}', or train with "
            f"--set train.network={described.network}"
        )
    return _open_volumes(params, described) if wanted == "full3d" else _open_planes(params, described)


def _open_planes(params: Params, described: Slices) -> Training:
    settings = params.train
    network: nn.Module = new_network(settings.diameter_px, params.seed)
    digest = "scratch"
    if settings.start_from is not None:
        weights, digest = _start_weights(settings.start_from)
        started = network_from_state(read_state(weights), where=str(weights))
        with torch.no_grad():
            started.diam_mean.fill_(settings.diameter_px)
        network = started
    planes = load_planes(described, "train", settings.memory_limit_gb)
    validation = load_planes(described, "validation", settings.memory_limit_gb)
    if not len(planes):
        raise InputError(
            f"{described.folder} holds no training planes; make the slices again with 'nuclei3d prepare'"
        )
    sparse = sum(info.nuclei < settings.min_train_masks for info in planes.infos)
    if sparse:
        weight = settings.sampling.sparse
        say(
            f"{sparse} of {len(planes)} planes show fewer than {settings.min_train_masks} nuclei"
            + (f"; they are drawn with weight {weight:g}" if weight else "; they are left out")
            + " (train.sampling.sparse)"
        )
    return Training(
        network,
        digest,
        None,
        Examples(
            planes,
            validation,
            settings,
            CropGrid.of_planes(settings, described.diameter_px),
            seed=params.seed,
        ),
        planes.infos,
        planes,
        f"{len(planes)} planes, {len(validation)} for validation",
    )


def _open_volumes(params: Params, described: Slices) -> Training:
    settings = params.train
    spec = volume_spec(params, described)
    network, digest = new_volume_network(spec, params.seed), "scratch"
    if settings.start_from is not None:
        _, digest = _start_weights(settings.start_from)
        network = _volume_start(Path(settings.start_from), spec)
    volumes, validation = (load_volumes(described, part) for part in ("train", "validation"))
    if not len(volumes):
        raise InputError(f"{described.folder} holds no training volumes; make them with 'nuclei3d prepare'")
    patch = " x ".join(map(str, spec.patch))
    return Training(
        network,
        digest,
        spec,
        Examples(
            volumes,
            validation,
            settings,
            CropGrid.of_volumes(settings, spec, float(described.summary["nucleus_diameter_um"])),
            seed=params.seed,
        ),
        volumes.infos,
        None,
        f"{len(volumes)} volumes, {len(validation)} for validation, in patches of {patch} voxels; a 3D "
        f"network of {count_parameters(network) / 1e6:.2g} M parameters for anisotropy {spec.anisotropy:.3g} "
        f"({describe(spec.architecture)})",
    )


def volume_spec(params: Params, described: Slices) -> VolumeSpec:
    """Shape the 3D network after the voxel size of the data set and the size of its nuclei."""
    settings, wanted = params.train, params.train.full3d
    try:
        depth_um = float(described.summary["voxel_z_um"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{described.folder}/summary.json does not say the voxel size along z; make the data set again "
            "with 'nuclei3d prepare'"
        ) from None
    edge_um = float(described.summary["nucleus_diameter_um"]) / settings.diameter_px
    anisotropy = round(depth_um / edge_um, 4)
    architecture = plan_architecture(anisotropy, wanted.profile, wanted.pooling, wanted.style)
    multiple = architecture.multiple
    patch = wanted.patch or plan_patch(architecture, settings.diameter_px, anisotropy, wanted.patch_diameters)
    if any(size % factor for size, factor in zip(patch, multiple, strict=True)):
        raise InputError(
            f"train.full3d.patch {list(patch)} does not suit the network: (z, y, x) must be multiples of "
            f"{list(multiple)}"
        )
    targets: Targets = "tanh" if described.summary.get("targets") == "tanh" else "heat"
    return VolumeSpec(architecture, anisotropy, patch, targets)


def _start_weights(start_from: str) -> tuple[Path, str]:
    """Find the weights to start from, and digest them."""
    path = Path(start_from)
    require_model(path, "train.start_from")
    weights = load_model(path).path if path.is_dir() else path
    return weights, hashlib.md5(weights.read_bytes(), usedforsecurity=False).hexdigest()


def _volume_start(path: Path, spec: VolumeSpec) -> VolumeNetwork:
    network = load_model(path).network
    if not same_architecture(network, spec):
        raise InputError(
            f"train.start_from: {path} holds another network than this training shapes "
            f"({describe(spec.architecture)}, targets {spec.targets}); give a 3D model trained at about the "
            "same voxel size with the same train.full3d.profile, or null"
        )
    started = new_volume_network(spec, 0)
    started.load_state_dict(network.state_dict())
    return started
