"""From labelled embryos to a data set of planes with flows, ready for training here or in stock Cellpose.

How both kinds of data set begin: a labelled frame is read, freed of debris, its nuclei are measured.

The data set of a 2D network: planes of three views with their flows, as Cellpose reads them.

The data set of a 3D network: every labelled frame as a volume with its 3D flows, ready to be mapped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import tifffile
from numpy.typing import NDArray

from nuclei3d.config import Params, params_as_dict
from nuclei3d.console import progress_bar, say
from nuclei3d.errors import InputError
from nuclei3d.flows import flows_2d, flows_3d, tanh_flows_3d
from nuclei3d.grid import (
    IntensityRange,
    isotropic_shape,
    measure_range,
    resize_linear,
    resize_nearest,
)
from nuclei3d.images.embryos import EmbryoFrame, LabelledVolume, find_embryos, read_labelled, split_embryos
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.outputs import refuse_foreign_folder, whole_folder
from nuclei3d.scoring.contrast import contrast_edges, nucleus_contrast
from nuclei3d.stages.training_data import MANIFEST_FILE, NUCLEI_FILE, SUFFIXES, SUMMARY_FILE, pack_planes
from nuclei3d.training.samples import compact_type, measure_flow_power, quantise_flows, quantise_image
from nuclei3d.training.slicing import (
    Plane,
    cut_planes,
    drop_small_labels,
    nucleus_volumes_um3,
    sphere_diameter_um,
    to_isotropic,
)

Record = TypeVar("Record")


@dataclass(frozen=True)
class PreparedFrame(Generic[Record]):
    """What one frame gave besides its files.

    Attributes
    ----------
    records
        Its rows of manifest.csv.
    voxel_um
        Edge of a pixel in x and y, as stored.
    volumes_um3, contrasts
        Of its nuclei in 3D; a contrast may be nan.
    labels_left_out
        How many were too small.
    """

    records: tuple[Record, ...]
    voxel_um: float
    volumes_um3: tuple[float, ...]
    contrasts: tuple[float, ...]
    labels_left_out: int


@dataclass(frozen=True)
class MeasuredFrame:
    """A frame with what is known of its nuclei.

    Attributes
    ----------
    volume
        Without the labels that are too small.
    intensity
        What is 0 and 1 in normalised intensities.
    volumes_um3
        Volume by label.
    contrasts
        float64 (largest label + 1,); nan where there is none.
    labels_left_out
        How many were too small.
    """

    volume: LabelledVolume
    intensity: IntensityRange
    volumes_um3: dict[int, float]
    contrasts: NDArray[np.float64]
    labels_left_out: int

    def faintest(self, labels: NDArray[np.integer[Any]]) -> float:
        """Give the lowest contrast among some labels, as the manifest has it; nan if none is known."""
        known = self.contrasts[labels]
        known = known[np.isfinite(known)]
        return round(float(known.min()), 4) if len(known) else float("nan")

    def figures(self) -> tuple[tuple[float, ...], tuple[float, ...], int]:
        """Give volumes and contrasts of the nuclei and the labels left out, as in `PreparedFrame`."""
        contrasts = tuple(float(self.contrasts[label]) for label in self.volumes_um3)
        return tuple(self.volumes_um3.values()), contrasts, self.labels_left_out


def measure_frame(frame: EmbryoFrame, params: Params) -> MeasuredFrame:
    """Read a frame, drop its labels below prepare.min_volume_um3 and measure the others."""
    volume = read_labelled(frame, params.data)
    norm = params.normalization
    intensity = measure_range(volume.image, norm.lower_percentile, norm.upper_percentile, norm.noise_floor)
    kept, dropped = drop_small_labels(volume.labels, volume.voxel_size, params.prepare.min_volume_um3)
    return MeasuredFrame(
        replace(volume, labels=kept.astype(np.uint32, copy=False)),
        intensity,
        nucleus_volumes_um3(kept, volume.voxel_size),
        nucleus_contrast(volume.image, kept, volume.voxel_size),
        dropped,
    )


@dataclass(frozen=True)
class PlaneRecord:
    """One row of manifest.csv: where a plane came from and what is on it."""

    part: str
    file: str
    embryo: str
    frame: str
    view: str
    index: int
    nuclei: int
    min_contrast: float
    norm_low: float
    norm_high: float
    height: int
    width: int
    md5: str


def slice_frame(task: tuple[str, EmbryoFrame], params: Params, folder: Path) -> PreparedFrame[PlaneRecord]:
    """Cut one frame and write its planes into ``folder/<part>``."""
    part, frame = task
    measured = measure_frame(frame, params)
    volume, wanted = measured.volume, params.prepare
    isotropic = to_isotropic(volume.image, volume.labels, volume.voxel_size, wanted.downsample_xy)
    records = []
    for plane in cut_planes(
        isotropic,
        {"xy": wanted.step_xy, "xz": wanted.step_xz, "yz": wanted.step_yz},
        min_nuclei=wanted.min_nuclei,
        min_area_px=wanted.min_area_px,
        sparse_share=wanted.sparse_share,
    ):
        stem = f"{frame.embryo}_{frame.frame}_{plane.view}_{plane.index:04d}"
        md5 = _write_plane(folder / part, stem, plane)
        height, width = plane.labels.shape
        records.append(
            PlaneRecord(
                part=part,
                file=f"{part}/{stem}_img.tif",
                embryo=frame.embryo,
                frame=frame.frame,
                view=plane.view,
                index=plane.index,
                nuclei=plane.nuclei,
                min_contrast=measured.faintest(plane.label_of[1:]),
                norm_low=measured.intensity.low,
                norm_high=measured.intensity.high,
                height=height,
                width=width,
                md5=md5,
            )
        )
    return PreparedFrame(tuple(records), isotropic.voxel_um, *measured.figures())


def _write_plane(folder: Path, stem: str, plane: Plane) -> str:
    """Write image, labels and flows where Cellpose looks for them; return the md5 of the three."""
    # half precision is more than the targets hold; the zeroed digits compress to almost nothing
    flow = flows_2d(plane.labels).astype(np.float16).astype(np.float32)
    foreground = (plane.labels > 0).astype(np.float32)
    targets = np.stack([plane.labels.astype(np.float32), foreground, flow[0], flow[1]])
    digest = hashlib.md5(usedforsecurity=False)
    for suffix, array in (("_img", plane.image), ("_lbl", plane.labels), ("_img_flows", targets)):
        encoded = _encode_tiff(array)
        digest.update(encoded)
        (folder / f"{stem}{suffix}.tif").write_bytes(encoded)
    return digest.hexdigest()


def _encode_tiff(array: NDArray[np.generic]) -> bytes:
    buffer = BytesIO()
    tifffile.imwrite(buffer, array, compression="zlib", photometric="minisblack", metadata=None)
    return buffer.getvalue()


NUCLEI_COLUMNS = ("file", "label", "z", "y", "x", "volume_um3", "contrast")


@dataclass(frozen=True)
class VolumeRecord:
    """One row of manifest.csv: where a volume came from, what is in it, and how it is stored."""

    part: str
    file: str
    embryo: str
    frame: str
    nuclei: int
    min_contrast: float
    norm_low: float
    norm_high: float
    depth: int
    height: int
    width: int
    voxel_z_um: float
    voxel_y_um: float
    voxel_x_um: float
    step: float
    offset: float
    flow_power_z: float
    flow_power_y: float
    flow_power_x: float
    md5: str


@dataclass(frozen=True)
class PreparedVolume(PreparedFrame[VolumeRecord]):
    """What one frame gave; `nuclei` are its rows of the table of nuclei."""

    nuclei: tuple[tuple[Any, ...], ...]


def store_frame(task: tuple[str, EmbryoFrame], params: Params, folder: Path) -> PreparedVolume:
    """Write one frame into ``folder/<part>``: image, labels and flows as .npy, which training maps.

    x and y are downsampled as for planes, z keeps its planes. The image is uint16, labels are 1..n, flows
    int8 (Z, Y, X, 3) in units of 1/127.
    """
    part, frame = task
    measured = measure_frame(frame, params)
    image, labels, voxel_size = _to_grid(measured.volume, params.prepare.downsample_xy)
    numbers = np.unique(labels)
    numbers = numbers[numbers > 0]
    # gaps go: the table of nuclei has one row for each of 1..n
    new = np.zeros(len(measured.contrasts), np.uint32)
    new[numbers] = np.arange(1, len(numbers) + 1)
    labels = new[labels]
    if params.prepare.targets == "tanh":
        flows = tanh_flows_3d(labels)
    else:
        flows = flows_3d(labels, voxel_size, threads=None if params.prepare.workers == 1 else 1)
    pixels, step, offset = quantise_image(image)
    stem = f"{frame.embryo}_{frame.frame}"
    arrays = (pixels, compact_type(labels), quantise_flows(flows))
    depth, height, width = labels.shape
    power = measure_flow_power(flows, labels)
    record = VolumeRecord(
        part=part,
        file=f"{part}/{stem}",
        embryo=frame.embryo,
        frame=frame.frame,
        nuclei=len(numbers),
        min_contrast=measured.faintest(numbers),
        norm_low=measured.intensity.low,
        norm_high=measured.intensity.high,
        depth=depth,
        height=height,
        width=width,
        voxel_z_um=voxel_size.z,
        voxel_y_um=voxel_size.y,
        voxel_x_um=voxel_size.x,
        step=step,
        offset=offset,
        flow_power_z=power[0],
        flow_power_y=power[1],
        flow_power_x=power[2],
        md5=_write_arrays(folder / part, stem, arrays),
    )
    nuclei = _nuclei(record.file, labels, voxel_size, measured.contrasts[numbers])
    return PreparedVolume((record,), voxel_size.x, *measured.figures(), tuple(nuclei))


def _to_grid(
    volume: LabelledVolume, downsample_xy: float
) -> tuple[NDArray[np.generic], NDArray[np.integer[Any]], VoxelSize]:
    """Downsample x and y; z keeps its planes unless they lie closer than x and y then do."""
    edge = volume.voxel_size.x * downsample_xy
    depth, height, width = isotropic_shape(volume.image.shape, volume.voxel_size, edge)
    shape = (min(volume.image.shape[0], depth), height, width)
    if min(shape) < 2:
        raise InputError(
            f"prepare.downsample_xy = {downsample_xy:g} shrinks a volume of shape {volume.image.shape} to "
            f"{shape}; give a smaller number"
        )
    edges = [
        size * old / new
        for size, old, new in zip(volume.voxel_size.zyx, volume.image.shape, shape, strict=True)
    ]
    image: NDArray[np.generic] = resize_linear(volume.image, shape)
    if np.issubdtype(volume.image.dtype, np.unsignedinteger) and volume.image.dtype.itemsize <= 2:
        image = np.rint(image).astype(np.uint16)
    labels = resize_nearest(volume.labels, shape).astype(np.uint32, copy=False)
    return image, labels, VoxelSize.of(edges)


def _write_arrays(folder: Path, stem: str, arrays: Sequence[NDArray[np.generic]]) -> str:
    """Write image, labels and flows; return the md5 of the three."""
    digest = hashlib.md5(usedforsecurity=False)
    for suffix, array in zip(SUFFIXES, arrays, strict=True):
        path = folder / f"{stem}{suffix}.npy"
        np.save(path, np.ascontiguousarray(array), allow_pickle=False)
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _nuclei(
    file: str, labels: NDArray[np.integer[Any]], voxel_size: VoxelSize, contrasts: NDArray[np.float64]
) -> list[tuple[Any, ...]]:
    count = len(contrasts) + 1
    flat = labels.ravel()
    voxels = np.bincount(flat, minlength=count)[1:]
    centres = []
    for axis, size in enumerate(labels.shape):
        along = [1, 1, 1]
        along[axis] = size
        place = np.broadcast_to((np.arange(size) + 0.5).reshape(along), labels.shape)
        centres.append(np.bincount(flat, weights=place.ravel(), minlength=count)[1:] / voxels)
    return [
        (
            file,
            label,
            *(f"{centre[label - 1]:.6g}" for centre in centres),
            f"{voxels[label - 1] * voxel_size.volume_um3:.6g}",
            f"{contrasts[label - 1]:.6g}" if np.isfinite(contrasts[label - 1]) else "",
        )
        for label in range(1, count)
    ]


def write_nuclei(path: Path, results: Sequence[PreparedVolume]) -> None:
    """Write the table of all nuclei: positions in voxels of the stored volume, volume and contrast."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(NUCLEI_COLUMNS)
        writer.writerows(row for result in results for row in result.nuclei)


