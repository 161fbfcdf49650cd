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
from nuclei3d.volumes.frames import Frame

if TYPE_CHECKING:
    from nuclei3d.core.segmentation.nuclei import Nucleus
    from nuclei3d.core.segmentation.prediction import Segmentation

_REGISTRY = ("models:/", "runs:/", "mlflow-artifacts:/")


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
        import torch

        from nuclei3d.core.segmentation.prediction import segment_volume
        from nuclei3d.stages.block_plan import BlockRun, required_gb
        from nuclei3d.stages.predict_blocks import predict_in_blocks

        run = BlockRun.wished(self._params)
        needed = required_gb(frame, self._settings)
        if needed > run.worker_gb and self._settings.mode != "cellpose":
            say(f"{frame.name} would need {needed:.1f} GB, a worker has {run.worker_gb:.1f}: cut into blocks")
            masks = out / f"{frame.name}_masks.ome.zarr"
            device = self._params.device
            nuclei = predict_in_blocks(frame, self._model, self._settings, device, run, masks, progress)
            return masks, nuclei
        try:
            result = segment_volume(
                read_image(frame),
                frame.require_voxel_size(),
                self._model.network,
                self._settings,
                self._device,
                progress,
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
