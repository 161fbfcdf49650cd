"""The command line: one thin command per stage, listed in `COMMANDS` in the order of the help."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
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


ParamsFile = Annotated[
    Path | None, typer.Option("--params", help="Parameter file; params.yaml if there is one.", metavar="FILE")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one parameter; may be repeated.", metavar="SECTION.KEY=VALUE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Slices = Annotated[Path, typer.Option("--slices", help="Folder made by prepare.", metavar="DIR")]
ContrastBins = Annotated[
    Path | None,
    typer.Option("--slices", help="Folder made by prepare: its bins of contrast.", metavar="DIR"),
]
Data = Annotated[Path, typer.Option("--data", help="Folder of labelled embryos.", metavar="DIR")]
ValidationData = Annotated[
    Path | None, typer.Option("--data", help="Labelled embryos, for validation in 3D.", metavar="DIR")
]
ModelFolder = Annotated[Path, typer.Option("--model", help="Model folder.", metavar="DIR")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.", metavar="DIR")]


class Result(Protocol):
    """What a stage gives back."""

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""


def load(file: Path | None, overrides: Sequence[str] | None) -> Params:
    """Load the parameters from a file, or from params.yaml where there is one, and override some."""
    from nuclei3d.config import load_params

    if file is None and Path("params.yaml").is_file():
        file = Path("params.yaml")
    return load_params(file, overrides or ())


def with_options(overrides: Sequence[str] | None, section: str, given: Mapping[str, object]) -> list[str]:
    """Turn options such as --mode into overrides of a section's parameters."""
    named = [f"{section}.{key}={value}" for key, value in given.items() if value is not None]
    return [*(overrides or ()), *named]


def finish(result: Result, as_json: bool) -> None:
    """Print the result of a stage where --json asks for it."""
    if as_json:
        emit_json(result.as_json())


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
    from nuclei3d.stages.augment import write_augmentation_sheet

    finish(write_augmentation_sheet(load(params, overrides), slices, out), as_json)


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


def run(
    data: Annotated[Path, typer.Option("--data", help="Labelled embryos.", metavar="DIR")] = Path("data"),
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", metavar="DIR")] = Path("out"),
    params: ParamsFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Do the whole job: prepare, train, predict, evaluate, register."""
    from nuclei3d.stages.run import run_pipeline

    finish(run_pipeline(load(params, overrides), data, out), as_json)


def params(
    section: Annotated[
        str | None, typer.Argument(help="One section, such as train.augment.", metavar="SECTION")
    ] = None,
) -> None:
    """Print what each parameter means, its default and its values."""
    from nuclei3d.config.reference import describe_parameters

    sys.stdout.write(describe_parameters(section))


for _command in (
    simulate,
    prepare,
    augment,
    train,
    calibrate,
    predict,
    evaluate,
    assess,
    compare,
    search,
    register,
    rollback,
    serve,
    export,
    view,
    run,
    params,
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
