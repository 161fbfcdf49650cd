"""predict: volumes and time-lapses in, masks and a table of nuclei out, frame by frame.

A frame larger than the memory is cut into blocks (`nuclei3d.stages.predict_blocks`); its masks are OME-Zarr.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.config.sections import TracksParams
from nuclei3d.console import progress_bar, say, warn
from nuclei3d.digests import digest_of_voxels
from nuclei3d.errors import InputError, MachineError
from nuclei3d.images.frames import Frame, check_image, find_frames, frame_stem
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.nuclei_table import table_path, write_nuclei
from nuclei3d.stages.predicted import (
    TRACKS_FILE,
    PredictedFrame,
    find_done,
    forget,
    note_done,
    place_of,
    refuse_another_image,
)
from nuclei3d.stages.predictor import LocalPredictor, Predictor, Sure, fingerprint_of, open_model
from nuclei3d.stages.time_lapse import write_series

if TYPE_CHECKING:
    from nuclei3d.segmentation.masks import Nucleus
    from nuclei3d.stages.track import TrackResult

Progress = Callable[[float], None]


@dataclass(frozen=True)
class PredictResult:
    """All frames of a prediction, and the page that shows them, if one was wanted."""

    out: Path
    model: str
    frames: tuple[PredictedFrame, ...]
    page: Path | None = None
    series: tuple[Path, ...] = ()
    """Masks of whole time-lapses."""
    tracks: TrackResult | None = None
    """Their nuclei linked over time, if that was wanted."""


def predict(
    params: Params,
    inputs: Sequence[Path],
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    link: bool = False,
) -> PredictResult:
    """Segment volumes.

    Each frame's masks and table appear, whole, as soon as the frame is done, while the next is segmented and
    the one after it read. Frames that were done before by the same model with the same settings are passed
    over, so a run that was stopped goes on where it was.

    Parameters
    ----------
    params
        Sections ``predict`` and ``data`` (voxel size, channel), ``tracking`` for models of the registry.
    inputs
        TIFF files, folders of them, OME-Zarr; a time axis gives several frames.
    model
        Model folder, weights file, ``models:/name@alias`` or the URL of a service.
    out
        Folder for ``<stem>_masks.ome.tif`` and ``<stem>_nuclei.csv`` of each frame, the masks of a time-lapse
        in one file too (`nuclei3d.stages.time_lapse`) and, at last, ``prediction.html``.
    overwrite
        Segment again what was done before.
    link
        Link the nuclei of several frames over time, too, as `nuclei3d.stages.track.track` does, into
        ``<out>/tracks``. Nuclei below the least score or volume then stay where their lineage has one above.
    """
    frames = find_all(inputs, params)
    jobs = _plan(params, frames, model)
    for frame in frames:
        refuse_another_image(out, frame)
    shape = " x ".join(map(str, frames[0].shape))
    if len({frame.shape for frame in frames}) > 1:
        shape = "several shapes"
    say(f"{len(frames)} frame{'s' if len(frames) > 1 else ''} ({shape}) into {out}")
    linking = params.tracks  # where nothing is linked, as in assess, no result depends on these
    sure = _confirming(jobs, linking) if link else []
    if sure:
        from nuclei3d.stages.confirm import CANDIDATES_FOLDER, confirm

        least = min(linking.weakest_score, *(each.score for each in sure))
        weaker = [job.with_least(least) for job in jobs]
        candidates = _predict_frames(weaker, out / CANDIDATES_FOLDER, overwrite)
        done = confirm(candidates, [job.predictor for job in jobs], sure, linking, out)
    else:
        done = _predict_frames(jobs, out, overwrite)
    series: list[Path] = []
    for source in dict.fromkeys(frame.path for frame in frames):
        film = [(frame, found) for frame, found in zip(frames, done, strict=True) if frame.path == source]
        series += write_series(
            [frame for frame, _ in film],
            [found.masks for _, found in film],
            [found.fingerprint for _, found in film],
            out,
            into_input=params.predict.into_input,
        )
    odd = [frame for frame in done if frame.warnings]
    if odd:
        warn(_tell_odd(odd))
    before = sum(frame.done_before for frame in done)
    total = sum(frame.nuclei for frame in done)
    kept = f" ({before} of them done before)" if before else ""
    say(f"{total} nuclei in {len(done)} frames{kept}: {out}")
    if series:
        say(f"as time-lapses: {', '.join(map(str, series))}")
    tracks = _link(params, out, done) if link else None
    page = None
    if params.predict.report:
        from nuclei3d.stages.predict_page import write_page

        told = [f"{frame.name}: {'; '.join(frame.warnings)}" for frame in odd]
        page = write_page(out, frames, done, told, animated=params.predict.animation)
        say(f"look at them: {page}")
    return PredictResult(out, model, tuple(done), page, tuple(series), tracks)


def _tell_odd(frames: Sequence[PredictedFrame]) -> str:
    """Say each kind of warning once, in the words of the first frame that has it."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for frame in frames:
        for words in frame.warnings:
            # what differs between frames of a kind are numbers
            kinds.setdefault(re.split(r"\d", words)[0], []).append((frame.name, words))
    told: dict[str, list[str]] = {}
    for (name, words), *others in kinds.values():
        more = f" (and {len(others)} other frames)" if others else ""
        told.setdefault(f"{name}{more}", []).append(words)
    return "; ".join(f"{name}: {'; '.join(words)}" for name, words in told.items())