PARTS = ("train", "validation", "test")

Task = tuple[str, EmbryoFrame]
"""The part of the data set that a frame goes into, and the frame."""

Records = Sequence[PlaneRecord | VolumeRecord]
FrameResult = TypeVar("FrameResult")


@dataclass(frozen=True)
class PrepareResult:
    """What `prepare` made; `summary` is the content of summary.json."""

    out: Path
    summary: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        return {"out": str(self.out), **self.summary}


def prepare(params: Params, data: Path, out: Path) -> PrepareResult:
    """Cut every labelled frame of a data set into planes and write them with their flows.

    For a 3D network (train.network: full3d) every frame is written as a volume with 3D flows instead.

    Frames are read, cut and written one at a time in each of `prepare.workers` processes, so memory does
    not grow with their number. The same input gives the same bytes.

    Parameters
    ----------
    params
        The sections data, normalization and prepare are used, and train.network.
    data
        ``<embryo>/images/<frame>.tif`` and ``<embryo>/labels/<frame>.tif``.
    out
        The folder to write: ``train``, ``validation``, ``test``, manifest.csv, summary.json, slices.png, and
        ``packed``, a copy of the planes that training reads without decoding (volumes: nuclei.csv instead of
        the last two). It appears when all is done; one that is there is replaced.

    Raises
    ------
    InputError
        If the data set or the split is unusable, or no training plane holds enough nuclei.
    """
    refuse_foreign_folder(out, SUMMARY_FILE, "slice data set")
    split = split_embryos(find_embryos(data), params.data.split)
    tasks = [(part, frame) for part in PARTS for frame in split.of(part)]
    kind = "volumes" if params.train.network == "full3d" else "planes"
    with whole_folder(out) as folder:
        for part in PARTS:
            (folder / part).mkdir()
        fill = _fill_with_volumes if kind == "volumes" else _fill_with_planes
        summary = fill(folder, params, data, tasks)
    say(
        f"{summary[kind]['train']} training {kind} in {out}; nuclei measure "
        f"{summary['nucleus_diameter_um']:.3g} um ({summary['diameter_px']:.3g} px on the planes)"
    )
    return PrepareResult(out, summary)


