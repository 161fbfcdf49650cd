"""A model that predicts: one here, or one behind an address; and what its results depend on."""

from __future__ import annotations

import hashlib
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from nuclei3d import __version__
from nuclei3d.client import RemoteModel, is_service
from nuclei3d.config import Params
from nuclei3d.config.sections import PredictParams
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.images.frames import Frame
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.folder import digest_of_weights, thresholds_of
from nuclei3d.segmentation.segmenter import Segmentation, Segmenter
from nuclei3d.stages.predicted import file_digests


@dataclass(frozen=True)
class Sure:
    """Least score and volume (um3) of a nucleus that counts by itself, and the diameter (um) expected."""

    score: float
    volume_um3: float
    diameter_um: float | None


@dataclass(frozen=True)
class Predictor(ABC):
    """A model that predicts; `identity` is what its results depend on, for `fingerprint_of`.

    `digests` are those of the images seen so far: a file with many time points is looked at once. What a
    service does not tell of its model is None here, or empty, and its memory is its own business.
    """

    params: PredictParams
    identity: Mapping[str, Any]
    digests: dict[Path, list[str]] = field(default_factory=dict, kw_only=True)

    @property
    @abstractmethod
    def sure(self) -> Sure | None:
        """What counts as a nucleus by itself."""

    @property
    def thresholds(self) -> dict[str, float | None]:
        """Thresholds by their names in model.json; the least volume is at the model's diameter."""
        return {}

    @property
    def trained_diameters_um(self) -> tuple[float, float] | None:
        """`ModelInfo.embryo_diameters_um` of the model."""
        return None

    @abstractmethod
    def with_params(self, **update: float) -> Self:
        """Give the same model with other values of some parameters."""

    def at(self, diameter_um: float | None) -> Self:
        """Give the same model for nuclei of another diameter; None leaves it."""
        return self if diameter_um is None else self.with_params(diameter_um=diameter_um)

    def with_range_of(self, image: NDArray[Any]) -> Self:
        """Give the same model with the range of intensities of an image (Z, Y, X)."""
        return self

    @abstractmethod
    def segment(
        self, image: NDArray[Any], voxel_size: VoxelSize, progress: Callable[[float], None] | None = None
    ) -> Segmentation:
        """Segment an image as a whole; see `Segmenter.segment`. MemoryError also tells of a GPU's memory."""

    def fits(self, frame: Frame, times: int = 1) -> bool:
        """Tell whether the memory holds a frame, so many times."""
        return True

    def needs_blocks(self, frame: Frame) -> bool:
        """Tell whether a frame is larger than the memory."""
        return False

    def made_by(self, frame: Frame) -> dict[str, Any]:
        """Say for a frame's record what its masks were made by and from: the fields of `MadeBy`."""
        return {
            "weights_sha256": self.identity.get("weights_sha256", ()),
            "thresholds": self.thresholds,
            "image": frame.image,
            "files": self.files_of(frame),
        }

    def files_of(self, frame: Frame) -> list[str]:
        """Digest a frame's files; one with many time points is looked at once."""
        if frame.path not in self.digests:
            self.digests[frame.path] = file_digests(frame)
        return self.digests[frame.path]


