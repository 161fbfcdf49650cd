"""A model packed for serving: its code and weights, what it requires, the form of its requests."""

from __future__ import annotations

import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import nuclei3d
from nuclei3d.config.sections import PredictParams
from nuclei3d.experiment.invocation import RequestParams, VolumeLimits
from nuclei3d.images.tiff import write_image
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.folder import ModelInfo
from nuclei3d.segmentation.masks import NUCLEUS_COLUMNS

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.models.model import ModelInfo as LoggedModel
    from mlflow.types.schema import ParamSpec

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
    "defusedxml",
    "zarr",
    "pandas",
    "pydantic",
    "pyyaml",
    "ruamel.yaml",
    "rich",
    "psutil",
)


def log_served_model(folder: Path, metrics: Path, info: ModelInfo, predict: PredictParams) -> LoggedModel:
    """Log a model folder in the active run: code, weights, model.json, card, metrics, signature, example.

    The metrics.json of its evaluation is kept with the model for later comparisons; `predict` gives the
    defaults of the service, where a request says nothing.
    """
    import mlflow

    package = Path(nuclei3d.__file__).parent
    logged: LoggedModel = mlflow.pyfunc.log_model(
        name="model",
        python_model=str(package / "experiment" / "serving_model.py"),
        code_paths=[str(package)],
        artifacts={"model": str(folder.resolve()), "metrics": str(metrics.resolve())},
        signature=request_signature(info, predict),
        input_example=request_example(info),
        # at the installed versions without a build such as +cpu
        pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in _REQUIRED],
        model_config={
            "root": "",
            "max_voxels": VolumeLimits().max_voxels,
            "max_network_voxels": VolumeLimits().max_network_voxels,
            "device": "auto",
            "predict": {**predict.model_dump(mode="json"), "device": "auto"},
        },
        metadata={"nuclei3d": nuclei3d.__version__, "kind": info.kind, **info.lineage},
    )
    return logged


def request_signature(info: ModelInfo, predict: PredictParams) -> ModelSignature:
    """Give the MLflow signature of a request: two columns of which a row uses one, and the parameters.

    Defaults are the values that take effect: those of `predict`, else those stored with the model.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Object, ParamSchema, Property, Schema

    label, *numbers = NUCLEUS_COLUMNS
    nucleus = Object([Property(label, DataType.long), *(Property(name, DataType.double) for name in numbers)])
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(DataType.binary, "volume", required=False),
                ColSpec(DataType.string, "path", required=False),
            ]
        ),
        outputs=Schema([ColSpec(DataType.string, "labels"), ColSpec(Array(nucleus), "nuclei")]),
        params=ParamSchema([_parameter(name, info, predict) for name in RequestParams.model_fields]),
    )


_MLFLOW_TYPES = {"string": "string", "number": "double", "integer": "long", "boolean": "boolean"}


def _parameter(name: str, info: ModelInfo, predict: PredictParams) -> ParamSpec:
    """Describe a parameter to MLflow, whose empty list means "not given"."""
    from mlflow.types.schema import ParamSpec

    described = RequestParams.model_json_schema()["properties"][name]
    kind = described if "type" in described else described["anyOf"][0]
    value = getattr(predict, name, None)
    if kind["type"] == "array":
        item = kind["items"] if "items" in kind else kind["prefixItems"][0]
        return ParamSpec(name, _MLFLOW_TYPES[item["type"]], list(value or ()), shape=(-1,))
    # a least volume in the signature would be sent with every request, whatever its diameter
    if value is None and name != "min_volume_um3":
        value = getattr(info, "nucleus_diameter_um" if name == "diameter_um" else name, None)
    return ParamSpec(name, _MLFLOW_TYPES[kind["type"]], value)


def request_example(info: ModelInfo) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Give a small request that works: two bright balls of the model's diameter in a box."""
    import pandas as pd

    diameter = info.nucleus_diameter_um or 10.0
    step = diameter / 8
    z, y, x = np.mgrid[0:8, 0:24, 0:32].astype(np.float32)
    image = np.full(z.shape, 100, np.float32)
    for centre in ((4, 12, 8), (4, 12, 24)):
        squared = (2 * (z - centre[0])) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2
        image += 1000 * np.exp(-squared / 18)
    with tempfile.TemporaryDirectory(prefix="nuclei3d-") as scratch:
        file = Path(scratch) / "example.ome.tif"
        write_image(file, image.astype(np.uint16), VoxelSize(2 * step, step, step))
        return pd.DataFrame({"volume": [file.read_bytes()]}), {"mode": "auto"}