def _fill_with_planes(folder: Path, params: Params, data: Path, tasks: Sequence[Task]) -> dict[str, Any]:
    """Write planes, what describes them, a sheet to look at, and the packed copy; give the summary."""
    from nuclei3d.report.figures import draw_slices_sheet

    results = _do_all(tasks, params, partial(slice_frame, params=params, folder=folder))
    records = [record for result in results for record in result.records]
    if not any(record.part == "train" for record in records):
        raise InputError(
            f"no training plane of {data} shows {params.prepare.min_nuclei} nuclei or more; lower "
            "prepare.min_nuclei, or give frames with more labelled nuclei"
        )
    summary = _summarise(params, data, tasks, results, records)
    _write_description(folder, summary, records)
    draw_slices_sheet(folder, folder / "slices.png")
    pack_planes(folder)
    return summary


def _fill_with_volumes(folder: Path, params: Params, data: Path, tasks: Sequence[Task]) -> dict[str, Any]:
    """Write volumes, what describes them, and the table of their nuclei; give the summary."""
    results = _do_all(tasks, params, partial(store_frame, params=params, folder=folder))
    records = [record for result in results for record in result.records]
    if not any(record.part == "train" and record.nuclei for record in records):
        raise InputError(f"no training frame of {data} has a labelled nucleus")
    summary = _summarise(params, data, tasks, results, records)
    depths = [record.voxel_z_um for record in records if record.part == "train"]
    summary |= {"voxel_z_um": round(float(np.median(depths)), 6), "targets": params.prepare.targets}
    _write_description(folder, summary, records)
    write_nuclei(folder / NUCLEI_FILE, results)
    return summary


