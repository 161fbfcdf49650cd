"""Who segments a frame: a model on this machine, as a whole or in blocks, or a service.

What a prediction reads: the frames of all inputs, each under a name of its own.

What a prediction writes: masks, a table of nuclei, and the record of finished frames.

Models that stand beside the one of --model: for the orthogonal views, and a 3D one for mode mixed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.config.sections import PredictParams
from nuclei3d.console import say
from nuclei3d.errors import InputError, MachineError
from nuclei3d.images.frames import Frame, check_image, find_frames
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.outputs import whole_file
from nuclei3d.segmentation.nuclei import Nucleus

if TYPE_CHECKING:
    from torch import nn

    from nuclei3d.networks.folder import Model, ModelInfo
    from nuclei3d.segmentation.segmenter import Segmentation


def find_all(inputs: Sequence[Path], params: Params) -> list[Frame]:
    """Find the frames of all inputs, in their order.

    Parameters
    ----------
    inputs
        Files, folders, OME-Zarr.
    params
        Section ``data``: channel, voxel size.

    Raises
    ------
    InputError
        If there are none, one does not state its voxel size, or two frames would have outputs of one name.
    """
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


def read_image(frame: Frame) -> NDArray[Any]:
    """Read a frame and check that it is an image to segment."""
    image = frame.read()
    check_image(image, str(frame.path))
    return image


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


class PredictionRecord:
    """Which frames are finished, and what they were made from.

    One small file per frame in a hidden folder among the outputs: so several jobs can fill one folder.
    """

    def __init__(self, out: Path) -> None:
        self._out = out

    def find(self, name: str, fingerprint: str) -> PredictedFrame | None:
        """Give the frame if it was finished from the same things and its files are there."""
        try:
            entry = json.loads(self._file(name).read_text(encoding="utf-8"))
            if entry["fingerprint"] != fingerprint:
                return None
            masks, table = self._out / Path(entry["masks"]).name, table_path(self._out, name)
            if not masks.exists() or not table.is_file():
                return None
            return PredictedFrame(name, masks, table, int(entry["nuclei"]), float(entry["seconds"]), True)
        except (OSError, ValueError, KeyError, TypeError):
            # A record that cannot be read only means that the frame is done again.
            return None

    def add(self, frame: PredictedFrame, fingerprint: str) -> None:
        """Write down that a frame is finished."""
        entry = {
            "masks": frame.masks.name,
            "nuclei": frame.nuclei,
            "seconds": frame.seconds,
            "fingerprint": fingerprint,
        }
        with whole_file(self._file(frame.name)) as partial:
            partial.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")

    def _file(self, name: str) -> Path:
        return self._out / _RECORD_FOLDER / f"{name}.json"


@dataclass(frozen=True)
class SecondModels:
    """What stands beside a model; None for what does not.

    Attributes
    ----------
    orthogonal
        Another 2D model, for the xz and yz planes.
    volume
        A 3D model, whose flows are fused with those of the views.
    """

    orthogonal: Model | None = None
    volume: Model | None = None

    @property
    def models(self) -> list[Model]:
        """Those that there are."""
        return [each for each in (self.orthogonal, self.volume) if each is not None]

    @property
    def orthogonal_network(self) -> nn.Module | None:
        """Network for the xz and yz planes."""
        return self.orthogonal.network if self.orthogonal else None

    @property
    def volume_network(self) -> nn.Module | None:
        """The 3D network."""
        return self.volume.network if self.volume else None

    @property
    def volume_info(self) -> ModelInfo | None:
        """Scale and normalisation of the 3D model."""
        return self.volume.info if self.volume else None


def load_second_models(predict: PredictParams, model: Model) -> SecondModels:
    """Load the models that the wishes name, and check that they go with a model.

    Raises
    ------
    InputError
        If one is missing, of the wrong kind, or of another scale where one image serves two networks.
    """
    from nuclei3d.networks.folder import load_model, require_model

    orthogonal = volume = None
    if predict.orthogonal_model is not None:
        require_model(predict.orthogonal_model, "predict.orthogonal_model")
        orthogonal = load_model(predict.orthogonal_model)
        _check_orthogonal(model, orthogonal)
    if predict.volume_model is not None:
        require_model(predict.volume_model, "predict.volume_model")
        volume = load_model(predict.volume_model)
        _check_volume(volume)
    return SecondModels(orthogonal, volume)


def _check_orthogonal(model: Model, orthogonal: Model) -> None:
    """Check that one image scale suits both networks."""
    for each in (model, orthogonal):
        if each.info.kind != "views2d":
            raise InputError(
                f"predict.orthogonal_model is for 2D models; '{each.info.name}' is of kind '{each.info.kind}'"
            )
    sizes = [each.info.diameter_px for each in (model, orthogonal)]
    if abs(sizes[0] - sizes[1]) > 0.01 * max(sizes):
        raise InputError(
            f"the network of '{orthogonal.info.name}' sees nuclei of {sizes[1]:g} pixels, that of "
            f"'{model.info.name}' {sizes[0]:g}; an orthogonal model must have the same diameter_px"
        )


def _check_volume(volume: Model) -> None:
    if volume.info.kind != "full3d":
        raise InputError(
            f"predict.volume_model takes a 3D model; '{volume.info.name}' in {volume.path.parent} is of kind "
            f"'{volume.info.kind}': give one that was trained with train.network=full3d"
        )


class Segmenter(Protocol):
    """Segments one frame and writes its masks."""

    identity: dict[str, Any]

    def segment(
        self, frame: Frame, out: Path, progress: Callable[[float], None]
    ) -> tuple[Path, list[Nucleus]]:
        """Write the masks; give where they are, and the nuclei."""


def choose_segmenter(params: Params, model: str) -> Segmenter:
    """Give the one for a model folder, weights file, ``models:/name@alias`` or the URL of a service."""
    from nuclei3d.client import is_service

    return RemoteSegmenter(params, model) if is_service(model) else LocalSegmenter(params, model)


class RemoteSegmenter:
    """Has frames segmented by a service."""

    def __init__(self, params: Params, url: str) -> None:
        from nuclei3d.client import RemoteModel

        self._remote = RemoteModel(url)
        self._wishes = params.predict
        self.identity: dict[str, Any] = {"service": url, "predict": params.predict.model_dump(mode="json")}

    def segment(
        self, frame: Frame, out: Path, progress: Callable[[float], None]
    ) -> tuple[Path, list[Nucleus]]:
        """Send the whole frame, write what comes back."""
        image = read_image(frame)
        result, _ = self._remote.segment(image, frame.require_voxel_size(), self._wishes)
        return _write_masks(frame, result, out), result.nuclei


class LocalSegmenter:
    """Segments frames here: as a whole, or in blocks if they are larger than the memory."""

    def __init__(self, params: Params, model: str) -> None:
        from nuclei3d.experiment.registry import fetch_model, is_registered
        from nuclei3d.networks.cpnet import choose_device
        from nuclei3d.networks.folder import load_model
        from nuclei3d.segmentation.settings import segmentation_settings

        self._model = load_model(fetch_model(model, params) if is_registered(model) else Path(model))
        self._second = load_second_models(params.predict, self._model)
        self._settings = segmentation_settings(
            self._model.info, params.predict, volume=self._second.volume_info
        )
        self._device = choose_device(params.predict.device)
        self._params = params.predict
        self.identity: dict[str, Any] = {
            "weights_sha256": [
                hashlib.sha256(each.path.read_bytes()).hexdigest()
                for each in (self._model, *self._second.models)
            ],
            "settings": asdict(self._settings),
        }
        say(f"model {self._model.info.name} on {self._device.type}, mode {self._settings.mode}")

    def segment(
        self, frame: Frame, out: Path, progress: Callable[[float], None]
    ) -> tuple[Path, list[Nucleus]]:
        """Segment as a whole if the memory allows."""
        import torch

        from nuclei3d.segmentation.segmenter import segment_volume
        from nuclei3d.stages.predict_blocks import BlockJob, BlockRun, predict_in_blocks, required_gb

        second = self._second
        run = BlockRun.wished(self._params)
        needed = required_gb(frame, self._settings)
        if needed > run.worker_gb and self._settings.mode != "cellpose":
            say(f"{frame.name} would need {needed:.1f} GB, a worker has {run.worker_gb:.1f}: cut into blocks")
            masks = out / f"{frame.name}_masks.ome.zarr"
            job = BlockJob(
                settings=self._settings,
                weights=self._model.path,
                orthogonal_weights=second.orthogonal.path if second.orthogonal else None,
                volume_weights=second.volume.path if second.volume else None,
                device=self._params.device,
                identity=self.identity,
            )
            return masks, predict_in_blocks(frame, job, run, masks, progress)
        try:
            result = segment_volume(
                read_image(frame),
                frame.require_voxel_size(),
                self._model.network,
                self._settings,
                self._device,
                progress,
                orthogonal_network=second.orthogonal_network,
                volume_network=second.volume_network,
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise MachineError(
                f"out of memory; cut the volume into blocks: predict.memory_gb={0.5 * needed:.2g} or less"
            ) from None
        return _write_masks(frame, result, out), result.nuclei


def _write_masks(frame: Frame, result: Segmentation, out: Path) -> Path:
    from nuclei3d.images.writing import write_labels

    path = masks_path(out, frame.name)
    write_labels(path, result.labels, frame.require_voxel_size())
    return path
