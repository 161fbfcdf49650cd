"""The whole job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nuclei3d.cli.options import AsJson, Overrides, ParamsFile, finish, load


def run(
    data: Annotated[Path, typer.Option("--data", help="Labelled embryos.", metavar="DIR")] = Path("data"),
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", metavar="DIR")] = Path("out"),
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Do the whole job: prepare, train, predict, evaluate, register."""
    from nuclei3d.stages.pipeline import run_pipeline

    finish(run_pipeline(load(params, overrides), data, out), as_json)
