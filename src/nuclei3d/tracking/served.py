"""Loading a model for the service: the same class that MLflow's own server runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nuclei3d.config import Params, params_as_dict
from nuclei3d.tracking.invocation import refuse_second_model
from nuclei3d.tracking.registry import download_served_model, is_registered, model_folder_in
from nuclei3d.volumes.missing import missing

if TYPE_CHECKING:
    from nuclei3d.tracking.serving_model import NucleiModel


def load_served_model(model: str, params: Params) -> NucleiModel:
    """Load a model for the service.

    The model folder is taken out of the registry and run by the installed package, not by the copy of the
    code that was logged with it: so an older version can still be served after the package was renewed.

    Parameters
    ----------
    model
        A URI of MLflow, or a model folder.
    params
        `serve` has the limits and the root, `predict` the defaults of a request and the device.

    Raises
    ------
    InputError
        If there is no such model, or the parameters name a second one.
    """
    refuse_second_model(params.predict)
    if is_registered(model):
        folder = model_folder_in(download_served_model(model, params))
    else:
        folder = Path(model)
        if not folder.is_dir():
            raise missing(folder, f"{model} is no model folder; give one, or models:/name@champion")
    from nuclei3d.tracking.serving_model import NucleiModel

    served = NucleiModel()
    served.open(
        folder,
        {
            "root": params.serve.root,
            "max_voxels": params.serve.max_voxels,
            "device": params.predict.device,
            "predict": params_as_dict(params.predict),
        },
    )
    return served
