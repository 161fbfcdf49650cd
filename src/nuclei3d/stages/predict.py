"""predict: volumes and time-lapses in, masks and a table of nuclei out, frame by frame.

A frame larger than the memory is cut into blocks (`nuclei3d.stages.predict_blocks`); its masks are OME-Zarr.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nuclei3d.config import Params
from nuclei3d.console import progress_bar, say
from nuclei3d.errors import InputError
from nuclei3d.images.frames import Frame
from nuclei3d.segmentation.nuclei import Nucleus
from nuclei3d.stages.segmenters import (
    PredictedFrame,
    PredictionRecord,
    Segmenter,
    choose_segmenter,
    find_all,
    fingerprint_of,
    table_path,
    write_table,
)


@dataclass(frozen=True)
class PredictResult:
    """All frames of a prediction."""

    out: Path
    model: str
    frames: tuple[PredictedFrame, ...]

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        return {
            "out": str(self.out),
            "model": self.model,
            "frames": [
                {**asdict(frame), "masks": str(frame.masks), "table": str(frame.table)}
                for frame in self.frames
            ],
        }


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

    Raises
    ------
    InputError
        If inputs or model are missing or wrong, two frames would have outputs of one name, or the folder
        cannot be written.
    """
    frames = find_all(inputs, params)
    segmenter = choose_segmenter(params, model)
    record = PredictionRecord(out)
    done: list[PredictedFrame] = []
    _say_plan(frames, out)
    with progress_bar("predict", total=len(frames)) as bar:
        for frame in frames:
            fingerprint = fingerprint_of(frame, segmenter.identity)
            found = None if overwrite else record.find(frame.name, fingerprint)
            if found is not None:
                done.append(found)
                bar.advance(1)
                continue
            bar.note(frame.name)
            started = time.perf_counter()
            masks, nuclei = _predict_frame(frame, segmenter, out, bar.advance)
            finished = PredictedFrame(
                frame.name,
                masks,
                table_path(out, frame.name),
                len(nuclei),
                round(time.perf_counter() - started, 3),
                done_before=False,
            )
            record.add(finished, fingerprint)
            done.append(finished)
    before = sum(frame.done_before for frame in done)
    total = sum(frame.nuclei for frame in done)
    kept = f" ({before} of them done before)" if before else ""
    say(f"{total} nuclei in {len(done)} frames{kept}: {out}")
    return PredictResult(out, model, tuple(done))


def _predict_frame(
    frame: Frame, segmenter: Segmenter, out: Path, advance: Callable[[float], None]
) -> tuple[Path, list[Nucleus]]:
    shown = 0.0

    def progress(share: float) -> None:
        nonlocal shown
        advance(share - shown)
        shown = share

    try:
        masks, nuclei = segmenter.segment(frame, out, progress)
    except InputError as error:
        raise type(error)(_with_frame(frame, str(error))) from error
    write_table(table_path(out, frame.name), nuclei)
    progress(1.0)
    return masks, nuclei


def _with_frame(frame: Frame, message: str) -> str:
    """Put the frame before a message that does not name it yet."""
    where = str(frame.path) if frame.time is None else f"{frame.path} (time point {frame.time})"
    return message if str(frame.path) in message else f"{where}: {message}"


def _say_plan(frames: Sequence[Frame], out: Path) -> None:
    shapes = {frame.shape for frame in frames}
    shape = " x ".join(map(str, frames[0].shape)) if len(shapes) == 1 else "several shapes"
    say(f"{len(frames)} frame{'s' if len(frames) > 1 else ''} ({shape}) into {out}")
