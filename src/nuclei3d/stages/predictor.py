"""A model that predicts: one here, or one behind an address; and what its results depend on."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nuclei3d.client import RemoteModel, is_service
from nuclei3d.config import Params
from nuclei3d.config.sections import PredictParams
from nuclei3d.console import say
from nuclei3d.images.frames import Frame
from nuclei3d.networks.folder import digest_of_weights, thresholds_of
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.stages.predicted import file_digests


@dataclass(frozen=True)
class Sure:
    """Least score and volume (um3) of a nucleus that counts by itself, and the diameter (um) expected."""

    score: float
    volume_um3: float
    diameter_um: float | None


@dataclass(frozen=True)
class Predictor:
    """A model here or behind an address; `identity` is what its results depend on, for `fingerprint_of`.

    `digests` are those of the images seen so far: a file with many time points is looked at once.
    """

    model: Segmenter | RemoteModel
    params: PredictParams
    identity: Mapping[str, Any]
    digests: dict[Path, list[str]] = field(default_factory=dict)

    @property
    def trained_diameters_um(self) -> tuple[float, float] | None:
        """`ModelInfo.embryo_diameters_um` of a model here; of a service it is not known."""
        return (
            None
            if isinstance(self.model, RemoteModel)
            else self.model.models["main"].info.embryo_diameters_um
        )

    @property
    def sure(self) -> Sure | None:
        """What counts as a nucleus by itself; of a service it is known only if it was given."""
        if not isinstance(self.model, RemoteModel):
            masks, diameter_um = self.model.settings.masks, self.model.settings.nucleus_diameter_um
            return Sure(masks.score_threshold, masks.min_volume_um3, diameter_um)
        given = self.params
        if given.score_threshold is None or given.min_volume_um3 is None:
            return None
        expected_um = given.diameter_um if isinstance(given.diameter_um, float) else None
        return Sure(given.score_threshold, given.min_volume_um3, expected_um)

    @property
    def thresholds(self) -> dict[str, float | None]:
        """Thresholds of a model here by their names in model.json; the least volume is at its diameter."""
        if isinstance(self.model, RemoteModel):
            return {}
        settings, info = self.model.settings, self.model.models["main"].info
        smaller = (info.nucleus_diameter_um or settings.nucleus_diameter_um) / settings.nucleus_diameter_um
        return {
            **thresholds_of(settings.masks),
            "min_volume_um3": settings.masks.min_volume_um3 * smaller**3,
        }

    def made_by(self, frame: Frame) -> dict[str, Any]:
        """Say for a frame's record what its masks were made by and from (`PredictedFrame.made_by`)."""
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

    def fits(self, frame: Frame, times: int = 1) -> bool:
        """Tell whether the memory holds a frame, so many times; that of a service is not known."""
        from nuclei3d.stages.predict_blocks import BlockRun, required_gb

        if isinstance(self.model, RemoteModel):
            return True
        return times * required_gb(frame, self.model.settings) <= BlockRun.of(self.params).worker_gb

    def needs_blocks(self, frame: Frame) -> bool:
        """Tell whether a frame is larger than the memory."""
        whole = isinstance(self.model, RemoteModel) or self.model.settings.mode == "cellpose"
        return not whole and not self.fits(frame)

    def at(self, diameter_um: float | None) -> Predictor:
        """Give the same model for nuclei of another diameter; None leaves it."""
        return self if diameter_um is None else self._with(diameter_um=diameter_um)

    def with_least(self, score: float, volume_um3: float) -> Predictor:
        """Give the same model with another least score and volume of nuclei."""
        return self._with(score_threshold=score, min_volume_um3=volume_um3)

    def _with(self, **update: float) -> Predictor:
        predict = self.params.model_copy(update=update)
        if isinstance(self.model, RemoteModel):
            remote = replace(self.model, predict=predict)
            identity = {**self.identity, "predict": _asked_of_a_service(predict)}
            return replace(self, model=remote, params=predict, identity=identity)
        from nuclei3d.segmentation.settings import segmentation_settings

        main, volume = self.model.models["main"], self.model.models.get("volume")
        settings = segmentation_settings(main.info, predict, volume=volume.info if volume else None)
        identity = {**self.identity, "settings": asdict(settings)}
        return replace(self, model=self.model.with_settings(settings), params=predict, identity=identity)


def open_model(params: Params, model: str) -> Predictor:
    """Open a model folder, weights file, ``models:/name@alias`` or the URL of a service."""
    if is_service(model):
        remote = RemoteModel(model, params.predict)
        served = remote.served_model()
        if served is None:
            say(f"{model} does not say which model it serves: nothing counts as done before")
            # never the same again
            served = uuid.uuid4().hex
        identity: dict[str, Any] = {"service": model, "model": served}
        identity["predict"] = _asked_of_a_service(params.predict)
        return Predictor(remote, params.predict, identity)
    from nuclei3d.experiment.registry import find_model

    segmenter = Segmenter(find_model(model, params), params.predict)
    models = segmenter.models
    identity = {
        "weights_sha256": [digest_of_weights(each.path) for each in models.values()],
        "settings": asdict(segmenter.settings),
    }
    say(f"model {models['main'].info.name} on {segmenter.device.type}, mode {segmenter.settings.mode}")
    return Predictor(segmenter, params.predict, identity)


def _asked_of_a_service(predict: PredictParams) -> dict[str, Any]:
    return predict.model_dump(mode="json", exclude={"report", "animation"})


def fingerprint_of(frame: Frame, predictor: Predictor) -> str:
    """Digest what a frame's result depends on: the content of its files, what is read of them, the model."""
    content = {
        "files": predictor.files_of(frame),
        "image": frame.image,
        "time": frame.time,
        "axes": repr(frame.axes),
        "voxel_size_um": frame.require_voxel_size().zyx,
        **predictor.identity,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