def _link(params: Params, out: Path, done: Sequence[PredictedFrame]) -> TrackResult | None:
    """Link the nuclei of predicted frames; their masks stay, whatever hinders that."""
    from nuclei3d.stages.track import track

    try:
        if len(done) == 1:
            raise InputError(f"{done[0].name} is a single frame")
        return track(params, out, out / TRACKS_FILE.parent, files=[frame.masks for frame in done])
    except InputError as error:
        warn(f"the nuclei are not linked over time: {error}")
        return None


@contextmanager
def _says_what_is_kept(done: Sequence[PredictedFrame], count: int) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{len(done)} of {count} frames are segmented; the same command goes on with the next"
        ) from None


@dataclass(frozen=True)
class _Job:
    """A frame and what predicts it, at the diameter that was estimated for it (um; None: not estimated)."""

    frame: Frame
    predictor: Predictor
    diameter_um: float | None

    def with_least(self, score: float) -> _Job:
        """Give the job with nuclei of any volume from this score on."""
        weaker = self.predictor.with_params(score_threshold=score, min_volume_um3=0.0)
        return replace(self, predictor=weaker)


def _plan(params: Params, frames: Sequence[Frame], model: str) -> list[_Job]:
    """Open the model; estimate the diameters where that was asked for, or the model was trained so."""
    from nuclei3d.stages.diameters import estimate_diameters

    diameters: Sequence[float | None] = [None] * len(frames)
    asked = params.predict.diameter_um
    if asked == "auto":
        diameters = estimate_diameters(frames)
        first = params.predict.model_copy(update={"diameter_um": diameters[0]})
        params = params.model_copy(update={"predict": first})
    predictor = open_model(params, model)
    unlike = predictor.trained_diameters_um
    if unlike is not None and asked is None:
        say(
            f"the model knows nuclei of {unlike[0]:.3g} to {unlike[1]:.3g} um, each at its own scale: the "
            "diameter is estimated (--diameter gives it)"
        )
        diameters = estimate_diameters(frames)
    return [_Job(frame, predictor.at(each), each) for frame, each in zip(frames, diameters, strict=True)]


def _confirming(jobs: Sequence[_Job], linking: TracksParams) -> list[Sure]:
    """Say what counts by itself in each frame where weak nuclei may stay by their lineage; else nothing."""
    if len(jobs) < 2 or linking.weakest_score >= 1:
        return []
    sure = [each for job in jobs if (each := job.predictor.sure) is not None]
    if len(sure) == len(jobs) and not any(job.predictor.needs_blocks(job.frame) for job in jobs):
        return sure
    why = "frames are cut into blocks" if len(sure) == len(jobs) else "the service's thresholds are not given"
    warn(f"{why}: weak nuclei do not stay by their lineage (docs/time-lapse.md)")
    return []


