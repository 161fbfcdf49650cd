"""A registered model, or a model folder, as an HTTP service."""

from __future__ import annotations

import os

from nuclei3d.client import TOKEN_VARIABLE
from nuclei3d.config import Params
from nuclei3d.errors import InputError


def serve(params: Params, model: str) -> None:
    """Serve a model (``models:/name@alias``, another URI of MLflow, a model folder) over HTTP until stopped.

    The section serve has the address and the limits, predict the defaults of a request. An alias is looked up
    once, at the start.
    """
    from nuclei3d.serve import is_loopback, listen, open_service, run_service

    token = os.environ.get(TOKEN_VARIABLE) or None
    if params.serve.root is not None and not os.path.isdir(params.serve.root):
        raise InputError(f"serve.root {params.serve.root} is no folder")
    if token is None and not params.serve.insecure and not is_loopback(params.serve.host):
        raise InputError(
            f"anyone who reaches {params.serve.host} could use this service; set a token in "
            f"{TOKEN_VARIABLE}, or say --insecure"
        )
    with listen(params.serve) as listening, open_service(model, params, token) as service:
        run_service(service, listening)
