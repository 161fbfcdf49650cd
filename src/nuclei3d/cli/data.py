"""The data: made up, prepared, looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nuclei3d.cli.options import AsJson, Data, Out, Overrides, ParamsFile, Slices, finish, load


def simulate(
    out: Out, params: ParamsFile = None, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Make time-lapses of synthetic embryos with exact labels."""
    from nuclei3d.stages.tracked import simulate_tracked

    finish(simulate_tracked(load(params, overrides), out), as_json)


def prepare(
    data: Data,
    out: Out,
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Cut labelled embryos into planes with flows: the training data."""
    from nuclei3d.stages.tracked import prepare_tracked

    finish(prepare_tracked(load(params, overrides), data, out), as_json)


def augment(
    slices: Slices,
    out: Annotated[Path, typer.Option("--out", help="PNG to write.", metavar="FILE")],
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Draw a sheet of augmented crops with their labels, to look at before training."""
    from nuclei3d.stages.augmentation_sheet import write_augmentation_sheet

    finish(write_augmentation_sheet(load(params, overrides), slices, out), as_json)
