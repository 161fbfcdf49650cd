"""A registered model, or a model folder, as an HTTP service."""

from __future__ import annotations

import os

from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.errors import InputError


def serve(params: Params, model: str) -> None:
    """Serve a model (``models:/name@alias``, another URI of MLflow, a model folder) over HTTP until stopped.

    The section serve has the address and the limits, predict the defaults of a request. An alias is looked up
    once, at the start.
    """
    from nuclei3d.experiment.registry import load_served_model
    from nuclei3d.serve import Service, listen, run_service

    token = os.environ.get(params.serve.token_variable) or None
    if params.serve.root is not None and not os.path.isdir(params.serve.root):
        raise InputError(f"serve.root {params.serve.root} is no folder")
    listening = listen(params.serve)
    try:
        served = load_served_model(model, params)
        if token is None and params.serve.host not in ("127.0.0.1", "::1", "localhost"):
            say(
                f"warning: anyone who reaches {params.serve.host} may use this service; set a token in "
                f"{params.serve.token_variable}"
            )
        run_service(Service(served, params.serve, token), params.serve, listening)
    finally:
        listening.close()
