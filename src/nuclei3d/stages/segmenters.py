"""Who segments a frame: a model on this machine, as a whole or in blocks, or a service."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.errors import MachineError
from nuclei3d.stages.prediction_inputs import read_image
from nuclei3d.stages.prediction_outputs import masks_path
from nuclei3d.stages.second_models import load_second_models
from nuclei3d.volumes.frames import Frame

if TYPE_CHECKING:
    from nuclei3d.core.segmentation.nuclei import Nucleus
    from nuclei3d.core.segmentation.prediction import Segmentation


class Segmenter(Protocol):
    """Segments one frame and writes its masks."""

    identity: dict[str, Any]

    def segment(
        self, frame: Frame, out: Path, progress: Callable[[float], None]
    ) -> tuple[Path, list[Nucleus]]:
        """Write the masks; give where they are, and the nuclei."""


def choose_segmenter(params: Params, model: str) -> Segmenter:
    """Give the one for a model folder, weights file, ``models:/name@alias`` or the URL of a service."""
    from nuclei3d.serving.client import is_service

    return RemoteSegmenter(params, model) if is_service(model) else LocalSegmenter(params, model)


class RemoteSegmenter:
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
        image = read_image(frame)
        result, _ = self._remote.segment(image, frame.require_voxel_size(), self._wishes)
        return _write_masks(frame, result, out), result.nuclei


class LocalSegmenter:
    """Segments frames here: as a whole, or in blocks if they are larger than the memory."""

    def __init__(self, params: Params, model: str) -> None:
        from nuclei3d.core.networks import choose_device
        from nuclei3d.models.folder import load_model
        from nuclei3d.models.settings import segmentation_settings
        from nuclei3d.tracking.registry import fetch_model, is_registered

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

        from nuclei3d.core.segmentation.prediction import segment_volume
        from nuclei3d.stages.block_plan import BlockRun, required_gb
        from nuclei3d.stages.predict_blocks import BlockJob, predict_in_blocks

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
    from nuclei3d.volumes.writing import write_labels

    path = masks_path(out, frame.name)
    write_labels(path, result.labels, frame.require_voxel_size())
    return path
