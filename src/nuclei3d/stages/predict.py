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
from typing import TYPE_CHECKING, Any, Protocol

from nuclei3d.config import Params
from nuclei3d.console import progress_bar, say
from nuclei3d.errors import InputError
from nuclei3d.volumes.whole import whole_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nuclei3d.core.segmentation.nuclei import Nucleus
    from nuclei3d.core.segmentation.prediction import Segmentation
    from nuclei3d.volumes.frames import Frame

COLUMNS = ("label", "z_um", "y_um", "x_um", "volume_um3", "mean_intensity", "score")
RECORD_FILE = "predictions.json"
_REGISTRY = ("models:/", "runs:/", "mlflow-artifacts:/")


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
        Folder for ``<stem>_masks.ome.tif``, ``<stem>_nuclei.csv`` and the record `RECORD_FILE`.
    overwrite
        Segment again what was done before.

    Raises
    ------
    InputError
        If inputs or model are missing or wrong, two frames would have outputs of one name, or the folder
        cannot be written.
    """
    frames = _find_all(inputs, params)
    segmenter = _choose_segmenter(params, model)
    record = _Record(out / RECORD_FILE, {} if overwrite else None)
    done: list[PredictedFrame] = []
    _say_plan(frames, out)
    with progress_bar("predict", total=len(frames)) as bar:
        for frame in frames:
            fingerprint = _fingerprint(frame, segmenter.identity)
            found = record.find(frame.name, fingerprint, out)
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


def masks_path(out: Path, name: str) -> Path:
    """Where the masks of a frame go (those of a frame cut into blocks: ``.ome.zarr``)."""
    return out / f"{name}_masks.ome.tif"


def table_path(out: Path, name: str) -> Path:
    """Where the table of a frame's nuclei goes."""
    return out / f"{name}_nuclei.csv"


