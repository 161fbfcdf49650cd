"""From labelled embryos to a data set of planes with flows, ready for training here or in stock Cellpose."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tifffile
from numpy.typing import NDArray

from nuclei3d.config import Params, params_as_dict
from nuclei3d.console import progress_bar, say
from nuclei3d.core.normalization import measure_range
from nuclei3d.core.scoring.contrast import contrast_edges, nucleus_contrast
from nuclei3d.core.slicing import (
    Plane,
    cut_planes,
    drop_small_labels,
    nucleus_volumes_um3,
    sphere_diameter_um,
    to_isotropic,
)
from nuclei3d.core.targets.flow_targets import flows_2d
from nuclei3d.errors import InputError
from nuclei3d.stages.prepared_volumes import (
    FrameVolume,
    VolumeRecord,
    store_frame,
    write_nuclei,
)
from nuclei3d.stages.training_planes import pack_planes
from nuclei3d.stages.training_volumes import NUCLEI_FILE
from nuclei3d.volumes.embryos import EmbryoFrame, find_embryos, read_labelled, split_embryos
from nuclei3d.volumes.whole import whole_folder

PARTS = ("train", "validation", "test")

FrameResult = TypeVar("FrameResult")


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


@dataclass(frozen=True)
class FrameSlices:
    """What one frame gave: its planes, and the size and contrast of its nuclei in 3D."""

    planes: tuple[PlaneRecord, ...]
    voxel_um: float
    volumes_um3: tuple[float, ...]
    contrasts: tuple[float, ...]
    labels_left_out: int


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
        the last two). It appears when all is done;
        one that is there is replaced.

    Raises
    ------
    InputError
        If the data set or the split is unusable, or no training plane holds enough nuclei.
    """
    from nuclei3d.report.slices_sheet import draw_slices_sheet

    _refuse_foreign_folder(out)
    split = split_embryos(find_embryos(data), params.data.split)
    tasks = [(part, frame) for part in PARTS for frame in split.of(part)]
    if params.train.network == "full3d":
        return _prepare_volumes(params, data, out, tasks)
    with whole_folder(out) as folder:
        for part in PARTS:
            (folder / part).mkdir()
        results = _do_all(tasks, params, partial(slice_frame, params=params, folder=folder))
        records = [record for result in results for record in result.planes]
        if not any(record.part == "train" for record in records):
            raise InputError(
                f"no training plane of {data} shows {params.prepare.min_nuclei} nuclei or more; lower "
                "prepare.min_nuclei, or give frames with more labelled nuclei"
            )
        summary = _summarise(params, data, tasks, results, records)
        _write_manifest(folder / "manifest.csv", records)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        draw_slices_sheet(folder, folder / "slices.png")
        pack_planes(folder)
    say(
        f"{summary['planes']['train']} training planes in {out}; nuclei measure "
        f"{summary['nucleus_diameter_um']:.3g} um ({summary['diameter_px']:.3g} px on the planes)"
    )
    return PrepareResult(out, summary)


def _refuse_foreign_folder(out: Path) -> None:
    """Replace only what is missing, empty, or a slice data set."""
    if out.is_dir() and any(out.iterdir()) and not (out / "summary.json").is_file():
        raise InputError(f"{out} exists and is no slice data set; give another folder or remove it yourself")


def _prepare_volumes(
    params: Params, data: Path, out: Path, tasks: Sequence[tuple[str, EmbryoFrame]]
) -> PrepareResult:
    """Write volumes instead of planes: what a 3D network is trained on."""
    with whole_folder(out) as folder:
        for part in PARTS:
            (folder / part).mkdir()
        results = _do_all(tasks, params, partial(store_frame, params=params, folder=folder))
        records = [record for result in results for record in result.records]
        if not any(record.part == "train" and record.nuclei for record in records):
            raise InputError(f"no training frame of {data} has a labelled nucleus")
        summary = _summarise(params, data, tasks, results, records)
        depths = [record.voxel_z_um for record in records if record.part == "train"]
        summary |= {"voxel_z_um": round(float(np.median(depths)), 6), "targets": params.prepare.targets}
        _write_manifest(folder / "manifest.csv", records)
        write_nuclei(folder / NUCLEI_FILE, results)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    say(
        f"{summary['volumes']['train']} training volumes in {out}; nuclei measure "
        f"{summary['nucleus_diameter_um']:.3g} um ({summary['diameter_px']:.3g} px on the planes)"
    )
    return PrepareResult(out, summary)


def _do_all(
    tasks: Sequence[tuple[str, EmbryoFrame]],
    params: Params,
    work: Callable[[tuple[str, EmbryoFrame]], FrameResult],
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


def slice_frame(task: tuple[str, EmbryoFrame], params: Params, folder: Path) -> FrameSlices:
    """Cut one frame and write its planes into ``folder/<part>``."""
    part, frame = task
    volume = read_labelled(frame, params.data)
    norm = params.normalization
    intensity = measure_range(
        volume.image,
        lower_percentile=norm.lower_percentile,
        upper_percentile=norm.upper_percentile,
        noise_floor=norm.noise_floor,
    )
    labels, dropped = drop_small_labels(volume.labels, volume.voxel_size, params.prepare.min_volume_um3)
    sizes = nucleus_volumes_um3(labels, volume.voxel_size)
    contrast = nucleus_contrast(volume.image, labels, volume.voxel_size)
    isotropic = to_isotropic(volume.image, labels, volume.voxel_size, params.prepare.downsample_xy)
    wanted = params.prepare
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
        faintest = contrast[plane.label_of[1:]]
        faintest = faintest[np.isfinite(faintest)]
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
                min_contrast=round(float(faintest.min()), 4) if len(faintest) else float("nan"),
                norm_low=intensity.low,
                norm_high=intensity.high,
                height=height,
                width=width,
                md5=md5,
            )
        )
    return FrameSlices(
        tuple(records),
        isotropic.voxel_um,
        tuple(sizes.values()),
        tuple(float(contrast[label]) for label in sizes),
        dropped,
    )


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


def _summarise(
    params: Params,
    data: Path,
    tasks: Sequence[tuple[str, EmbryoFrame]],
    results: Sequence[FrameSlices | FrameVolume],
    records: Sequence[PlaneRecord] | Sequence[VolumeRecord],
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


def _write_manifest(path: Path, records: Sequence[PlaneRecord] | Sequence[VolumeRecord]) -> None:
    with path.open("w", newline="") as file:
        columns = [field.name for field in fields(records[0])]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(record) for record in records)
