"""prepare: labelled embryos in, a data set to train on out.

For a 2D network a frame gives planes of three views, for a 3D network one volume, each with its flows.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.config.sections import PrepareParams
from nuclei3d.console import say, warn
from nuclei3d.digests import digest_of_frame
from nuclei3d.errors import InputError
from nuclei3d.flows import flows_3d, tanh_flows_3d
from nuclei3d.images.embryos import (
    PARTS,
    EmbryoFrame,
    LabelledVolume,
    check_shifts,
    find_embryos,
    read_labelled,
    split_embryos,
    voxel_size_of,
)
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import measure_range
from nuclei3d.outputs import list_written, refuse_foreign_folder, whole_folder
from nuclei3d.scoring.contrast import contrast_edges, nucleus_contrast
from nuclei3d.scoring.plausibility import LabelFault
from nuclei3d.stages import map_in_processes
from nuclei3d.stages.check import describe_faults, find_volume_faults
from nuclei3d.stages.labelled_frames import digest_sources, measure_embryos
from nuclei3d.stages.training_data import (
    SUMMARY_FILE,
    SliceSummary,
    StoredSample,
    describe_samples,
    load_samples,
    plane_flows,
    read_slices,
    store_sample,
)
from nuclei3d.training.samples import SampleInfo
from nuclei3d.training.slicing import (
    Cut,
    cut_planes,
    cut_volume,
    downsample,
    drop_small_labels,
    nucleus_volumes_um3,
    sphere_diameter_um,
)

#: Voxel sizes that differ by less than this share of their median are one.
_SAME_SIZE = 0.02


@dataclass(frozen=True)
class PrepareResult:
    """What `prepare` made."""

    out: Path
    summary: SliceSummary

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        return {"out": str(self.out), **self.summary.model_dump(mode="json", exclude_none=True)}


def prepare(params: Params, data: Path, out: Path, *, strict: bool = False) -> PrepareResult:
    """Cut every labelled frame of a data set into planes and write them with their flows.

    For a 3D network (train.network: full3d) every frame is written as a volume with 3D flows instead. Frames
    are read, cut and written one at a time in each of `prepare.workers` processes, so memory does not grow
    with their number. The same input gives the same bytes.

    `data` has ``<embryo>/images/<frame>.tif`` and ``<embryo>/labels/<frame>.tif``. `out` gets ``train``,
    ``validation`` and ``test`` with the samples, manifest.csv, summary.json and slices.png (volumes:
    nuclei.csv); it appears when all is done, and one that is there is replaced. Implausible labels
    (`nuclei3d.scoring.plausibility`) are said, with `strict` refused; intensities in their place always are.
    """
    refuse_foreign_folder(
        out,
        "slice data set",
        (SUMMARY_FILE, "diameter_px"),
        (*PARTS, "*.csv", "slices.png"),
        ("augmented.png",),
    )
    solid = params.train.network == "full3d"
    if solid and params.prepare.cellpose_files:
        raise InputError(
            "prepare.cellpose_files is for planes: Cellpose's training takes no volumes "
            "(train.network is full3d)"
        )
    embryos = find_embryos(data)
    check_shifts(embryos, params.data)
    split = split_embryos(embryos, params.data.split)
    tasks = [(part, frame) for part in PARTS for frame in split.of(part)]
    with whole_folder(out) as folder:
        for part in PARTS:
            (folder / part).mkdir()
        workers = min(params.prepare.workers or len(os.sched_getaffinity(0)), len(tasks))
        diameters = _unlike_diameters(tasks, params)
        scales = _scales_of(diameters, split.train)
        edge_um = None if solid else _common_edge_um(tasks, params, scales)
        work = partial(
            prepare_frame, params=params, folder=folder, strict=strict, edge_um=edge_um, scales=scales
        )
        frames = map_in_processes("prepare", work, tasks, workers=workers)
        samples = [sample for frame in frames for sample in frame.samples]
        _check_enough(samples, params, data)
        summary = _summarise(params, data, tasks, frames).model_copy(
            update={"sources": digest_sources(split), "embryo_diameters_um": diameters or None}
        )
        for warning in summary.warnings or ():
            warn(warning)
        describe_samples(folder, summary, samples)
        if not solid:
            from nuclei3d.report.figures import draw_slices_sheet

            draw_slices_sheet(load_samples(read_slices(folder), "train"), folder / "slices.png")
        list_written(folder)
    kind = "volumes" if solid else "planes"
    say(
        f"{summary.samples['train']} training {kind} in {out}; nuclei measure "
        f"{summary.nucleus_diameter_um:.3g} um ({summary.diameter_px:.3g} px on the planes)"
    )
    return PrepareResult(out, summary)


@dataclass(frozen=True)
class PreparedFrame:
    """What one frame gave: samples as written, edge of a pixel in x and y, and its nuclei in 3D.

    A contrast may be nan; `labels_left_out` counts those that were too small, `faults` tell what is
    implausible in the labels, `voxel_size` is that of the files, `range_over_noise` infinite without noise,
    `digest` that of `nuclei3d.digests.digest_of_frame`. `voxel_um` and the samples' voxels are taken `scale`
    times as wide as those of the files.
    """

    samples: tuple[StoredSample, ...]
    voxel_um: float
    volumes_um3: tuple[float, ...]
    contrasts: tuple[float, ...]
    labels_left_out: int
    faults: tuple[LabelFault, ...]
    voxel_size: VoxelSize
    range_over_noise: float
    digest: str
    scale: float = 1.0


def prepare_frame(
    task: tuple[str, EmbryoFrame],
    params: Params,
    folder: Path,
    strict: bool = False,
    edge_um: float | None = None,
    scales: Mapping[str, float] | None = None,
) -> PreparedFrame:
    """Cut a frame, write its samples into ``folder/<part>``; planes have pixels of `edge_um` if given.

    `scales` say by embryo how many times as wide voxels are taken, so that nuclei are alike in all.
    """
    part, frame = task
    volume = read_labelled(frame, params.data)
    digest = digest_of_frame(volume.image, volume.labels)
    faults = find_volume_faults(volume, params.prepare.min_volume_um3, params.data)
    for fault in faults:
        if strict or fault.kind == "intensities":
            raise InputError(f"{frame.label_path}: {fault.words}")
    norm = params.normalization
    intensity = measure_range(volume.image, norm.lower_percentile, norm.upper_percentile, norm.noise_floor)
    image, outside = intensity.clean(volume.image)
    if outside is not None:
        volume = replace(volume, image=image, labels=np.where(outside, 0, volume.labels))
    kept, left_out = drop_small_labels(volume.labels, volume.voxel_size, params.prepare.min_volume_um3)
    volume = replace(volume, labels=kept.astype(np.uint32, copy=False))
    of_file, scale = volume.voxel_size, (scales or {}).get(frame.embryo, 1.0)
    volumes_um3 = nucleus_volumes_um3(volume.labels, of_file)
    contrasts = nucleus_contrast(volume.image, volume.labels, volume.voxel_size, volume.unknown)
    volume = replace(volume, voxel_size=of_file.scaled(scale))
    samples = []
    for sample in _cut(volume, params, edge_um):
        name = f"{frame.embryo}_{frame.frame}"
        if sample.view != "volume":
            name += f"_{sample.view}_{sample.index:04d}"
        depth, height, width = sample.labels.shape
        of_sample = contrasts[sample.label_of[1:]]
        known = of_sample[np.isfinite(of_sample)]
        info = SampleInfo(
            file=f"{part}/{name}",
            embryo=frame.embryo,
            frame=frame.frame,
            view=sample.view,
            index=sample.index,
            shape=(depth, height, width),
            voxel_size=sample.voxel_size,
            nuclei=sample.nuclei,
            min_contrast=round(float(known.min()), 4) if len(known) else float("nan"),
            norm_low=intensity.low,
            norm_high=intensity.high,
            unknown=0.0 if sample.unknown is None else float(sample.unknown.mean()),
        )
        nuclei = None
        if sample.view == "volume":
            nuclei = _measure_nuclei(sample.labels, sample.voxel_size, of_sample)
        flows = _flows_of(sample, params.prepare)
        samples.append(
            store_sample(folder, part, info, sample.image, sample.labels, flows, nuclei, sample.unknown)
        )
        if params.prepare.cellpose_files:
            from nuclei3d.stages.export.cellpose import write_training_files

            write_training_files(folder / info.file, sample.image[0], sample.labels[0])
    return PreparedFrame(
        tuple(samples),
        samples[0].info.voxel_size.x
        if samples
        else edge_um or volume.voxel_size.x * params.prepare.downsample_xy,
        tuple(volumes_um3.values()),
        tuple(float(contrasts[label]) for label in volumes_um3),
        left_out,
        tuple(faults),
        of_file,
        (intensity.high - intensity.low) / intensity.noise if intensity.noise else math.inf,
        digest,
        scale,
    )


def _unlike_diameters(tasks: Sequence[tuple[str, EmbryoFrame]], params: Params) -> dict[str, float]:
    """Give the diameter of each embryo's nuclei in um, if those of the training embryos differ too much."""
    ratio = params.prepare.max_size_ratio
    train = [frame for part, frame in tasks if part == "train"]
    if ratio is None or len({frame.embryo for frame in train}) < 2:
        return {}
    diameters = measure_embryos(train, params)
    small, large = min(diameters.values(), default=1.0), max(diameters.values(), default=1.0)
    if large <= ratio * small:
        return {}
    diameters |= measure_embryos([frame for _, frame in tasks if frame.embryo not in diameters], params)
    say(
        f"nuclei of the training embryos measure {small:.3g} to {large:.3g} um: each embryo is brought to "
        "the network's scale by its own nuclei (prepare.max_size_ratio)"
    )
    return diameters