@dataclass(frozen=True)
class LocalPredictor(Predictor):
    """A model on this machine."""

    segmenter: Segmenter

    @property
    def sure(self) -> Sure:
        """What counts as a nucleus by itself."""
        masks, diameter_um = self.segmenter.settings.masks, self.segmenter.settings.nucleus_diameter_um
        return Sure(masks.score_threshold, masks.min_volume_um3, diameter_um)

    @property
    def thresholds(self) -> dict[str, float | None]:
        """Thresholds by their names in model.json; the least volume is at the model's diameter."""
        settings, info = self.segmenter.settings, self.segmenter.models["main"].info
        smaller = (info.nucleus_diameter_um or settings.nucleus_diameter_um) / settings.nucleus_diameter_um
        return {
            **thresholds_of(settings.masks),
            "min_volume_um3": settings.masks.min_volume_um3 * smaller**3,
        }

    @property
    def trained_diameters_um(self) -> tuple[float, float] | None:
        """`ModelInfo.embryo_diameters_um` of the model."""
        return self.segmenter.models["main"].info.embryo_diameters_um

    def with_params(self, **update: float) -> Self:
        """Give the same model with other values of some parameters."""
        from nuclei3d.segmentation.settings import segmentation_settings

        predict = self.params.model_copy(update=update)
        main, volume = self.segmenter.models["main"], self.segmenter.models.get("volume")
        settings = segmentation_settings(main.info, predict, volume=volume.info if volume else None)
        identity = {**self.identity, "settings": asdict(settings)}
        segmenter = self.segmenter.with_settings(settings)
        return replace(self, params=predict, identity=identity, segmenter=segmenter)

    def with_range_of(self, image: NDArray[Any]) -> Self:
        """Give the same model with the range of intensities of an image (Z, Y, X)."""
        from nuclei3d.segmentation.settings import with_ranges

        settings = with_ranges(self.segmenter.settings, image)
        return replace(self, segmenter=self.segmenter.with_settings(settings))

    def segment(
        self, image: NDArray[Any], voxel_size: VoxelSize, progress: Callable[[float], None] | None = None
    ) -> Segmentation:
        """Segment an image as a whole; see `Segmenter.segment`."""
        import torch

        try:
            return self.segmenter.segment(image, voxel_size, progress)
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from None

    def required_gb(self, frame: Frame) -> float:
        """Estimate the memory that a frame takes as a whole."""
        from nuclei3d.stages.predict_blocks import required_gb

        return required_gb(frame, self.segmenter.settings)

    def fits(self, frame: Frame, times: int = 1) -> bool:
        """Tell whether the memory holds a frame, so many times."""
        from nuclei3d.stages.predict_blocks import BlockRun

        return times * self.required_gb(frame) <= BlockRun.of(self.params).worker_gb

    def needs_blocks(self, frame: Frame) -> bool:
        """Tell whether a frame is larger than the memory, and may be cut."""
        return self.segmenter.settings.mode != "cellpose" and not self.fits(frame)


@dataclass(frozen=True)
class RemotePredictor(Predictor):
    """A model behind a service's address; `served` is what the service said at the start that it serves."""

    remote: RemoteModel
    served: object

    @property
    def sure(self) -> Sure | None:
        """What counts as a nucleus by itself; known only where it was given."""
        given = self.params
        if given.score_threshold is None or given.min_volume_um3 is None:
            return None
        expected_um = given.diameter_um if isinstance(given.diameter_um, float) else None
        return Sure(given.score_threshold, given.min_volume_um3, expected_um)

    def with_params(self, **update: float) -> Self:
        """Give the same model with other values of some parameters."""
        predict = self.params.model_copy(update=update)
        identity = {**self.identity, "predict": _asked_of_a_service(predict)}
        return replace(self, params=predict, identity=identity, remote=replace(self.remote, predict=predict))

    def segment(
        self, image: NDArray[Any], voxel_size: VoxelSize, progress: Callable[[float], None] | None = None
    ) -> Segmentation:
        """Have an image segmented by the model that was served at the start, and by no other."""
        result = self.remote.segment(image, voxel_size, progress)
        if isinstance(self.served, dict) and result.model != self.served:
            raise InputError(
                "the service serves another model than at the start; give the same command again"
            )
        return result


def open_model(params: Params, model: str) -> Predictor:
    """Open a model folder, weights file, ``models:/name@alias`` or the URL of a service."""
    if not is_service(model):
        return open_local(params, model)
    remote = RemoteModel(model, params.predict)
    served = remote.served_model()
    if served is None:
        say(f"{model} does not say which model it serves: nothing counts as done before")
    identity = {
        "service": model,
        # never the same again where it is not known
        "model": uuid.uuid4().hex if served is None else served,
        "predict": _asked_of_a_service(params.predict),
    }
    return RemotePredictor(params.predict, identity, remote, served)


def open_local(params: Params, model: str) -> LocalPredictor:
    """Open a model folder, weights file or ``models:/name@alias``."""
    from nuclei3d.experiment.registry import find_model

    segmenter = Segmenter(find_model(model, params), params.predict)
    models = segmenter.models
    identity = {
        "weights_sha256": [digest_of_weights(each.path) for each in models.values()],
        "settings": asdict(segmenter.settings),
    }
    say(f"model {models['main'].info.name} on {segmenter.device.type}, mode {segmenter.settings.mode}")
    return LocalPredictor(params.predict, identity, segmenter)


def _asked_of_a_service(predict: PredictParams) -> dict[str, Any]:
    return predict.model_dump(mode="json", exclude={"report", "animation"})


def fingerprint_of(frame: Frame, predictor: Predictor) -> str:
    """Digest what a frame's result depends on: this package, the content of its files, what is read of them,
    the model.
    """
    content = {
        "version": __version__,
        "files": predictor.files_of(frame),
        "image": frame.image,
        "time": frame.time,
        "axes": repr(frame.axes),
        "voxel_size_um": frame.require_voxel_size().zyx,
        **predictor.identity,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
