"""check: labelled embryos in, all that is odd about them out, before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nuclei3d.config import Params
from nuclei3d.config.sections import DataParams
from nuclei3d.console import say, some_of, warn
from nuclei3d.errors import InputError
from nuclei3d.images.embryos import (
    Embryo,
    EmbryoFrame,
    LabelledVolume,
    check_shifts,
    find_embryos,
    read_labelled,
    split_embryos,
)
from nuclei3d.intensity import measure_range
from nuclei3d.scoring.alignment import label_offset_um
from nuclei3d.scoring.contrast import nucleus_contrast
from nuclei3d.scoring.plausibility import LabelFault, find_label_faults
from nuclei3d.stages import map_in_processes
from nuclei3d.training.slicing import nucleus_volumes_um3, sphere_diameter_um

#: An offset is said if it is more than this share of a nucleus and of its spread over the frames.
_OFFSET_SHARE = 0.025
_OFFSET_ERRORS = 3.0
#: Embryos whose nuclei differ by more than this factor are said.
_SIZE_RATIO = 1.5
#: Labels with a median contrast below this are not of their image. In 48 frames of real and synthetic embryos
#: it was 3.1 or more, with labels of another frame of the embryo below .6 where these were more than three.
_LEAST_CONTRAST = 1.0


@dataclass(frozen=True)
class FrameCheck:
    """What was found in one labelled frame; `error` says why it cannot be used, and all else is then empty.

    `range_over_noise` is the range that a network sees in standard deviations of the noise, `fill_share` and
    `unknown_share` are shares of the voxels; `offset_um` (z, y, x) is labels less image.
    """

    embryo: str
    frame: str
    error: str | None = None
    shape: tuple[int, ...] | None = None
    voxel_size_um: tuple[float, float, float] | None = None
    nuclei: int = 0
    diameters_um: tuple[float, ...] = ()
    range_over_noise: float | None = None
    fill_share: float = 0.0
    unknown_share: float = 0.0
    offset_um: tuple[float, float, float] | None = None
    faults: tuple[LabelFault, ...] = ()

    @property
    def place(self) -> str:
        """Embryo and frame."""
        return f"{self.embryo}/{self.frame}"

    def as_json(self) -> dict[str, Any]:
        """Give plain data; of the diameters the median."""
        plain = asdict(self)
        del plain["diameters_um"]
        diameter = round(float(np.median(self.diameters_um)), 3) if self.diameters_um else None
        return plain | {"diameter_um": diameter, "faults": [fault._asdict() for fault in self.faults]}


@dataclass(frozen=True)
class CheckResult:
    """All that was found; `errors` are what prepare refuses, `warnings` what it says and goes on with."""

    data: Path
    frames: tuple[FrameCheck, ...]
    offsets_um: dict[str, tuple[float, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """That of bad input where anything would be refused."""
        return InputError.exit_code if self.errors else 0

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        frames = [frame.as_json() for frame in self.frames]
        return {**asdict(self), "data": str(self.data), "frames": frames}


def check(params: Params, data: Path) -> CheckResult:
    """Read every labelled frame of a data set and say what is odd; nothing is written.

    Said are frames that cannot be read or do not fit their labels, labels that are implausible, labels that
    lie off the image by a constant, missing and partial labels, voxel sizes and sizes of nuclei that differ,
    and a split that is not possible.
    """
    embryos = find_embryos(data)
    tasks = [frame for embryo in embryos for frame in embryo.labelled]
    workers = min(params.prepare.workers or len(os.sched_getaffinity(0)), max(len(tasks), 1))
    work = partial(check_frame, params=params)
    frames = map_in_processes("check", work, tasks, workers=workers) if tasks else []
    errors = [f"{frame.place}: {frame.error}" for frame in frames if frame.error]
    for refuse in (
        lambda: split_embryos(embryos, params.data.split),
        lambda: check_shifts(embryos, params.data),
    ):
        try:
            refuse()
        except InputError as error:
            errors.append(str(error))
    usable = [frame for frame in frames if not frame.error]
    offsets = {
        embryo.name: offset
        for embryo in embryos
        if (offset := common_offset([frame for frame in usable if frame.embryo == embryo.name])) is not None
    }
    warnings = [
        *describe_faults((frame.place, fault) for frame in usable for fault in frame.faults),
        *_compare_embryos(usable),
        *describe_offsets(offsets, usable, params.data),
    ]
    for embryo in embryos:
        say(_describe_embryo(embryo, [frame for frame in usable if frame.embryo == embryo.name]))
    for warning in warnings:
        warn(warning)
    for error_text in errors:
        say(f"cannot be used: {error_text}")
    say(f"{len(usable)} labelled frames can be used; {len(warnings)} warnings, {len(errors)} errors")
    kept = {name: tuple(np.round(offset[0], 3).tolist()) for name, offset in offsets.items()}
    return CheckResult(data, tuple(frames), kept, tuple(warnings), tuple(errors))


def check_frame(frame: EmbryoFrame, params: Params) -> FrameCheck:
    """Read one labelled frame and measure it; what cannot be read is said in the result."""
    try:
        volume = read_labelled(frame, params.data)
    except InputError as error:
        return FrameCheck(frame.embryo, frame.frame, error=str(error))
    return check_volume(frame.embryo, frame.frame, volume, params)


def check_volume(embryo: str, frame: str, volume: LabelledVolume, params: Params) -> FrameCheck:
    """Measure one labelled frame."""
    image, labels, voxel_size = volume.image, volume.labels, volume.voxel_size
    norm = params.normalization
    intensity = measure_range(image, norm.lower_percentile, norm.upper_percentile, norm.noise_floor)
    fill = intensity.fill_mask(image)
    faults = find_volume_faults(volume, params.prepare.min_volume_um3, params.data)
    offset = (
        None
        if any(fault.kind == "intensities" for fault in faults)
        else label_offset_um(image, labels, voxel_size)
    )
    volumes = [
        value
        for value in nucleus_volumes_um3(labels, voxel_size).values()
        if value >= params.prepare.min_volume_um3
    ]
    return FrameCheck(
        embryo,
        frame,
        shape=labels.shape,
        voxel_size_um=voxel_size.zyx,
        nuclei=len(volumes),
        diameters_um=tuple(round(sphere_diameter_um(value), 3) for value in volumes),
        range_over_noise=round((intensity.high - intensity.low) / intensity.noise, 2)
        if intensity.noise
        else None,
        fill_share=0.0 if fill is None else round(float(fill.mean()), 4),
        unknown_share=0.0 if volume.unknown is None else round(float(volume.unknown.mean()), 4),
        offset_um=None if offset is None else tuple(np.round(offset, 3).tolist()),
        faults=tuple(faults),
    )


def find_volume_faults(volume: LabelledVolume, min_volume_um3: float, params: DataParams) -> list[LabelFault]:
    """Find what is implausible in a frame's labels and voxel size."""
    faults = find_label_faults(volume.labels, volume.voxel_size, min_volume_um3)
    if volume.labels.any() and np.array_equal(volume.image != 0, volume.labels != 0):
        words = "the image is 0 outside the labels, as if it were these or cut out by them; give it as taken"
        faults.append(LabelFault("image", words))
    contrasts = np.array([])
    if not faults:
        contrasts = nucleus_contrast(volume.image, volume.labels, volume.voxel_size, volume.unknown)[1:]
        contrasts = contrasts[np.isfinite(contrasts)]
    if len(contrasts) and (median := float(np.median(contrasts))) < _LEAST_CONTRAST:
        words = (
            f"the image is no brighter in the labels than around them ({median:.2g} times the noise in the "
            "median): are they of this frame and channel?"
        )
        faults.append(LabelFault("contrast", words))
    if volume.voxel_size.looks_reversed:
        source = "data.voxel_size_um says" if params.voxel_size_um else "the file says"
        z, y, x = volume.voxel_size.zyx
        faults.append(
            LabelFault(
                "voxel size",
                f"{source} voxels of {volume.voxel_size}, flatter than wide, as in the "
                f"order x, y, z; give --set data.voxel_size_um=[{x:g},{y:g},{z:g}]",
            )
        )
    return faults


