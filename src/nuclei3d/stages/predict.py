"""predict: volumes and time-lapses in, masks and a table of nuclei out, frame by frame.

A frame larger than the memory is cut into blocks (`nuclei3d.stages.predict_blocks`); its masks are OME-Zarr.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuclei3d.client import RemoteModel, is_service
from nuclei3d.config import Params
from nuclei3d.config.sections import PredictParams
from nuclei3d.console import progress_bar, say
from nuclei3d.errors import InputError, MachineError
from nuclei3d.images.frames import Frame, check_image, find_frames
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.outputs import whole_file
from nuclei3d.segmentation.segmenter import Segmenter

if TYPE_CHECKING:
    from nuclei3d.segmentation.masks import Nucleus

Progress = Callable[[float], None]
COLUMNS = ("label", "z_um", "y_um", "x_um", "volume_um3", "mean_intensity", "score")
_RECORD_FOLDER = ".predicted"


@dataclass(frozen=True)
class PredictedFrame:
    """One frame and where its results are."""

    name: str
    masks: Path
    table: Path
    nuclei: int
    seconds: float
    done_before: bool


@dataclass(frozen=True)
class PredictResult:
    """All frames of a prediction."""

    out: Path
    model: str
    frames: tuple[PredictedFrame, ...]


def predict(
    params: Params, inputs: Sequence[Path], model: str, out: Path, *, overwrite: bool = False
) -> PredictResult:
    """Segment volumes.

    Each frame's masks and table appear, whole, as soon as the frame is done. Frames that were done before by
    the same model with the same settings are passed over, so a run that was stopped goes on where it was.

    Parameters
    ----------
    params
        Sections ``predict`` and ``data`` (voxel size, channel), ``tracking`` for models of the registry.
    inputs
        TIFF files, folders of them, OME-Zarr; a time axis gives several frames.
    model
        Model folder, weights file, ``models:/name@alias`` or the URL of a service.
    out
        Folder for ``<stem>_masks.ome.tif`` and ``<stem>_nuclei.csv``.
    overwrite
        Segment again what was done before.
    """
    frames = find_all(inputs, params)
    predictor = open_model(params, model)
    done: list[PredictedFrame] = []
    shape = " x ".join(map(str, frames[0].shape))
    if len({frame.shape for frame in frames}) > 1:
        shape = "several shapes"
    say(f"{len(frames)} frame{'s' if len(frames) > 1 else ''} ({shape}) into {out}")
    with progress_bar("predict", total=len(frames)) as bar:
        for frame in frames:
            fingerprint = fingerprint_of(frame, predictor.identity)
            finished = None if overwrite else _find_done(out, frame.name, fingerprint)
            if finished is not None:
                bar.advance(1)
            else:
                bar.note(frame.name)
                finished = _predict_frame(frame, predictor, out, bar.advance)
                _note_done(out, finished, fingerprint)
            done.append(finished)
    before = sum(frame.done_before for frame in done)
    total = sum(frame.nuclei for frame in done)
    kept = f" ({before} of them done before)" if before else ""
    say(f"{total} nuclei in {len(done)} frames{kept}: {out}")
    return PredictResult(out, model, tuple(done))


def _predict_frame(frame: Frame, predictor: Predictor, out: Path, advance: Progress) -> PredictedFrame:
    started, shown = time.perf_counter(), 0.0

    def progress(share: float) -> None:
        nonlocal shown
        advance(share - shown)
        shown = share

    try:
        masks, nuclei = _write_masks(predictor, frame, out, progress)
    except InputError as error:
        if str(frame.path) in str(error):
            raise
        where = str(frame.path) if frame.time is None else f"{frame.path} (time point {frame.time})"
        raise type(error)(f"{where}: {error}") from error
    table = _table_path(out, frame.name)
    _write_table(table, nuclei)
    progress(1.0)
    seconds = round(time.perf_counter() - started, 3)
    return PredictedFrame(frame.name, masks, table, len(nuclei), seconds, done_before=False)


def find_all(inputs: Sequence[Path], params: Params) -> list[Frame]:
    """Find the frames of all inputs, in their order; all state their voxel size and differ in name."""
    if not inputs:
        raise InputError("nothing to predict: give files, folders or OME-Zarr")
    given = params.data.voxel_size_um
    frames: list[Frame] = []
    for source in inputs:
        found = find_frames(
            Path(source),
            channel=params.data.channel,
            voxel_size=VoxelSize.of(given) if given is not None else None,
        )
        # In a folder that is input and output at once, masks are no images.
        frames.extend(frame for frame in found if not (source.is_dir() and frame.name.endswith("_masks")))
    names: dict[str, Path] = {}
    for frame in frames:
        other = names.setdefault(frame.name, frame.path)
        if other != frame.path:
            raise InputError(
                f"{other} and {frame.path} would both write {frame.name}_masks.ome.tif; predict them into "
                "folders of their own"
            )
        frame.require_voxel_size()
    if not frames:
        raise InputError(f"{', '.join(map(str, inputs))}: only masks found; give images")
    return frames


@dataclass(frozen=True)
class Predictor:
    """A model here or behind an address; `identity` is what its results depend on, for `fingerprint_of`."""

    model: Segmenter | RemoteModel
    params: PredictParams
    identity: Mapping[str, Any]


def _write_masks(
    predictor: Predictor, frame: Frame, out: Path, progress: Progress
) -> tuple[Path, list[Nucleus]]:
    """Segment a frame, in blocks if it is larger than the memory; give file of masks and nuclei."""
    model = predictor.model
    if isinstance(model, RemoteModel):
        return _write_whole(model, frame, out, progress)
    import torch

    from nuclei3d.stages.predict_blocks import BlockRun, predict_in_blocks, required_gb

    settings, run = model.settings, BlockRun.of(predictor.params)
    needed = required_gb(frame, settings)
    if needed > run.worker_gb and settings.mode != "cellpose":
        say(f"{frame.name} would need {needed:.1f} GB, a worker has {run.worker_gb:.1f}: cut into blocks")
        masks = out / f"{frame.name}_masks.ome.zarr"
        fingerprint = fingerprint_of(frame, predictor.identity)
        return masks, predict_in_blocks(frame, model.models, settings, run, fingerprint, masks, progress)
    try:
        return _write_whole(model, frame, out, progress)
    except (MemoryError, torch.OutOfMemoryError):
        raise MachineError(
            f"out of memory; cut the volume into blocks: predict.memory_gb={0.5 * needed:.2g} or less"
        ) from None


def open_model(params: Params, model: str) -> Predictor:
    """Open a model folder, weights file, ``models:/name@alias`` or the URL of a service."""
    if is_service(model):
        identity = {"service": model, "predict": params.predict.model_dump(mode="json")}
        return Predictor(RemoteModel(model, params.predict), params.predict, identity)
    from nuclei3d.experiment.registry import fetch_model, is_registered

    path = fetch_model(model, params) if is_registered(model) else Path(model)
    segmenter = Segmenter(path, params.predict)
    models = segmenter.models
    identity = {
        "weights_sha256": [hashlib.sha256(each.path.read_bytes()).hexdigest() for each in models.values()],
        "settings": asdict(segmenter.settings),
    }
    say(f"model {models['main'].info.name} on {segmenter.device.type}, mode {segmenter.settings.mode}")
    return Predictor(segmenter, params.predict, identity)


def _write_whole(
    model: Segmenter | RemoteModel, frame: Frame, out: Path, progress: Progress
) -> tuple[Path, list[Nucleus]]:
    from nuclei3d.images.tiff import write_labels

    image = frame.read()
    check_image(image, str(frame.path))
    result = model.segment(image, frame.require_voxel_size(), progress)
    path = out / f"{frame.name}_masks.ome.tif"
    write_labels(path, result.labels, frame.require_voxel_size())
    return path, result.nuclei


def _table_path(out: Path, name: str) -> Path:
    return out / f"{name}_nuclei.csv"


def _write_table(path: Path, nuclei: Sequence[Nucleus]) -> None:
    """Write the table of nuclei, whole or not at all; an unknown score is an empty cell."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for nucleus in nuclei:
            values = (getattr(nucleus, column) for column in COLUMNS[1:])
            writer.writerow(
                [nucleus.label, *("" if math.isnan(value) else f"{value:.6g}" for value in values)]
            )