class _Opened(NamedTuple):
    """A frame to predict, and if it was `finished` before; its image, if it was read."""

    job: _Job
    fingerprint: str
    finished: PredictedFrame | None
    image: NDArray[Any] | None = None


def _predict_frames(jobs: Sequence[_Job], out: Path, overwrite: bool) -> list[PredictedFrame]:
    """Segment frames, but those done before.

    While one is segmented, a thread reads the next and another writes the one before. Where the memory would
    not hold two frames, each waits for its turn.
    """
    done: list[PredictedFrame] = []
    ahead: Future[_Opened] | None = None
    written: Future[None] | None = None

    def open_frame(job: _Job, *, read: bool) -> _Opened:
        fingerprint = fingerprint_of(job.frame, job.predictor)
        finished = None if overwrite else find_done(out, job.frame.name, fingerprint)
        image = None
        if finished is None and read and job.predictor.fits(job.frame, 2):
            job, image = _read(job)
        return _Opened(job, fingerprint, finished, image)

    def write(finish: Callable[[], PredictedFrame], job: _Job) -> None:
        frame = finish()
        if not frame.done_before:
            note_done(out, frame)
        done.append(replace(frame, diameter_um=job.diameter_um))

    with (
        progress_bar("predict", total=len(jobs)) as bar,
        _says_what_is_kept(done, len(jobs)),
        ThreadPoolExecutor(1) as reading,
        ThreadPoolExecutor(1) as writing,
    ):
        for number, job in enumerate(jobs, start=1):
            opened = ahead.result() if ahead else open_frame(job, read=False)
            ahead, roomy = None, False
            if opened.finished is None:
                bar.note(job.frame.name)
                forget(out, job.frame.name)
                roomy = job.predictor.fits(job.frame, 2)
                if roomy and number < len(jobs):
                    ahead = reading.submit(open_frame, jobs[number], read=True)
                finish = _predict_frame(opened, out, bar.advance)
            else:
                bar.skip(1)
                finish = partial(replace, opened.finished)
            if written is not None:
                written.result()
            written = writing.submit(write, finish, job)
            if not roomy or number == len(jobs):
                written.result()
    return done


def _read(job: _Job) -> tuple[_Job, NDArray[Any]]:
    """Read and check a frame; its range of intensities goes with the predictor."""
    with _named(job.frame):
        image = job.frame.read()
        check_image(image, str(job.frame.path))
    return replace(job, predictor=job.predictor.with_range_of(image)), image


@contextmanager
def _named(frame: Frame) -> Iterator[None]:
    """Let errors name the frame."""
    try:
        yield
    except InputError as error:
        if str(frame.path) in str(error):
            raise
        where = str(frame.path) if frame.time is None else f"{frame.path} (time point {frame.time})"
        raise type(error)(f"{where}: {error}") from error


def _predict_frame(opened: _Opened, out: Path, advance: Progress) -> Callable[[], PredictedFrame]:
    """Segment a frame; give what writes its masks and table."""
    frame, predictor = opened.job.frame, opened.job.predictor
    started, shown = time.perf_counter(), 0.0

    def progress(share: float) -> None:
        nonlocal shown
        advance(share - shown)
        shown = share

    with _named(frame):
        write_masks = _segment(opened, out, progress)
    progress(1.0)

    def finish() -> PredictedFrame:
        with _named(frame):
            masks, nuclei, warnings, voxels = write_masks()
        placed = {masks: place_of(masks)}
        table = table_path(out, frame.name)
        write_nuclei(table, nuclei)
        placed[table] = place_of(table)
        seconds = round(time.perf_counter() - started, 3)
        found = PredictedFrame(frame.name, masks, table, len(nuclei), seconds, False, opened.fingerprint)
        made_by = {**predictor.made_by(frame), "voxels": voxels}
        return replace(found, warnings=warnings, made_by=made_by, placed=placed)

    return finish