def describe_faults(found: Iterable[tuple[str, LabelFault]]) -> list[str]:
    """Say each kind of fault once, with the first frame that has it and the number of others."""
    by_kind: dict[str, list[tuple[str, LabelFault]]] = {}
    for place, fault in found:
        by_kind.setdefault(fault.kind, []).append((place, fault))
    return [
        f"{first_place}: {first.words}"
        + (f" (likewise {some_of(places)})" if (places := [p for p, _ in more]) else "")
        for (first_place, first), *more in by_kind.values()
    ]


def _compare_embryos(frames: Sequence[FrameCheck]) -> list[str]:
    said = []
    sizes = sorted({frame.voxel_size_um for frame in frames if frame.voxel_size_um})
    edges = [size[2] for size in sizes]
    if edges and max(edges) > 1.02 * min(edges):
        said.append(
            f"voxel sizes differ ({min(edges):g} to {max(edges):g} um in x): prepare brings planes to "
            "the median"
        )
    diameters = {
        embryo: float(np.median(values))
        for embryo in dict.fromkeys(frame.embryo for frame in frames)
        if (values := [d for frame in frames if frame.embryo == embryo for d in frame.diameters_um])
    }
    if diameters:
        small, large = min(diameters, key=diameters.__getitem__), max(diameters, key=diameters.__getitem__)
        if diameters[large] > _SIZE_RATIO * diameters[small]:
            said.append(
                f"nuclei measure {diameters[small]:.3g} um in {small} and {diameters[large]:.3g} um in "
                f"{large}; if they do not, a voxel size is wrong (data.voxel_size_um); training brings each "
                "embryo to scale by its own nuclei (prepare.max_size_ratio)"
            )
    return said


