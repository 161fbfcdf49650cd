"""Models in use: the registry, the service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nuclei3d.cli.options import AsJson, ModelFolder, Overrides, ParamsFile, finish, load, with_options


def register(
    model: ModelFolder,
    metrics: Annotated[
        Path, typer.Option("--metrics", help="metrics.json of its evaluation.", metavar="FILE")
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Make it the champion whatever the comparison says.")
    ] = False,
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Register a model as challenger; it becomes champion if it is better."""
    from nuclei3d.stages.register import register

    finish(register(load(params, overrides), model, metrics, force=force), as_json)


def rollback(
    version: Annotated[
        str | None, typer.Option("--version", help="Version to go back to; the one before otherwise.")
    ] = None,
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Make an earlier version of the registered model the champion again."""
    from nuclei3d.stages.register import roll_back

    finish(roll_back(load(params, overrides), version), as_json)


def serve(
    model: Annotated[
        str, typer.Option("--model", help="models:/name@alias or a model folder.")
    ] = "models:/nuclei_3d@champion",
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port to listen on.", metavar="N")] = None,
    params: ParamsFile = None,
    overrides: Overrides = None,
) -> None:
    """Serve a model over HTTP."""
    from nuclei3d.stages.serve import serve

    serve(load(params, with_options(overrides, "serve", {"host": host, "port": port})), model)
