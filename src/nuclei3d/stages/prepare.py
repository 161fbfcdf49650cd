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
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nuclei3d.config import Params, params_as_dict
from nuclei3d.console import progress_bar, say
from nuclei3d.core.scoring.contrast import contrast_edges
from nuclei3d.core.slicing import sphere_diameter_um
from nuclei3d.errors import InputError
from nuclei3d.stages.prepared_frames import PreparedFrame
from nuclei3d.stages.prepared_planes import PlaneRecord, slice_frame
from nuclei3d.stages.prepared_volumes import VolumeRecord, store_frame, write_nuclei
from nuclei3d.stages.training_planes import MANIFEST_FILE, SUMMARY_FILE, pack_planes
from nuclei3d.stages.training_volumes import NUCLEI_FILE
from nuclei3d.volumes.embryos import EmbryoFrame, find_embryos, split_embryos
from nuclei3d.volumes.whole import refuse_foreign_folder, whole_folder

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
    from nuclei3d.report.slices_sheet import draw_slices_sheet

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