def write_table(path: Path, nuclei: Sequence[Nucleus]) -> None:
    """Write the table of nuclei, whole or not at all; an unknown score is an empty cell."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for nucleus in nuclei:
            values = (getattr(nucleus, column) for column in COLUMNS[1:])
            writer.writerow(
                [nucleus.label, *("" if math.isnan(value) else f"{value:.6g}" for value in values)]
            )


def _find_all(inputs: Sequence[Path], params: Params) -> list[Frame]:
    from nuclei3d.volumes.frames import find_frames
    from nuclei3d.volumes.voxel_size import VoxelSize

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


class _Segmenter(Protocol):
    """Segments one frame and writes its masks."""

    identity: dict[str, Any]

    def segment(
        self, frame: Frame, out: Path, progress: Callable[[float], None]
    ) -> tuple[Path, list[Nucleus]]:
        """Write the masks; give where they are, and the nuclei."""


class _RemoteSegmenter:
    """Has frames segmented by a service."""

    def __init__(self, params: Params, url: str) -> None:
        from nuclei3d.serving.client import RemoteModel

        self._remote = RemoteModel(url)
        self._wishes = params.predict
        self.identity: dict[str, Any] = {"service": url, "predict": params.predict.model_dump(mode="json")}

    def segment(
        self, frame: Frame, out: Path, progress: Callable[[float], None]
    ) -> tuple[Path, list[Nucleus]]:
        """Send the whole frame, write what comes back."""
        image = _read(frame)
        result, _ = self._remote.segment(image, frame.require_voxel_size(), self._wishes)
        return _write_masks(frame, result, out), result.nuclei


class _LocalSegmenter:
    """Segments frames here: as a whole, or in blocks if they are larger than the memory."""

    def __init__(self, params: Params, model: str) -> None:
        from nuclei3d.core.networks import choose_device
        from nuclei3d.models.folder import load_model
        from nuclei3d.models.settings import segmentation_settings

        path = Path(model)
        if model.startswith(_REGISTRY):
            from nuclei3d.tracking.registry import fetch_model

            path = fetch_model(model, params)
        self._model = load_model(path)
        self._settings = segmentation_settings(self._model.info, params.predict)
        self._device = choose_device(params.predict.device)
        self._params = params.predict
        self.identity: dict[str, Any] = {
            "weights_sha256": hashlib.sha256(self._model.path.read_bytes()).hexdigest(),
            "settings": asdict(self._settings),
        }
        say(f"model {self._model.info.name} on {self._device.type}, mode {self._settings.mode}")

    def segment(
        self, frame: Frame, out: Path, progress: Callable[[float], None]
    ) -> tuple[Path, list[Nucleus]]:
        """Segment as a whole if the memory allows."""
        from nuclei3d.core.segmentation.prediction import segment_volume
        from nuclei3d.stages.predict_blocks import BlockRun, predict_in_blocks, required_gb

        voxel_size = frame.require_voxel_size()
        run = BlockRun(self._memory_gb(), self._params.workers, self._params.scheduler)
        needed = required_gb(frame, voxel_size, self._settings)
        if needed > run.worker_gb and self._settings.mode != "cellpose":
            say(f"{frame.name} would need {needed:.1f} GB, a worker has {run.worker_gb:.1f}: cut into blocks")
            masks = out / f"{frame.name}_masks.ome.zarr"
            device = self._params.device
            nuclei = predict_in_blocks(frame, self._model, self._settings, device, run, masks, progress)
            return masks, nuclei
        result = segment_volume(
            _read(frame), voxel_size, self._model.network, self._settings, self._device, progress
        )
        return _write_masks(frame, result, out), result.nuclei

    def _memory_gb(self) -> float:
        if self._params.memory_gb is not None:
            return self._params.memory_gb
        import psutil

        # Some is left to the rest of the machine.
        return float(0.8 * psutil.virtual_memory().available / 1e9)


def _choose_segmenter(params: Params, model: str) -> _Segmenter:
    from nuclei3d.serving.client import is_service

    return _RemoteSegmenter(params, model) if is_service(model) else _LocalSegmenter(params, model)


def _predict_frame(
    frame: Frame, segmenter: _Segmenter, out: Path, advance: Callable[[float], None]
) -> tuple[Path, list[Nucleus]]:
    shown = 0.0

    def progress(share: float) -> None:
        nonlocal shown
        advance(share - shown)
        shown = share

    try:
        masks, nuclei = segmenter.segment(frame, out, progress)
    except InputError as error:
        raise InputError(_with_frame(frame, str(error))) from error
    write_table(table_path(out, frame.name), nuclei)
    progress(1.0)
    return masks, nuclei


def _read(frame: Frame) -> NDArray[Any]:
    from nuclei3d.volumes.frames import check_image

    image = frame.read()
    check_image(image, str(frame.path))
    return image


def _write_masks(frame: Frame, result: Segmentation, out: Path) -> Path:
    from nuclei3d.volumes.writing import write_labels

    path = masks_path(out, frame.name)
    write_labels(path, result.labels, frame.require_voxel_size())
    return path


def _with_frame(frame: Frame, message: str) -> str:
    """Put the frame before a message that does not name it yet."""
    where = str(frame.path) if frame.time is None else f"{frame.path} (time point {frame.time})"
    return message if str(frame.path) in message else f"{where}: {message}"


def _fingerprint(frame: Frame, identity: Mapping[str, Any]) -> str:
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


def _say_plan(frames: Sequence[Frame], out: Path) -> None:
    shapes = {frame.shape for frame in frames}
    shape = " x ".join(map(str, frames[0].shape)) if len(shapes) == 1 else "several shapes"
    say(f"{len(frames)} frame{'s' if len(frames) > 1 else ''} ({shape}) into {out}")


class _Record:
    """The record of finished frames in the output folder: what they were made from, and how many nuclei."""

    def __init__(self, path: Path, entries: dict[str, Any] | None) -> None:
        self._path = path
        self._entries = self._read() if entries is None else entries

    def find(self, name: str, fingerprint: str, out: Path) -> PredictedFrame | None:
        """Give the frame if it was finished from the same things and its files are there."""
        entry = self._entries.get(name)
        if not isinstance(entry, dict) or entry.get("fingerprint") != fingerprint:
            return None
        masks, table = out / str(entry.get("masks", "")), table_path(out, name)
        if masks == out or not masks.exists() or not table.is_file():
            return None
        return PredictedFrame(name, masks, table, int(entry["nuclei"]), float(entry["seconds"]), True)

    def add(self, frame: PredictedFrame, fingerprint: str) -> None:
        """Write down that a frame is finished."""
        self._entries[frame.name] = {
            "masks": frame.masks.name,
            "nuclei": frame.nuclei,
            "seconds": frame.seconds,
            "fingerprint": fingerprint,
        }
        with whole_file(self._path) as partial:
            partial.write_text(json.dumps({"frames": self._entries}, indent=1) + "\n", encoding="utf-8")

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self._path.read_text(encoding="utf-8"))["frames"]
        except (OSError, ValueError, KeyError, TypeError):
            # A record that cannot be read only means that the frames are done again.
            return {}
        return entries if isinstance(entries, dict) else {}
