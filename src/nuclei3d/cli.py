"""The command line: one thin command per stage, in the order of the help."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from nuclei3d import __version__
from nuclei3d.console import emit_json, say
from nuclei3d.errors import InputError, missing

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


# What a command reads: whether it is there is known before anything large is imported.
_READ = frozenset(
    (
        "data",
        "slices",
        "inputs",
        "image",
        "masks",
        "truth",
        "pred",
        "images",
        "history",
        "metrics",
        "a",
        "b",
        "tracks",
    )
)
# Commands that show images to a model as its training showed them.
_AS_TRAINED = frozenset(("predict", "assess", "calibrate", "serve"))
# How several values stand in one text, for options that may be repeated.
_SEVERAL = {"--set": re.compile(r"\s+(?=(?:seed|\w+\.[\w.]+)=)"), "--format": re.compile(r"\s+")}


class _Command(TyperCommand):
    """A command for which an option without a value (``--host ""``, ``--set train.epochs=``) is not given.

    So each line of MLproject can name all options.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Leave out options without a value, and part texts with several."""
        valued = {
            name for option in self.params if not getattr(option, "is_flag", True) for name in option.opts
        }
        kept: list[str] = []
        words = iter(args)
        for word in words:
            value = next(words, None) if word in valued else None
            if value is None:
                kept.append(word)
                continue
            texts = _SEVERAL[word].split(value.strip()) if word in _SEVERAL else [value]
            for text in texts:
                if text and not (word == "--set" and text.endswith("=")):
                    kept += [word, text]
        return super().parse_args(ctx, kept)

    def invoke(self, ctx: Any) -> Any:
        """Refuse at once what is not there or would not act."""
        for option in self.params:
            given = ctx.params.get(option.name)
            if option.name in _READ and given is not None:
                for path in map(Path, given if isinstance(given, list | tuple) else [given]):
                    if not path.exists():
                        name = f" ({option.opts[0]})" if option.opts[0].startswith("--") else ""
                        raise missing(path, f"{path} does not exist{name}")
        if self.name in _AS_TRAINED:
            for override in ctx.params.get("overrides") or ():
                if override.startswith("normalization."):
                    raise InputError(
                        f"--set {override} would not act: {self.name} normalises as the model was trained; "
                        "set it for prepare and train anew"
                    )
        return super().invoke(ctx)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"nuclei3d {__version__}\n")
        raise typer.Exit


@app.callback()
def _all_commands(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


ParamsFile = Annotated[
    Path | None, typer.Option(help="Parameter file; params.yaml if there is one.", metavar="FILE")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one parameter; may be repeated.", metavar="SECTION.KEY=VALUE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Slices = Annotated[Path, typer.Option(help="Folder made by prepare.", metavar="DIR")]
ContrastBins = Annotated[
    Path | None, typer.Option(help="Folder made by prepare: its bins of contrast.", metavar="DIR")
]
Data = Annotated[Path, typer.Option(help="Folder of labelled embryos.", metavar="DIR")]
ValidationData = Annotated[
    Path | None, typer.Option(help="Labelled embryos, for validation in 3D.", metavar="DIR")
]
ModelFolder = Annotated[Path, typer.Option(help="Model folder.", metavar="DIR")]
Out = Annotated[Path, typer.Option(help="Folder to write.", metavar="DIR")]


Result = Any
"""What a stage gives back: a dataclass, with `as_json` where its plain data are more than its fields."""


def _print(result: Result, as_json: bool) -> None:
    if as_json:
        emit_json(result.as_json() if hasattr(result, "as_json") else asdict(result))


def _load(file: Path | None, overrides: Sequence[str] | None, **given: Mapping[str, object]) -> Params:
    """Load a file, or params.yaml where there is one; override some, `given` ones (by section) last."""
    from nuclei3d.config import load_params

    if file is None and Path("params.yaml").is_file():
        file = Path("params.yaml")
    options = [
        f"{section}.{key}={value}"
        for section, values in given.items()
        for key, value in values.items()
        if value is not None
    ]
    return load_params(file, [*(overrides or ()), *options])


def _with_params(work: Callable[..., Result]) -> Callable[..., None]:
    """Put the options --params, --set and, where there is a result, --json in the place of `params`."""
    signature = inspect.signature(work, locals={"Params": object}, eval_str=True)
    common = {"params": (ParamsFile, None), "overrides": (Overrides, None), "as_json": (AsJson, False)}
    if signature.return_annotation is None:
        del common["as_json"]
    options = [parameter for name, parameter in signature.parameters.items() if name != "params"]
    options += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in common.items()
    ]

    def command(params: Path | None, overrides: list[str] | None, as_json: bool = False, **own: Any) -> None:
        _print(work(_load(params, overrides), **own), as_json)

    command.__name__, command.__doc__ = work.__name__, work.__doc__
    command.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    return command


@_with_params
def simulate(params: Params, out: Out) -> Result:
    """Make time-lapses of synthetic embryos with exact labels."""
    from nuclei3d.stages.tracked import simulate_tracked

    return simulate_tracked(params, out)


@_with_params
def prepare(params: Params, data: Data, out: Out) -> Result:
    """Cut labelled embryos into planes with flows: the training data."""
    from nuclei3d.stages.tracked import prepare_tracked

    return prepare_tracked(params, data, out)


@_with_params
def augment(
    params: Params, slices: Slices, out: Annotated[Path, typer.Option(help="PNG to write.", metavar="FILE")]
) -> Result:
    """Draw a sheet of augmented crops with their labels, to look at before training."""
    from nuclei3d.stages.augment import write_augmentation_sheet

    return write_augmentation_sheet(params, slices, out)


@_with_params
def train(
    params: Params,
    slices: Slices,
    out: Out,
    data: ValidationData = None,
    resume: Annotated[
        bool, typer.Option("--resume/--afresh", help="Go on from the last checkpoint, or start anew.")
    ] = True,
) -> Result:
    """Train a network on prepared planes."""
    from nuclei3d.stages.train import train

    return train(params, slices, out, data=data, resume=resume)


@_with_params
def calibrate(params: Params, model: ModelFolder, data: Data) -> Result:
    """Choose a model's thresholds on the validation embryos (train does it by itself)."""
    from nuclei3d.stages.calibrate import calibrate

    return calibrate(params, model, data)


