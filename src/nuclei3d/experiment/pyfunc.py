"""Packing a model folder as an MLflow model from code."""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import nuclei3d
from nuclei3d.config import params_as_dict
from nuclei3d.config.sections import PredictParams
from nuclei3d.experiment.invocation import MAX_VOXELS
from nuclei3d.networks.folder import ModelInfo

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import ModelSignature

# What the code beside the model imports, directly, to answer a request. Pinned to the versions that are
# installed where the model is registered.
_REQUIRED = (
    "torch",
    "cellpose",
    "mlflow",
    "numpy",
    "scipy",
    "numba",
    "scikit-image",
    "tifffile",
    "imagecodecs",
    "zarr",
    "pandas",
    "pydantic",
    "pyyaml",
    "rich",
    "psutil",
)


@dataclass(frozen=True)
class LoggedModel:
    """Where MLflow put the model."""

    model_uri: str
    model_id: str | None


def log_served_model(folder: Path, metrics: Path, info: ModelInfo, predict: PredictParams) -> LoggedModel:
    """Log a model folder in the active run: code, weights, model.json, card, metrics, signature, example.

    Parameters
    ----------
    folder
        The model folder.
    metrics
        metrics.json of its evaluation, kept with the model for later comparisons.
    predict
        Defaults of the service, where a request says nothing.
    """
    import mlflow

    package = Path(nuclei3d.__file__).parent
    logged = mlflow.pyfunc.log_model(
        name="model",
        python_model=str(package / "experiment" / "serving_model.py"),
        code_paths=[str(package)],
        artifacts={"model": str(folder.resolve()), "metrics": str(metrics.resolve())},
        signature=request_signature(info, predict),
        input_example=request_example(info),
        pip_requirements=pinned_requirements(),
        model_config={
            "root": "",
            "max_voxels": MAX_VOXELS,
            "device": "auto",
            "predict": {**params_as_dict(predict), "device": "auto"},
        },
        metadata={"nuclei3d": nuclei3d.__version__, "kind": info.kind, **info.lineage},
    )
    return LoggedModel(str(logged.model_uri), getattr(logged, "model_id", None))


def request_signature(info: ModelInfo, predict: PredictParams) -> ModelSignature:
    """Give the MLflow signature of a request: two columns of which a row uses one, and the parameters.

    Defaults are the values that take effect: those of `predict`, else those stored with the model.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Object, ParamSchema, ParamSpec, Property, Schema

    def parameter(name: str, kind: str, stored: object = None) -> ParamSpec:
        chosen = getattr(predict, name, None)
        return ParamSpec(name, kind, stored if chosen is None else chosen)

    numbers = ("z_um", "y_um", "x_um", "volume_um3", "mean_intensity", "score")
    nucleus = Object(
        [Property("label", DataType.long), *(Property(name, DataType.double) for name in numbers)]
    )
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(DataType.binary, "volume", required=False),
                ColSpec(DataType.string, "path", required=False),
            ]
        ),
        outputs=Schema([ColSpec(DataType.string, "labels"), ColSpec(Array(nucleus), "nuclei")]),
        params=ParamSchema(
            [
                parameter("mode", "string"),
                parameter("diameter_um", "double", info.nucleus_diameter_um),
                ParamSpec("voxel_size_um", "double", [], shape=(-1,)),
                parameter("anisotropy", "double"),
                parameter("channel", "string"),
                ParamSpec("views", "string", list(predict.views), shape=(-1,)),
                ParamSpec("view_weights", "double", list(predict.view_weights or ()), shape=(-1,)),
                parameter("fusion", "string"),
                parameter("orthogonal_step", "long"),
                parameter("cellprob_threshold", "double", info.cellprob_threshold),
                parameter("score_threshold", "double", info.score_threshold),
                parameter("min_volume_um3", "double", info.min_volume_um3),
                parameter("max_volume_um3", "double"),
                parameter("flip_average", "boolean"),
                parameter("precision", "string"),
                parameter("stitch_min_iou", "double"),
                parameter("stitch_max_gap", "long"),
                parameter("flow3d_smooth", "double"),
            ]
        ),
    )


def request_example(info: ModelInfo) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Give a small request that works: two bright balls of the model's diameter in a box."""
    import pandas as pd
    import tifffile

    diameter = info.nucleus_diameter_um or 10.0
    step = diameter / 8
    z, y, x = np.mgrid[0:8, 0:24, 0:32].astype(np.float32)
    image = np.full(z.shape, 100, np.float32)
    for centre in ((4, 12, 8), (4, 12, 24)):
        squared = (2 * (z - centre[0])) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2
        image += 1000 * np.exp(-squared / 18)
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        image.astype(np.uint16),
        ome=True,
        compression="zlib",
        metadata={
            "axes": "ZYX",
            "PhysicalSizeZ": 2 * step,
            "PhysicalSizeY": step,
            "PhysicalSizeX": step,
            "PhysicalSizeZUnit": "µm",
            "PhysicalSizeYUnit": "µm",
            "PhysicalSizeXUnit": "µm",
            "UUID": "00000000-0000-5000-8000-000000000000",
        },
    )
    return pd.DataFrame({"volume": [file.getvalue()]}), {"mode": "auto"}


def pinned_requirements() -> list[str]:
    """Give the packages that a served model needs, at the installed versions without a build such as +cpu."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in _REQUIRED]
