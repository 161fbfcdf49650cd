"""Images segmented by a model, and what is done with the masks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nuclei3d.cli.options import AsJson, Out, Overrides, ParamsFile, finish, load, with_options


def predict(
    inputs: Annotated[
        list[Path], typer.Argument(help="Files, folders or OME-Zarr.", metavar="INPUT...", show_default=False)
    ],
    model: Annotated[
        str, typer.Option("--model", help="Model folder, weights file, models:/name@alias or URL.")
    ],
    out: Out,
    mode: Annotated[
        str | None,
        typer.Option("--mode", help="auto, ortho, stitch, full3d, mixed or cellpose; see params.yaml."),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory", help="Cut volumes that need more than this into blocks.", metavar="GB"),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", help="Dask cluster for the blocks.", metavar="tcp://HOST:PORT"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Segment again what was done before.")
    ] = False,
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Segment volumes and time-lapses in 3D."""
    from nuclei3d.stages.tracked import predict_tracked

    given = {"mode": mode, "memory_gb": memory, "scheduler": scheduler}
    finish(
        predict_tracked(
            load(params, with_options(overrides, "predict", given)),
            inputs,
            model,
            out,
            overwrite=overwrite,
        ),
        as_json,
    )


def export(
    out: Out,
    model: Annotated[
        str | None, typer.Option("--model", help="Model folder, weights file or models:/name@alias.")
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option("--masks", help="Masks that predict wrote, for seg and rois.", metavar="DIR"),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Their images, for seg.", metavar="DIR")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="cellpose, bioimageio, seg or rois; may be repeated."),
    ] = None,
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write a model for Cellpose or bioimage.io, or masks for Cellpose's GUI or ImageJ."""
    from nuclei3d.stages.export.export import export

    finish(
        export(load(params, overrides), out, model=model, masks=masks, images=images, formats=formats or ()),
        as_json,
    )


def view(
    image: Annotated[Path, typer.Argument(help="Image, or a folder of them.", metavar="IMAGE")],
    masks: Annotated[
        list[Path] | None, typer.Argument(help="Masks to lay over it.", metavar="MASKS...")
    ] = None,
    params: ParamsFile = None,
    overrides: Overrides = None,
) -> None:
    """Open an image and masks in napari, at the right scale."""
    from nuclei3d.stages.view import view

    view(load(params, overrides), image, masks or ())
