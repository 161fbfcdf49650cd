"""The command line: one thin command per stage, in the order of the help."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from nuclei3d import __version__
from nuclei3d.console import emit_json, say, warned
from nuclei3d.errors import InputError, StoppedError, missing
from nuclei3d.outputs import own_temporary_folder, require_writable

if TYPE_CHECKING:
    from nuclei3d.config import Params

# nothing of the user's leaves the machine, whatever a library thinks of it
for _switch in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "DVC_NO_ANALYTICS"):
    os.environ.setdefault(_switch, "true")

app = typer.Typer(
    help="Retrain Cellpose on labelled 3D embryos, measure it, register it, and segment time-lapses.\n\n"
    "'nuclei3d COMMAND --help' says what a command takes, 'nuclei3d params' what each parameter means.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


# What a command reads: whether it is there is known before anything large is imported.
_READ = frozenset(
    (
        *("data", "slices", "inputs", "image", "masks", "truth", "pred", "tracks", "images", "history"),
        *("metrics", "a", "b", "learn"),
    )
)
# Commands that show images to a model as its training showed them.
_AS_TRAINED = frozenset(("predict", "suggest", "assess", "calibrate", "serve"))
# Commands that a start model (train.start_from) concerns.
_MAY_START_FROM = frozenset(("prepare", "augment", "train", "search", "run"))
# Options that set a parameter, like --set; they go last.
_SET_BY = {
    "start": "train.start_from",
    "mode": "predict.mode",
    "diameter": "predict.diameter_um",
    "memory": "predict.memory_gb",
    "scheduler": "predict.scheduler",
    "host": "serve.host",
    "port": "serve.port",
    "insecure": "serve.insecure",
}
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
        for option in self.params:
            if option.name == "out" and isinstance(place := ctx.params["out"], Path):
                require_writable(place)
                if option.metavar == "DIR" and place.exists() and not place.is_dir():
                    raise InputError(f"{place} is a file; give another folder with --out")
        try:
            with own_temporary_folder():
                return super().invoke(ctx)
        except BaseException as error:
            # inside an import Ctrl-C can come out as nearly any error
            if not isinstance(error, KeyboardInterrupt) and not _interrupted:
                raise
            kept = str(error) if isinstance(error, KeyboardInterrupt) else ""
            raise StoppedError(f"stopped; {kept or 'what was finished is kept'}") from None


_interrupted: list[int] = []


def _interrupt(signum: int, frame: object) -> None:
    _interrupted.append(signum)
    raise KeyboardInterrupt


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


_inputs = partial(typer.Argument, metavar="INPUT...", show_default=False)

# What the help says of an option or argument, by its name or, where commands differ, by command and name.
_OPTIONS: dict[str, Any] = {
    "params": typer.Option(help="Parameter file; params.yaml if there is one.", metavar="FILE"),
    "overrides": typer.Option(
        "--set", help="Override one parameter; may be repeated.", metavar="SECTION.KEY=VALUE"
    ),
    "as_json": typer.Option("--json", help="Print the result as one JSON object on stdout."),
    "slices": typer.Option(help="Folder made by prepare.", metavar="DIR"),
    "data": typer.Option(help="Folder of labelled embryos.", metavar="DIR"),
    "model": typer.Option(help="Model folder.", metavar="DIR"),
    "out": typer.Option(help="Folder to write.", metavar="DIR"),
    "augment.out": typer.Option(help="PNG to write.", metavar="FILE"),
    "check.data": typer.Argument(help="Folder of labelled embryos.", metavar="DATA"),
    "prepare.start": typer.Option(
        "--for", help="Cut as this model needs it: see train --from.", metavar="MODEL"
    ),
    "start": typer.Option(
        "--from", help="Fine-tune a model folder, weights file or models:/name@alias.", metavar="MODEL"
    ),
    "prepare.strict": typer.Option("--strict", help="Refuse implausible labels instead of saying them."),
    "train.data": typer.Option(help="Labelled embryos, for validation in 3D.", metavar="DIR"),
    "train.resume": typer.Option("--resume/--afresh", help="Go on from the last checkpoint, or start anew."),
    "inspect.inputs": _inputs(help="Files, folders or OME-Zarr.", metavar="FILE..."),
    "inspect.model": typer.Option(help="Model folder: what it expects is compared.", metavar="DIR"),
    "inspect.out": typer.Option(help="PNG to write: a plane of each file or time-lapse.", metavar="FILE"),
    "predict.inputs": _inputs(help="Files, folders or OME-Zarr."),
    "predict.model": typer.Option(help="Model folder, weights file, models:/name@alias or URL."),
    "predict.mode": typer.Option(
        help="auto, ortho, stitch, full3d, mixed or cellpose; see 'nuclei3d params predict'."
    ),
    "predict.diameter": typer.Option(
        help="Of the nuclei in um; auto estimates it; the model's if not given.", metavar="UM"
    ),
    "predict.memory": typer.Option(help="Cut volumes that need more than this into blocks.", metavar="GB"),
    "predict.scheduler": typer.Option(help="Dask cluster for the blocks.", metavar="tcp://HOST:PORT"),
    "predict.overwrite": typer.Option("--overwrite", help="Segment again what was done before."),
    "predict.track": typer.Option("--track", help="Link the nuclei over time, too."),
    "suggest.inputs": _inputs(help="Labelled embryos, files, folders or OME-Zarr."),
    "suggest.model": typer.Option(help="Model folder, weights file or models:/name@alias."),
    "suggest.count": typer.Option(help="Blocks wanted.", metavar="N"),
    "suggest.out": typer.Option(
        help="Folder for the table and pictures; nothing is written without it.", metavar="DIR"
    ),
    "suggest.known": typer.Option(
        "--known", help="Write masks of what is known once the blocks are labelled, too."
    ),
    "evaluate.truth": typer.Option(help="Folder of true labels.", metavar="DIR"),
    "evaluate.pred": typer.Option(help="Folder of predicted labels.", metavar="DIR"),
    "evaluate.images": typer.Option(help="Images, for contrast and baselines.", metavar="DIR"),
    "evaluate.slices": typer.Option(help="Folder made by prepare: its bins of contrast.", metavar="DIR"),
    "evaluate.history": typer.Option(help="history.csv of the training, for the report.", metavar="FILE"),
    "evaluate.baseline": typer.Option(
        help="Labels by another method, put beside the predictions; may be repeated.", metavar="NAME=DIR"
    ),
    "evaluate.tracks": typer.Option(help="What track wrote; found if it lies in --pred.", metavar="DIR"),
    "track.masks": typer.Argument(help="Masks of one embryo's time-lapse.", metavar="MASKS"),
    "track.images": typer.Option(help="Their images, for intensities.", metavar="DIR"),
    "track.same_numbers": typer.Option(
        "--same-numbers", help="Write masks that keep their numbers over time, too."
    ),
    "track.learn": typer.Option(
        help="True tracks of this time-lapse: choose the parameters on them.", metavar="DIR"
    ),
    "track.apply": typer.Option("--apply", help="Write what --learn chose into the parameter file."),
    "evaluate.model": typer.Option(
        help="Model that made the predictions: was it trained on these volumes?", metavar="DIR"
    ),
    "evaluate.name": typer.Option(help="What the report calls the predictions."),
    "assess.model": typer.Option(help="Model folder, weights file or models:/name@alias."),
    "assess.out": typer.Option(help="Folder for predictions/ and evaluation/.", metavar="DIR"),
    "assess.slices": typer.Option(help="Folder made by prepare: its bins of contrast.", metavar="DIR"),
    "compare.a": typer.Argument(help="metrics.json, or the folder of an evaluation.", metavar="A"),
    "compare.b": typer.Argument(help="The other one, on the same volumes.", metavar="B"),
    "compare.out": typer.Option(help="File or folder for the result.", metavar="PATH"),
    "search.trials": typer.Option(help="Trials wanted in all, over all starts.", metavar="N"),
    "search.out": typer.Option(help="Folder of the search.", metavar="DIR"),
    "search.storage": typer.Option(
        help="postgresql://... for many machines; a file in --out otherwise.", metavar="URL"
    ),
    "search.workers": typer.Option(help="Processes on this machine.", metavar="N"),
    "search.data": typer.Option(help="Labelled embryos, for validation in 3D.", metavar="DIR"),
    "search.apply": typer.Option("--apply", help="Write the best values into the parameter file."),
    "register.metrics": typer.Option(help="metrics.json of its evaluation.", metavar="FILE"),
    "register.force": typer.Option("--force", help="Make it the champion whatever the comparison says."),
    "rollback.version": typer.Option(help="Version to go back to; the one before otherwise."),
    "serve.model": typer.Option(help="models:/name@alias or a model folder."),
    "serve.host": typer.Option(help="Address to listen on; serve.host (127.0.0.1) if not given."),
    "serve.insecure": typer.Option("--insecure", help="Serve other machines without a token."),
    "serve.port": typer.Option(help="Port to listen on; serve.port (5050) if not given.", metavar="N"),
    "export.model": typer.Option(help="Model folder, weights file or models:/name@alias."),
    "export.masks": typer.Option(help="Masks that predict wrote, for seg and rois.", metavar="DIR"),
    "export.images": typer.Option(help="Their images, for seg.", metavar="DIR"),
    "export.slices": typer.Option(help="Folder made by prepare, for cellpose-training.", metavar="DIR"),
    "export.formats": typer.Option(
        "--format", help="cellpose, bioimageio, seg, rois or cellpose-training; may be repeated."
    ),
    "import.inputs": _inputs(
        help="Label volumes, folders of them, Cellpose's _seg.npy, ImageJ's .roi or .zip.", metavar="FILE..."
    ),
    "import.into": typer.Option("--data", help="Data set; may be new.", metavar="DIR"),
    "import.embryo": typer.Option(help="Whose labels they are; may be new.", metavar="NAME"),
    "import.images": typer.Option(
        help="Their images, copied where they are missing.", metavar="FILE_OR_FOLDER"
    ),
    "import.overwrite": typer.Option("--overwrite", help="Replace labels that are there and differ."),
    "correct.image": typer.Argument(help="Image, or a folder of them.", metavar="IMAGE"),
    "correct.masks": typer.Option(
        help="What to correct; what the data set has of the image, or the model finds, if not given.",
        metavar="MASKS",
    ),
    "correct.model": typer.Option(help="Nuclei on which it disagrees come first."),
    "correct.into": typer.Option(
        "--data", help="Data set to save in; where the image lies if not given.", metavar="DIR"
    ),
    "correct.embryo": typer.Option(help="Embryo to save as; that of the image if not given.", metavar="NAME"),
    "correct.overwrite": typer.Option("--overwrite", help="Replace labels that the data set has."),
    "view.image": typer.Argument(help="Image, or a folder of them.", metavar="IMAGE"),
    "view.masks": typer.Argument(help="Masks to lay over it.", metavar="MASKS..."),
    "run.data": typer.Option(help="Labelled embryos.", metavar="DIR"),
}


Result = Any
"""What a stage gives back: a dataclass, with `as_json` where its plain data are more than its fields."""


def _command(stage: str, **renamed: str) -> Callable[[Callable[..., Result]], Callable[..., None]]:
    """Make a command of a function's parameters that calls `stage` (``module:function``) with them.

    They are passed on by name, or as they are `renamed`, if they were given; not those of `_SET_BY`. The
    options --params, --set and, where there is a result, --json are added.
    """
    return partial(_add_command, stage, renamed)


def _add_command(
    stage: str, renamed: dict[str, str], described: Callable[..., Result]
) -> Callable[..., None]:
    shape = signature(described, locals={"Params": object}, eval_str=True)
    wanted = {name: (option.annotation, option.default) for name, option in shape.parameters.items()}
    reads_file = wanted.pop("params_file", None) is not None
    wanted.pop("params")
    passed = {option: renamed.get(option, option) for option in wanted.keys() - _SET_BY.keys()}
    wanted |= {"params": (Path | None, None), "overrides": (list[str] | None, None)}
    if shape.return_annotation is not None:
        wanted["as_json"] = (bool, False)

    def command(params: Path | None, overrides: list[str] | None, as_json: bool = False, **own: Any) -> None:
        from nuclei3d.config import load_params

        if params is None and Path("params.yaml").is_file():
            params = Path("params.yaml")
        given = [f"{_SET_BY[name]}={own[name]}" for name in own.keys() & _SET_BY if own[name] is not None]
        warned.clear()
        overrides = [*(overrides or ()), *given]
        chosen = load_params(params, overrides)
        if name in _MAY_START_FROM and chosen.train.start_from is not None:
            from nuclei3d.stages.start_model import load_fine_tuning

            asked, cut = own.get("start") is not None, own.get("data") if name in ("prepare", "run") else None
            trains = name in ("train", "search", "run")
            chosen = load_fine_tuning(params, overrides, asked=asked, trains=trains, data=cut)
        options = {new: own[option] for option, new in passed.items() if own[option] is not None}
        if reads_file:
            options["params_file"] = params
        module, _, function = stage.partition(":")
        result = getattr(import_module(f"nuclei3d.{module}"), function)(chosen, **options)
        if as_json:
            plain = result.as_json() if hasattr(result, "as_json") else asdict(result)
            emit_json({**plain, "warnings": list(warned)})
        if code := getattr(result, "exit_code", 0):
            raise typer.Exit(code)

    name = described.__name__.rstrip("_")
    options = [
        Parameter(
            option,
            Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, _OPTIONS.get(f"{name}.{option}") or _OPTIONS[option]],
        )
        for option, (kind, default) in wanted.items()
    ]
    command.__name__, command.__doc__ = name, described.__doc__
    command.__signature__ = shape.replace(parameters=options)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    command.passes = stage, {*passed.values()}  # type: ignore[attr-defined]
    return app.command(cls=_Command)(command)


@_command("stages.recorded:record_simulate")
def simulate(params: Params, out: Path) -> Result:
    """Make time-lapses of synthetic embryos with exact labels."""


@_command("stages.check:check")
def check(params: Params, data: Path) -> Result:
    """Tell all that is odd about labelled embryos, before any work."""


@_command("stages.recorded:record_prepare")
def prepare(params: Params, data: Path, out: Path, start: str | None = None, strict: bool = False) -> Result:
    """Cut labelled embryos into planes with flows: the training data."""


@_command("stages.augment:write_augmentation_sheet")
def augment(params: Params, slices: Path, out: Path) -> Result:
    """Draw augmented crops with their labels, to look at first."""


@_command("stages.train:train")
def train(
    params: Params,
    slices: Path,
    out: Path,
    data: Path | None = None,
    start: str | None = None,
    resume: bool = True,
) -> Result:
    """Train a network on prepared planes."""


@_command("stages.calibrate:calibrate")
def calibrate(params: Params, model: Path, data: Path) -> Result:
    """Choose a model's thresholds on the validation embryos.

    train does it by itself.
    """


@_command("stages.inspect:inspect_images", out="picture")
def inspect(params: Params, inputs: list[Path], model: Path | None = None, out: Path | None = None) -> Result:
    """Say what is in images, how large nuclei are, and what to set."""


@_command("stages.recorded:record_predict", track="link")
def predict(
    params: Params,
    inputs: list[Path],
    model: str,
    out: Path,
    mode: str | None = None,
    diameter: str | None = None,
    memory: float | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
    track: bool = False,
) -> Result:
    """Segment volumes and time-lapses in 3D."""


@_command("stages.suggest:suggest")
def suggest(
    params: Params,
    inputs: list[Path],
    model: str,
    count: int = 10,
    out: Path | None = None,
    known: bool = False,
) -> Result:
    """Say which blocks of which unlabelled frames to label next."""


@_command("stages.recorded:record_track")
def track(
    params: Params,
    masks: Path,
    out: Path,
    images: Path | None = None,
    same_numbers: bool = False,
    learn: Path | None = None,
    apply: bool = False,
    params_file: Path | None = None,
) -> Result:
    """Link nuclei over time: tracks, divisions, lineages."""


@_command("stages.recorded:record_evaluate", slices="summary", name="method", baseline="baselines")
def evaluate(
    params: Params,
    truth: Path,
    pred: Path,
    out: Path,
    images: Path | None = None,
    slices: Path | None = None,
    history: Path | None = None,
    baseline: list[str] | None = None,
    name: str = "this model",
    tracks: Path | None = None,
    model: Path | None = None,
) -> Result:
    """Compare predicted with true labels: scores and a report.

    Writes metrics.json, nuclei.csv and report.html.
    """


@_command("stages.assess:assess")
def assess(
    params: Params, data: Path, model: str, out: Path = Path("."), slices: Path | None = None
) -> Result:
    """Predict the held-out embryos of a data set and evaluate them."""


@_command("stages.compare:compare")
def compare(params: Params, a: Path, b: Path, out: Path | None = None) -> Result:
    """Say whether B is really better than A on the same volumes."""


@_command("stages.search.study:search")
def search(
    params: Params,
    slices: Path,
    trials: int,
    out: Path = Path("runs/search"),
    storage: str | None = None,
    workers: int = 1,
    data: Path | None = None,
    apply: bool = False,
    params_file: Path | None = None,
) -> Result:
    """Search for the training parameters that do best in 3D."""


@_command("experiment.registry:register", model="folder")
def register(params: Params, model: Path, metrics: Path, force: bool = False) -> Result:
    """Register a model; if it is better, it becomes the champion.

    Otherwise it stays the challenger.
    """


@_command("experiment.registry:roll_back")
def rollback(params: Params, version: str | None = None) -> Result:
    """Make an earlier version of the model the champion again."""


@_command("stages.serve:serve")
def serve(
    params: Params,
    model: str = "models:/nuclei_3d@champion",
    host: str | None = None,
    port: int | None = None,
    insecure: bool | None = None,
) -> None:
    """Serve a model over HTTP."""


@_command("stages.export:export")
def export(
    params: Params,
    out: Path,
    model: str | None = None,
    masks: Path | None = None,
    images: Path | None = None,
    slices: Path | None = None,
    formats: list[str] | None = None,
) -> Result:
    """Write a model, masks or planes for Cellpose, ImageJ and others.

    Give at least one of --model, --masks and --slices.
    """


@_command("stages.import_labels:import_labels", into="data")
def import_(
    params: Params,
    inputs: list[Path],
    into: Path,
    embryo: str,
    images: Path | None = None,
    overwrite: bool = False,
) -> Result:
    """Take corrected labels into a data set, and say what changed."""


@_command("stages.correct:correct", into="data")
def correct(
    params: Params,
    image: Path,
    masks: Path | None = None,
    model: str | None = None,
    into: Path | None = None,
    embryo: str | None = None,
    overwrite: bool = False,
) -> None:
    """Correct masks in napari, most suspicious nuclei first.

    They are saved in a data set.
    """


@_command("stages.view:view")
def view(params: Params, image: Path, masks: list[Path] | None = None) -> None:
    """Open an image and masks in napari, at the right scale."""


@_command("stages.run:run_pipeline")
def run(
    params: Params, data: Path = Path("data"), out: Path = Path("out"), start: str | None = None
) -> Result:
    """Do the whole job: prepare, train, predict, evaluate, register."""


@app.command(cls=_Command)
def params(
    section: Annotated[
        str | None, typer.Argument(help="One section, such as train.augment.", metavar="SECTION")
    ] = None,
) -> None:
    """Print what each parameter means, its default and its values."""
    from nuclei3d.config.reference import describe_parameters

    sys.stdout.write(describe_parameters(section))


def main() -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2, a full disk with 1."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except InputError as error:
        say(f"nuclei3d: {error}")
        sys.exit(error.exit_code)
    except PermissionError as error:
        say(f"nuclei3d: {error.filename}: permission denied; change that, or choose another place")
        sys.exit(InputError.exit_code)
    except KeyboardInterrupt:
        say("nuclei3d: stopped; what was finished is kept")
        sys.exit(StoppedError.exit_code)
