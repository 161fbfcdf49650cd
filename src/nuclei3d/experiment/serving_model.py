"""The model as MLflow serves it: this file is logged as code and run where the model is loaded.

MLflow finds the package beside it (``code_paths``), so neither the project nor a pickle is needed there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from nuclei3d.config.sections import PredictParams
from nuclei3d.errors import InputError
from nuclei3d.experiment.invocation import (
    Admission,
    RequestParams,
    VolumeLimits,
    check_cost,
    check_rows,
    open_frame,
    read_request_params,
    read_volume,
    volume_on_disk,
)
from nuclei3d.images.tiff import write_labels
from nuclei3d.networks.cpnet import choose_device
from nuclei3d.networks.folder import load_model
from nuclei3d.segmentation.masks import Nucleus
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.segmentation.settings import segmentation_settings


class NucleiModel(PythonModel):
    """Segments the volumes of a data frame, one row each.

    Its ``model_config`` (MLflow's, also by the environment variable SERVING_MODEL_CONFIG) has ``root``, the
    folder below which rows may name files, ``max_voxels``, ``max_network_voxels``, ``device`` and
    ``predict``, the defaults.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load what MLflow fetched."""
        self.open(Path(context.artifacts["model"]), context.model_config or {})

    def open(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Load the network of a model folder and find out which version of which registered model it is."""
        self.limits = VolumeLimits.of(config)
        self.defaults = PredictParams.model_validate(config.get("predict") or {})
        self.model = load_model(folder)
        self.device = choose_device(str(config.get("device") or self.defaults.device))
        self.model.network.to(self.device)
        self.version = {
            "name": self.model.info.name,
            **_registered_version(folder),
            "weights_sha256": hashlib.sha256(self.model.path.read_bytes()).hexdigest(),
            "settings_sha256": self._digest_settings(),
        }
        # Requests come in threads; the network's work is done for one of them at a time.
        self._device_lock = threading.Lock()

    def _digest_settings(self) -> str:
        """Digest all that an answer depends on beside weights and request."""
        settings = [self.model.info.model_dump(mode="json"), self.defaults.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Answer a request of MLflow's own server; see `answer`."""
        if not isinstance(model_input, pd.DataFrame):
            model_input = pd.DataFrame(model_input)
        try:
            check_rows(len(model_input))
            return [self.answer(row, params) for row in model_input.to_dict(orient="records")]
        except InputError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None

    def answer(self, row: Mapping[Any, Any], params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Segment the volume of one row: ``volume`` (bytes of a TIFF, or their base64) or ``path``."""
        asked = read_request_params(params)
        with volume_on_disk(row, self.limits) as file:
            check_cost(file, asked, Admission(self.limits, self.model.info, self.defaults))
            return self.segment_file(file, asked)

    def segment_file(self, file: Path, asked: RequestParams, folder: Path | None = None) -> dict[str, Any]:
        """Segment the one volume in a TIFF or OME-Zarr; `folder` is the place for temporary files.

        Gives ``labels`` (zlib OME-TIFF in base64, the file that ``nuclei3d predict`` writes), ``nuclei``
        (list of records), ``parameters`` (the effective ones), ``model`` (name, version), ``seconds``, and
        ``warnings`` (in what the volume is unlike the training).
        """
        chosen = asked.over(self.defaults)
        frame, voxel_size = open_frame(file, asked, self.limits.max_voxels)
        image = read_volume(frame)
        # not by the Segmenter: an unknown diameter is explained by this volume's voxels
        settings = segmentation_settings(self.model.info, chosen, voxel_size)
        with self._device_lock:
            result = Segmenter(self.model, settings, self.device).segment(image, voxel_size)
        with tempfile.TemporaryDirectory(prefix="nuclei3d-", dir=folder) as temporary:
            masks = Path(temporary) / "masks.ome.tif"
            write_labels(masks, result.labels, voxel_size)
            labels = base64.b64encode(masks.read_bytes()).decode("ascii")
        return {
            "labels": labels,
            "nuclei": [_record(nucleus) for nucleus in result.nuclei],
            "parameters": settings.as_parameters() | {"voxel_size_um": list(voxel_size.zyx)},
            "model": self.version,
            "seconds": dict(result.seconds),
            "warnings": list(result.warnings),
        }


def describe(model: NucleiModel) -> tuple[str, dict[str, str]]:
    """Give the folder and the version of a served model."""
    return str(model.model.path.parent.absolute()), model.version


def answer_rows(model: NucleiModel, files: Sequence[Path], asked: RequestParams, answer: Path) -> None:
    """Write the answer to a request that `nuclei3d.experiment.invocation.take_apart` has let through."""
    predictions = [model.segment_file(file, asked, answer.parent) for file in files]
    answer.write_text(json.dumps({"predictions": predictions}), encoding="utf-8")


def _record(nucleus: Nucleus) -> dict[str, float | None]:
    """Give a nucleus as JSON can hold it: what is undefined (the score of stock Cellpose) is None."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in vars(nucleus).items()
    }


def _registered_version(folder: Path) -> dict[str, str]:
    """Read the name and version that MLflow leaves beside a model that it fetched from the registry."""
    for parent in list(folder.parents)[:3]:
        note = parent / "registered_model_meta"
        if note.is_file():
            found = yaml.safe_load(note.read_text(encoding="utf-8"))
            return {"registered_name": str(found["model_name"]), "version": str(found["model_version"])}
    return {}


set_model(NucleiModel())