def _scales_of(diameters: Mapping[str, float], train: Sequence[EmbryoFrame]) -> dict[str, float]:
    """Say how many times as wide the voxels of each embryo are taken, so that nuclei are alike in all."""
    if not diameters:
        return {}
    known = {frame.embryo: diameters[frame.embryo] for frame in train if frame.embryo in diameters}
    common_um = float(np.median(list(known.values())))
    return {embryo: common_um / own for embryo, own in diameters.items()}


def _common_edge_um(
    tasks: Sequence[tuple[str, EmbryoFrame]], params: Params, scales: Mapping[str, float]
) -> float | None:
    """Give the edge of a pixel to which frames of several microscopes are brought, if there are several.

    None where each is downsampled by `prepare.downsample_xy`, because all come out alike. Frames of a volume
    network keep their own voxels: crops are cut from them at the network's scale.
    """
    factor = params.prepare.downsample_xy
    edges = np.array(
        [voxel_size_of(frame, params.data).x * factor * scales.get(frame.embryo, 1.0) for _, frame in tasks]
    )
    median = float(np.median(edges))
    if np.ptp(edges) <= _SAME_SIZE * median:
        return None
    if not scales:
        say(
            f"the voxels of the frames differ in x ({edges.min() / factor:g} to {edges.max() / factor:g} "
            f"um): all planes are brought to pixels of {median:g} um, the median after downsampling"
        )
    return median