def find_all(inputs: Sequence[Path], params: Params) -> list[Frame]:
    """Find the frames of all inputs, in their order; all state their voxel size and differ in name."""
    if not inputs:
        raise InputError("nothing to predict: give files, folders or OME-Zarr")
    given = params.data.voxel_size_um
    frames: list[Frame] = []
    for source in inputs:
        frames += find_frames(
            Path(source),
            channel=params.data.channel,
            image=params.data.image,
            voxel_size=VoxelSize.of(given) if given is not None else None,
        )
    names: dict[str, Path] = {}
    for frame in frames:
        _check_name(frame)
        for name in {frame.name, frame_stem(frame.path)}:
            other = names.setdefault(name, frame.path)
            if other != frame.path:
                raise InputError(
                    f"{other} and {frame.path} would both write {name}_masks.ome.tif; predict them into "
                    "folders of their own"
                )
        frame.require_voxel_size()
    return frames


def _check_name(frame: Frame) -> None:
    """Raise InputError where the names of what belongs to a frame could not be written."""
    try:
        size = len(f"{frame.name}_masks.ome.zarr".encode())
    except UnicodeEncodeError:
        raise InputError(f"the name of {str(frame.path)!a} is not in UTF-8; rename it") from None
    if size > _LONGEST_NAME:
        raise InputError(f"the name of {frame.path} is too long for those of its masks; shorten it")


_LONGEST_NAME = 255
"""Bytes of a file's name that common file systems take."""


class _Written(NamedTuple):
    """File of masks, nuclei, warnings; of an image that was read as a whole, the digest of its voxels."""

    masks: Path
    nuclei: list[Nucleus]
    warnings: tuple[str, ...]
    voxels: str | None = None


def _segment(opened: _Opened, out: Path, progress: Progress) -> Callable[[], _Written]:
    """Segment a frame, in blocks if it is larger than the memory; give what writes its masks."""
    frame, predictor = opened.job.frame, opened.job.predictor
    if opened.image is None and isinstance(predictor, LocalPredictor) and predictor.needs_blocks(frame):
        found = _segment_blocks(frame, predictor, opened.fingerprint, out, progress)
        return lambda: found
    job, image = _read(opened.job) if opened.image is None else (opened.job, opened.image)
    try:
        result = job.predictor.segment(image, frame.require_voxel_size(), progress)
    except MemoryError:
        if not isinstance(predictor, LocalPredictor):
            raise
        least_gb = 0.5 * predictor.required_gb(frame)
        raise MachineError(
            f"out of memory; cut the volume into blocks: predict.memory_gb={least_gb:.2g} or less"
        ) from None

    def write() -> _Written:
        from nuclei3d.images.tiff import write_labels

        path = out / f"{frame.name}_masks.ome.tif"
        write_labels(path, result.labels, frame.require_voxel_size())
        return _Written(path, result.nuclei, result.warnings, digest_of_voxels(image))

    return write


def _segment_blocks(
    frame: Frame, predictor: LocalPredictor, fingerprint: str, out: Path, progress: Progress
) -> _Written:
    """Segment a frame block by block, as `nuclei3d.stages.predict_blocks` does."""
    from nuclei3d.segmentation.likeness import find_unlikeness
    from nuclei3d.stages.predict_blocks import BlockRun, predict_in_blocks, with_frame_ranges

    segmenter, run = predictor.segmenter, BlockRun.of(predictor.params)
    needed, has = predictor.required_gb(frame), run.worker_gb
    say(f"{frame.name} would need {needed:.1f} GB, a worker has {has:.1f}: cut into blocks")
    masks = out / f"{frame.name}_masks.ome.zarr"
    settings = with_frame_ranges(frame, segmenter.settings)
    nuclei = predict_in_blocks(frame, segmenter.models, settings, run, fingerprint, masks, progress)
    unlike = find_unlikeness(
        np.array([nucleus.volume_um3 for nucleus in nuclei]),
        frame.require_voxel_size(),
        settings.nucleus_diameter_um,
        segmenter.models["main"].info.training,
        settings.intensity_range,
    )
    return _Written(masks, nuclei, tuple(unlike))