def search(
    slices: Slices,
    trials: Annotated[int, typer.Option(help="Trials wanted in all, over all starts.", metavar="N")],
    out: Annotated[Path, typer.Option(help="Folder of the search.", metavar="DIR")] = Path("runs/search"),
    storage: Annotated[
        str | None,
        typer.Option(help="postgresql://... for many machines; a file in --out otherwise.", metavar="URL"),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes on this machine.", metavar="N")] = 1,
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
    _print(result, as_json)


def predict(
    inputs: Annotated[
        list[Path], typer.Argument(help="Files, folders or OME-Zarr.", metavar="INPUT...", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="Model folder, weights file, models:/name@alias or URL.")],
    out: Out,
    mode: Annotated[
        str | None, typer.Option(help="auto, ortho, stitch, full3d, mixed or cellpose; see params.yaml.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="Cut volumes that need more than this into blocks.", metavar="GB")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Dask cluster for the blocks.", metavar="tcp://HOST:PORT")
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
    loaded = _load(params, overrides, predict=given)
    _print(predict_tracked(loaded, inputs, model, out, overwrite=overwrite), as_json)


@_with_params
def track(
    params: Params,
    masks: Annotated[Path, typer.Argument(help="Masks of one embryo's time-lapse.", metavar="MASKS")],
    out: Out,
    images: Annotated[Path | None, typer.Option(help="Their images, for intensities.", metavar="DIR")] = None,
    same_numbers: Annotated[
        bool, typer.Option("--same-numbers", help="Write masks that keep their numbers over time, too.")
    ] = False,
) -> Result:
    """Link nuclei over time: tracks, divisions, lineages."""
    from nuclei3d.stages.tracked import track_tracked

    return track_tracked(params, masks, out, images=images, same_numbers=same_numbers)


@_with_params
def export(
    params: Params,
    out: Out,
    model: Annotated[
        str | None, typer.Option(help="Model folder, weights file or models:/name@alias.")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Masks that predict wrote, for seg and rois.", metavar="DIR")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Their images, for seg.", metavar="DIR")] = None,
    slices: Annotated[
        Path | None, typer.Option(help="Folder made by prepare, for cellpose-training.", metavar="DIR")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", help="cellpose, bioimageio, seg, rois or cellpose-training; may be repeated."
        ),
    ] = None,
) -> Result:
    """Write a model, masks or training planes for Cellpose, bioimage.io or ImageJ."""
    from nuclei3d.stages.export import export

    return export(params, out, model=model, masks=masks, images=images, slices=slices, formats=formats or ())


@_with_params
def view(
    params: Params,
    image: Annotated[Path, typer.Argument(help="Image, or a folder of them.", metavar="IMAGE")],
    masks: Annotated[
        list[Path] | None, typer.Argument(help="Masks to lay over it.", metavar="MASKS...")
    ] = None,
) -> None:
    """Open an image and masks in napari, at the right scale."""
    from nuclei3d.stages.view import view

    view(params, image, masks or ())


@_with_params
def evaluate(
    params: Params,
    truth: Annotated[Path, typer.Option(help="Folder of true labels.", metavar="DIR")],
    pred: Annotated[Path, typer.Option(help="Folder of predicted labels.", metavar="DIR")],
    out: Out,
    images: Annotated[
        Path | None, typer.Option(help="Images, for contrast and baselines.", metavar="DIR")
    ] = None,
    slices: ContrastBins = None,
    history: Annotated[
        Path | None, typer.Option(help="history.csv of the training, for the report.", metavar="FILE")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="Labels by another method, put beside the predictions; may be repeated.", metavar="NAME=DIR"
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="What the report calls the predictions.")] = "this model",
    tracks: Annotated[
        Path | None, typer.Option(help="What track wrote; if it lies in --pred it is found.", metavar="DIR")
    ] = None,
) -> Result:
    """Compare predicted with true labels: metrics.json, nuclei.csv and a report."""
    from nuclei3d.stages.evaluate import read_baselines
    from nuclei3d.stages.tracked import evaluate_tracked

    return evaluate_tracked(
        params,
        truth,
        pred,
        out,
        images=images,
        baselines=read_baselines(baseline or ()),
        summary=slices,
        history=history,
        method=name,
        tracks=tracks,
    )


@_with_params
def assess(
    params: Params,
    data: Data,
    model: Annotated[str, typer.Option(help="Model folder, weights file or models:/name@alias.")],
    out: Annotated[Path, typer.Option(help="Folder for predictions/ and evaluation/.", metavar="DIR")] = Path(
        "."
    ),
    slices: ContrastBins = None,
) -> Result:
    """Predict the held-out embryos of a data set and evaluate them."""
    from nuclei3d.stages.assess import assess

    return assess(params, data, model, out, slices=slices)


@_with_params
def compare(
    params: Params,
    a: Annotated[Path, typer.Argument(help="metrics.json, or the folder of an evaluation.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="The other one, on the same volumes.", metavar="B")],
    out: Annotated[Path | None, typer.Option(help="File or folder for the result.", metavar="DIR")] = None,
) -> Result:
    """Say whether model B is really better than model A on the same volumes."""
    from nuclei3d.stages.compare import compare

    return compare(params, a, b, out)


@_with_params
def register(
    params: Params,
    model: ModelFolder,
    metrics: Annotated[Path, typer.Option(help="metrics.json of its evaluation.", metavar="FILE")],
    force: Annotated[
        bool, typer.Option("--force", help="Make it the champion whatever the comparison says.")
    ] = False,
) -> Result:
    """Register a model as challenger; it becomes champion if it is better."""
    from nuclei3d.stages.register import register

    return register(params, model, metrics, force=force)


@_with_params
def rollback(
    params: Params,
    version: Annotated[
        str | None, typer.Option(help="Version to go back to; the one before otherwise.")
    ] = None,
) -> Result:
    """Make an earlier version of the registered model the champion again."""
    from nuclei3d.stages.register import roll_back

    return roll_back(params, version)


def serve(
    model: Annotated[
        str, typer.Option(help="models:/name@alias or a model folder.")
    ] = "models:/nuclei_3d@champion",
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", metavar="N")] = None,
    params: ParamsFile = None,
    overrides: Overrides = None,
) -> None:
    """Serve a model over HTTP."""
    from nuclei3d.stages.serve import serve

    serve(_load(params, overrides, serve={"host": host, "port": port}), model)


@_with_params
def run(
    params: Params,
    data: Annotated[Path, typer.Option(help="Labelled embryos.", metavar="DIR")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Folder to write.", metavar="DIR")] = Path("out"),
) -> Result:
    """Do the whole job: prepare, train, predict, evaluate, register."""
    from nuclei3d.stages.run import run_pipeline

    return run_pipeline(params, data, out)


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
    track,
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
    app.command(cls=_Command)(_command)


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