def fingerprint_of(frame: Frame, identity: Mapping[str, Any]) -> str:
    """Digest of what a frame's result depends on; files are told apart by size and time of change."""
    status = frame.path.stat()
    content = {
        "path": str(frame.path.resolve()),
        "size": status.st_size,
        "changed": status.st_mtime_ns,
        "time": frame.time,
        "axes": repr(frame.axes),
        "voxel_size_um": frame.require_voxel_size().zyx,
        **identity,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _record_file(out: Path, name: str) -> Path:
    """Say where it is noted that a frame is finished: a file each, so several jobs can fill one folder."""
    return out / _RECORD_FOLDER / f"{name}.json"


def _find_done(out: Path, name: str, fingerprint: str) -> PredictedFrame | None:
    """Give the frame if it was finished from the same things and its files are there."""
    try:
        entry = json.loads(_record_file(out, name).read_text(encoding="utf-8"))
        masks, table = out / Path(entry["masks"]).name, _table_path(out, name)
        if entry["fingerprint"] != fingerprint or not masks.exists() or not table.is_file():
            return None
        return PredictedFrame(name, masks, table, int(entry["nuclei"]), float(entry["seconds"]), True)
    except (OSError, ValueError, KeyError, TypeError):
        # A record that cannot be read only means that the frame is done again.
        return None


def _note_done(out: Path, frame: PredictedFrame, fingerprint: str) -> None:
    entry = {
        "masks": frame.masks.name,
        "nuclei": frame.nuclei,
        "seconds": frame.seconds,
        "fingerprint": fingerprint,
    }
    with whole_file(_record_file(out, frame.name)) as partial:
        partial.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
