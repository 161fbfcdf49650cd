"""How good a model is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nuclei3d.cli.options import AsJson, ContrastBins, Data, Out, Overrides, ParamsFile, finish, load


def evaluate(
    truth: Annotated[Path, typer.Option("--truth", help="Folder of true labels.", metavar="DIR")],
    pred: Annotated[Path, typer.Option("--pred", help="Folder of predicted labels.", metavar="DIR")],
    out: Out,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Images, for contrast and baselines.", metavar="DIR"),
    ] = None,
    slices: ContrastBins = None,
    history: Annotated[
        Path | None,
        typer.Option("--history", help="history.csv of the training, for the report.", metavar="FILE"),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            help="Labels by another method, put beside the predictions; may be repeated.",
            metavar="NAME=DIR",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="What the report calls the predictions.")
    ] = "this model",
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compare predicted with true labels: metrics.json, nuclei.csv and a report."""
    from nuclei3d.stages.evaluate import read_baselines
    from nuclei3d.stages.tracked import evaluate_tracked

    finish(
        evaluate_tracked(
            load(params, overrides),
            truth,
            pred,
            out,
            images=images,
            baselines=read_baselines(baseline or ()),
            summary=slices,
            history=history,
            method=name,
        ),
        as_json,
    )


def assess(
    data: Data,
    model: Annotated[str, typer.Option("--model", help="Model folder, weights file or models:/name@alias.")],
    out: Annotated[
        Path, typer.Option("--out", help="Folder for predictions/ and evaluation/.", metavar="DIR")
    ] = Path("."),
    slices: ContrastBins = None,
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Predict the held-out embryos of a data set and evaluate them."""
    from nuclei3d.stages.assess import AssessFolders, assess

    folders = AssessFolders.below(out)
    finish(assess(load(params, overrides), data, model, folders, slices=slices), as_json)


def compare(
    a: Annotated[Path, typer.Argument(help="metrics.json, or the folder of an evaluation.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="The other one, on the same volumes.", metavar="B")],
    out: Annotated[
        Path | None, typer.Option("--out", help="File or folder for the result.", metavar="DIR")
    ] = None,
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say whether model B is really better than model A on the same volumes."""
    from nuclei3d.stages.compare import compare

    finish(compare(load(params, overrides), a, b, out), as_json)
