"""Training, and the choice of what a training leaves open."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nuclei3d.cli.options import (
    AsJson,
    Data,
    ModelFolder,
    Out,
    Overrides,
    ParamsFile,
    Slices,
    ValidationData,
    finish,
    load,
)


def train(
    slices: Slices,
    out: Out,
    data: ValidationData = None,
    resume: Annotated[
        bool, typer.Option("--resume/--afresh", help="Go on from the last checkpoint, or start anew.")
    ] = True,
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train a network on prepared planes."""
    from nuclei3d.stages.train import train

    finish(train(load(params, overrides), slices, out, data=data, resume=resume), as_json)


def calibrate(
    model: ModelFolder,
    data: Data,
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Choose a model's thresholds on the validation embryos (train does it by itself)."""
    from nuclei3d.stages.calibrate import calibrate

    finish(calibrate(load(params, overrides), model, data), as_json)


def search(
    slices: Slices,
    trials: Annotated[
        int, typer.Option("--trials", help="Trials wanted in all, over all starts.", metavar="N")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the search.", metavar="DIR")] = Path(
        "runs/search"
    ),
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage", help="postgresql://... for many machines; a file in --out otherwise.", metavar="URL"
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes on this machine.", metavar="N")] = 1,
    data: ValidationData = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write the best values into the parameter file.")
    ] = False,
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Search for the training parameters that do best in 3D."""
    from nuclei3d.stages.search.study import search

    file = params or Path("params.yaml")
    result = search(
        load(params, overrides),
        slices,
        out,
        trials=trials,
        storage=storage,
        workers=workers,
        data=data,
        apply=apply,
        params_file=file if file.is_file() else None,
    )
    finish(result, as_json)
