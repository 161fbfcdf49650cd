"""The command line: one thin command per stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from nuclei3d import __version__
from nuclei3d.console import emit_json, say
from nuclei3d.errors import InputError

if TYPE_CHECKING:
    from nuclei3d.config import Params

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

ParamsFile = Annotated[
    Path | None, typer.Option("--params", help="Parameter file; params.yaml if there is one.", metavar="FILE")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one parameter; may be repeated.", metavar="SECTION.KEY=VALUE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.", metavar="DIR")]


class _Result(Protocol):
    def as_json(self) -> dict[str, Any]: ...


def _load(file: Path | None, overrides: Sequence[str] | None) -> Params:
    from nuclei3d.config import load_params

    if file is None and Path("params.yaml").is_file():
        file = Path("params.yaml")
    return load_params(file, overrides or ())


def _finish(result: _Result, as_json: bool) -> None:
    if as_json:
        emit_json(result.as_json())


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


@app.command()
def simulate(
    out: Out, params: ParamsFile = None, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Make time-lapses of synthetic embryos with exact labels."""
    from nuclei3d.stages.simulate import simulate

    _finish(simulate(_load(params, overrides), out), as_json)


@app.command()
def prepare(
    data: Annotated[Path, typer.Option("--data", help="Folder of labelled embryos.", metavar="DIR")],
    out: Out,
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Cut labelled embryos into planes with flows: the training data."""
    from nuclei3d.stages.prepare import prepare

    _finish(prepare(_load(params, overrides), data, out), as_json)


@app.command()
def train(
    slices: Annotated[Path, typer.Option("--slices", help="Folder made by prepare.", metavar="DIR")],
    out: Out,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Labelled embryos, for validation in 3D.", metavar="DIR"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--afresh", help="Go on from the last checkpoint, or start anew.")
    ] = True,
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train a network on prepared planes."""
    from nuclei3d.stages.train import train

    _finish(train(_load(params, overrides), slices, out, data=data, resume=resume), as_json)


@app.command()
def predict(
    inputs: Annotated[
        list[Path], typer.Argument(help="Files, folders or OME-Zarr.", metavar="INPUT...", show_default=False)
    ],
    model: Annotated[
        str, typer.Option("--model", help="Model folder, weights file, models:/name@alias or URL.")
    ],
    out: Out,
    mode: Annotated[
        str | None, typer.Option("--mode", help="ortho, stitch, cellpose or full3d; see params.yaml.")
    ] = None,
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Segment volumes and time-lapses in 3D."""
    from nuclei3d.stages.predict import predict

    chosen = [*(overrides or ()), *([f"predict.mode={mode}"] if mode else [])]
    _finish(predict(_load(params, chosen), inputs, model, out), as_json)


@app.command()
def evaluate(
    truth: Annotated[Path, typer.Option("--truth", help="Folder of true labels.", metavar="DIR")],
    pred: Annotated[Path, typer.Option("--pred", help="Folder of predicted labels.", metavar="DIR")],
    out: Out,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Images, for contrast and baselines.", metavar="DIR"),
    ] = None,
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compare predicted with true labels: metrics.json, nuclei.csv and a report."""
    from nuclei3d.stages.evaluate import evaluate

    _finish(evaluate(_load(params, overrides), truth, pred, out, images=images), as_json)


@app.command()
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

    _finish(compare(_load(params, overrides), a, b, out), as_json)


@app.command()
def search(
    slices: Annotated[Path, typer.Option("--slices", help="Folder made by prepare.", metavar="DIR")],
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
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Labelled embryos, for validation in 3D.", metavar="DIR"),
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write the best values into the parameter file.")
    ] = False,
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Search for the training parameters that do best in 3D."""
    from nuclei3d.stages.search import search

    file = params or Path("params.yaml")
    result = search(
        _load(params, overrides),
        slices,
        out,
        trials=trials,
        storage=storage,
        workers=workers,
        data=data,
        apply=apply,
        params_file=file if file.is_file() else None,
    )
    _finish(result, as_json)


@app.command()
def register(
    model: Annotated[Path, typer.Option("--model", help="Model folder.", metavar="DIR")],
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

    _finish(register(_load(params, overrides), model, metrics, force=force), as_json)


@app.command()
def run(
    data: Annotated[Path, typer.Option("--data", help="Labelled embryos.", metavar="DIR")] = Path("data"),
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", metavar="DIR")] = Path("out"),
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Do the whole job: prepare, train, predict, evaluate, register."""
    from nuclei3d.stages.pipeline import run_pipeline

    _finish(run_pipeline(_load(params, overrides), data, out), as_json)


def main() -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    try:
        app()
    except InputError as error:
        say(f"nuclei3d: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("nuclei3d: stopped; what was finished is kept")
        sys.exit(130)