def common_offset(frames: Sequence[FrameCheck]) -> tuple[Any, Any] | None:
    """Give the median offset of an embryo's frames and its standard error, (3,) each."""
    known = np.array([frame.offset_um for frame in frames if frame.offset_um is not None])
    if not len(known):
        return None
    # the median of n values is known 1.25 times as badly as their mean; one frame says nothing of the spread
    spread = known.std(axis=0, ddof=1) if len(known) > 1 else np.zeros(3)
    return np.median(known, axis=0), 1.25 * spread / np.sqrt(len(known))


def describe_offsets(
    offsets: dict[str, tuple[Any, Any]], frames: Sequence[FrameCheck], params: DataParams
) -> list[str]:
    """Say where labels lie off the image by more than their spread and a share of a nucleus."""
    diameters = [d for frame in frames for d in frame.diameters_um]
    if not diameters:
        return []
    least = _OFFSET_SHARE * float(np.median(diameters))
    off = {
        name: median
        for name, (median, error) in offsets.items()
        if np.any(np.abs(median) > np.maximum(least, _OFFSET_ERRORS * error))
    }
    if not off:
        return []
    listed = "; ".join(
        f"{name} {', '.join(f'{axis} {value:+.2f}' for axis, value in zip('zyx', median, strict=True))}"
        for name, median in off.items()
    )
    moves = {
        name: np.round(np.subtract(params.label_shift_of(name) or (0, 0, 0), median), 2).tolist()
        for name, median in off.items()
    }
    given = ", ".join(f"{name}: {move}" for name, move in moves.items())
    return [
        f"labels lie off the image by a constant, in um: {listed}; look at one, and if you agree, move them "
        f"as they are read: --set 'data.label_shift_um={{{given}}}'"
    ]


def _describe_embryo(embryo: Embryo, frames: Sequence[FrameCheck]) -> str:
    said = f"{embryo.name}: {len(embryo.labelled)} of {len(embryo.frames)} frames labelled"
    if not frames:
        return said
    nuclei = sorted(frame.nuclei for frame in frames)
    shapes = {frame.shape for frame in frames}
    shape = " x ".join(map(str, frames[0].shape or ())) if len(shapes) == 1 else "several shapes"
    size = " x ".join(f"{edge:g}" for edge in frames[0].voxel_size_um or ())
    counts = " to ".join(dict.fromkeys(map(str, (nuclei[0], nuclei[-1]))))
    said += f", {shape} voxels of {size} um, {counts} nuclei"
    if diameters := [d for frame in frames for d in frame.diameters_um]:
        said += f" of {np.median(diameters):.3g} um"
    if ratios := [frame.range_over_noise for frame in frames if frame.range_over_noise]:
        said += f", range {min(ratios):.3g} to {max(ratios):.3g} times the noise"
    for share, word in (("fill_share", "fill"), ("unknown_share", "unknown")):
        if (largest := max(getattr(frame, share) for frame in frames)) > 0:
            said += f", up to {largest:.0%} {word}"
    return said
