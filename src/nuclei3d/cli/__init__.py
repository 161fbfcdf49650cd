"""The command line: one thin command per stage, listed here in the order of the help."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from nuclei3d import __version__
from nuclei3d.cli import data, pipeline, release, scoring, segmentation, training
from nuclei3d.console import say
from nuclei3d.errors import InputError

# nothing of the user's leaves the machine, whatever a library thinks of it
for _switch in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "DVC_NO_ANALYTICS"):
    os.environ.setdefault(_switch, "true")

app = typer.Typer(
    help="Retrain Cellpose on labelled 3D embryos, measure it, register it, and segment time-lapses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"nuclei3d {__version__}\n")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


for _command in (
    data.simulate,
    data.prepare,
    data.augment,
    training.train,
    training.calibrate,
    segmentation.predict,
    scoring.evaluate,
    scoring.assess,
    scoring.compare,
    training.search,
    release.register,
    release.rollback,
    release.serve,
    segmentation.export,
    segmentation.view,
    pipeline.run,
):
    app.command()(_command)


def main() -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2, a full disk with 1."""
    try:
        app()
    except InputError as error:
        say(f"nuclei3d: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("nuclei3d: stopped; what was finished is kept")
        sys.exit(130)