def _cut(volume: LabelledVolume, params: Params, edge_um: float | None) -> Iterator[Cut]:
    wanted = params.prepare
    solid = params.train.network == "full3d"
    volume = downsample(volume, wanted.downsample_xy, isotropic=not solid, edge_um=edge_um)
    if solid:
        return iter((cut_volume(volume),))
    return cut_planes(
        volume,
        {"xy": wanted.step_xy, "xz": wanted.step_xz, "yz": wanted.step_yz},
        min_nuclei=wanted.min_nuclei,
        min_area_px=wanted.min_area_px,
        sparse_share=wanted.sparse_share,
    )


def _flows_of(sample: Cut, wanted: PrepareParams) -> NDArray[np.floating[Any]]:
    """Compute the flows (components, Z, Y, X)."""
    if sample.view != "volume":
        return plane_flows(sample.labels[0])[:, None]
    if wanted.targets == "tanh":
        return tanh_flows_3d(sample.labels)
    return flows_3d(sample.labels, sample.voxel_size, threads=None if wanted.workers == 1 else 1)


def _measure_nuclei(
    labels: NDArray[np.unsignedinteger[Any]], voxel_size: VoxelSize, contrasts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Give centre (z, y, x) in voxels, volume in um3 and contrast of the labels 1..n: (n, 5)."""
    flat, count = labels.ravel(), len(contrasts) + 1
    voxels = np.bincount(flat, minlength=count)[1:]
    places = np.broadcast_arrays(*np.ix_(*(np.arange(size) + 0.5 for size in labels.shape)))
    columns = [np.bincount(flat, weights=each.ravel(), minlength=count)[1:] / voxels for each in places]
    return np.stack([*columns, voxels * voxel_size.volume_um3, contrasts], axis=1)


def _check_enough(samples: Sequence[StoredSample], params: Params, data: Path) -> None:
    training = [sample.info for sample in samples if sample.part == "train"]
    if params.train.network == "full3d":
        if not any(info.nuclei for info in training):
            raise InputError(f"no training frame of {data} has a labelled nucleus")
    elif not training:
        raise InputError(
            f"no training plane of {data} shows {params.prepare.min_nuclei} nuclei or more; lower "
            "prepare.min_nuclei, or give frames with more labelled nuclei"
        )


def _training_range(
    frames: Sequence[PreparedFrame], volumes: NDArray[np.float64]
) -> dict[str, tuple[float, float]] | None:
    """Say what the training frames are like, as `nuclei3d.networks.folder.TrainingRange` takes it."""
    ratios = [frame.range_over_noise for frame in frames if math.isfinite(frame.range_over_noise)]
    if not ratios:
        return None
    of_each = {
        "diameter_um": [sphere_diameter_um(volume) for volume in np.percentile(volumes, (5, 95))],
        "voxel_x_um": [frame.voxel_size.x for frame in frames],
        "anisotropy": [frame.voxel_size.anisotropy for frame in frames],
        "range_over_noise": ratios,
    }
    return {name: (round(float(min(v)), 4), round(float(max(v)), 4)) for name, v in of_each.items()}


def _summarise(
    params: Params, data: Path, tasks: Sequence[tuple[str, EmbryoFrame]], frames: Sequence[PreparedFrame]
) -> SliceSummary:
    training = [frame for (part, _), frame in zip(tasks, frames, strict=True) if part == "train"]
    samples = [sample for frame in frames for sample in frame.samples]
    volumes = np.concatenate([frame.volumes_um3 for frame in training])
    to_scale = np.concatenate([np.multiply(frame.volumes_um3, frame.scale**3) for frame in training])
    contrasts = np.concatenate([frame.contrasts for frame in training])
    pixel_sizes = np.array([frame.voxel_um for frame in frames])
    voxel_um = float(np.median(pixel_sizes))
    diameter_um = float(np.median([sphere_diameter_um(volume) for volume in to_scale]))
    digest = hashlib.md5(
        "".join(sample.info.file + sample.md5 for sample in samples).encode(), usedforsecurity=False
    )
    # what changes nothing of the samples is left out
    chosen = params.model_dump(
        mode="json",
        include={"data", "normalization", "prepare"},
        exclude={"prepare": {"workers", "cellpose_files"}},
    )
    solid = params.train.network == "full3d"
    counts = {part: sum(sample.part == part for sample in samples) for part in PARTS}
    depths = [sample.info.voxel_size.z for sample in samples if sample.part == "train"]
    places = [f"{frame.embryo}/{frame.frame}" for _, frame in tasks]
    of_frames = list(zip((part for part, _ in tasks), places, frames, strict=True))
    faults = [(place, fault) for place, each in zip(places, frames, strict=True) for fault in each.faults]
    return SliceSummary(
        data=data,
        nucleus_diameter_um=round(diameter_um, 4),
        voxel_um=round(voxel_um, 6),
        diameter_px=round(diameter_um / voxel_um, 3),
        contrast_quintiles=tuple(round(float(edge), 4) for edge in contrast_edges(contrasts)),
        frames={part: sum(1 for p, _ in tasks if p == part) for part in PARTS},
        embryos={part: tuple(sorted({f.embryo for p, f in tasks if p == part})) for part in PARTS},
        network=params.train.network,
        planes=None if solid else counts,
        volumes=counts if solid else None,
        training_nuclei=len(volumes),
        labels_left_out=sum(frame.labels_left_out for frame in frames),
        training=_training_range(training, volumes),
        params=chosen,
        md5=digest.hexdigest(),
        frame_digests={
            part: {place: frame.digest for p, place, frame in of_frames if p == part}
            for part in ("train", "validation")
        },
        warnings=tuple(describe_faults(faults)) if faults else None,
        voxel_z_um=round(float(np.median(depths)), 6) if solid else None,
        targets=params.prepare.targets if solid else None,
    )