def _do_all(
    tasks: Sequence[Task],
    params: Params,
    work: Callable[[Task], FrameResult],
) -> list[FrameResult]:
    workers = min(params.prepare.workers or len(os.sched_getaffinity(0)), len(tasks))
    results: list[FrameResult] = []
    with progress_bar("prepare", total=len(tasks)) as bar:

        def collect(produced: Iterable[FrameResult]) -> None:
            for result in produced:
                results.append(result)
                bar.advance()

        if workers == 1:
            collect(map(work, tasks))
        else:
            # spawned, not forked: numba's and torch's threads do not survive a fork
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                collect(pool.map(work, tasks))
    return results


def _summarise(
    params: Params,
    data: Path,
    tasks: Sequence[Task],
    results: Sequence[PreparedFrame[Any]],
    records: Records,
) -> dict[str, Any]:
    training = [result for (part, _), result in zip(tasks, results, strict=True) if part == "train"]
    volumes = np.concatenate([result.volumes_um3 for result in training])
    contrasts = np.concatenate([result.contrasts for result in training])
    pixel_sizes = np.array([result.voxel_um for result in results])
    voxel_um = float(np.median(pixel_sizes))
    if np.ptp(pixel_sizes) > 0.02 * voxel_um:
        raise InputError(
            f"the frames of {data} have different voxel sizes in x ({pixel_sizes.min():g} to "
            f"{pixel_sizes.max():g} um on the planes); prepare them as separate data sets or resample them"
        )
    diameter_um = float(np.median([sphere_diameter_um(volume) for volume in volumes]))
    quintiles = contrast_edges(contrasts)
    digest = hashlib.md5(
        "".join(record.file + record.md5 for record in records).encode(), usedforsecurity=False
    )
    chosen = params_as_dict(params)
    # the number of processes changes nothing that is written
    del chosen["prepare"]["workers"]
    return {
        "data": str(data),
        "nucleus_diameter_um": round(diameter_um, 4),
        "voxel_um": round(voxel_um, 6),
        "diameter_px": round(diameter_um / voxel_um, 3),
        "contrast_quintiles": [round(float(edge), 4) for edge in quintiles],
        "frames": {part: sum(1 for p, _ in tasks if p == part) for part in PARTS},
        "embryos": {part: sorted({f.embryo for p, f in tasks if p == part}) for part in PARTS},
        "network": params.train.network,
        "volumes" if params.train.network == "full3d" else "planes": {
            part: sum(1 for record in records if record.part == part) for part in PARTS
        },
        "training_nuclei": len(volumes),
        "labels_left_out": sum(result.labels_left_out for result in results),
        "params": {name: chosen[name] for name in ("data", "normalization", "prepare")},
        "md5": digest.hexdigest(),
    }


def _write_description(folder: Path, summary: dict[str, Any], records: Records) -> None:
    with (folder / MANIFEST_FILE).open("w", newline="") as file:
        columns = [field.name for field in fields(records[0])]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(record) for record in records)
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
