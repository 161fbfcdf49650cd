"""The whole job: from labelled embryos to a registered model.

Which stages of a job are done: kept beside their outputs, so that a killed job goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nuclei3d
from nuclei3d.config import Params, params_as_dict
from nuclei3d.console import say
from nuclei3d.errors import InputError, missing
from nuclei3d.outputs import whole_file
from nuclei3d.stages.assess import AssessFolders

if TYPE_CHECKING:
    from nuclei3d.experiment.runs import StageRun

# Parts of the package that cannot change what a stage computes.
_OUTSIDE = frozenset({"cli", "__main__.py", "console.py", "serving", "tracking", "report"})


@dataclass(frozen=True)
class Entry:
    """What is known of a stage that is done: its result as JSON, and whether this call did it."""

    result: dict[str, Any]
    fresh: bool


class Ledger:
    """Records of finished stages in a folder, one file each.

    A stage counts as done if its parameters, its inputs and the package's code are those of the record, and
    its outputs are as it left them. Files are compared by name, size and time of change.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._code = code_fingerprint()

    def do(
        self,
        stage: str,
        settings: Mapping[str, Any],
        inputs: Iterable[Path],
        outputs: Iterable[Path],
        work: Callable[[], dict[str, Any]],
    ) -> Entry:
        """Do a stage, or find that it is done.

        Parameters
        ----------
        stage
            Its name.
        settings
            The parameters on which its result depends, as plain data.
        inputs, outputs
            Files and folders that it reads and writes.
        work
            Does it and gives its result as plain data.
        """
        inputs, outputs = list(inputs), list(outputs)
        key = _digest(
            {"settings": settings, "inputs": [fingerprint(path) for path in inputs], "code": self._code}
        )
        known = self.read(stage)
        if known.get("key") == key and known.get("outputs") == [fingerprint(path) for path in outputs]:
            say(f"{stage}: done before with the same inputs, kept")
            return Entry(known["result"], fresh=False)
        result = work()
        self.write(stage, {"key": key, "outputs": [fingerprint(path) for path in outputs], "result": result})
        return Entry(result, fresh=True)

    def read(self, name: str) -> dict[str, Any]:
        """Read a record; empty where there is none that can be read."""
        try:
            record = json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a record, whole or not at all."""
        with whole_file(self._folder / f"{name}.json") as partial:
            partial.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


def fingerprint(path: Path) -> str:
    """Give a text that changes when a file, or anything in a folder, does (name, size, time of change)."""
    if path.is_dir():
        files = sorted(
            found
            for found in path.rglob("*")
            if found.is_file() and not any(part.startswith(".") for part in found.relative_to(path).parts)
        )
        base = path
    elif path.exists():
        files, base = [path], path.parent
    else:
        return "absent"
    listing = []
    for file in files:
        status = file.stat()
        listing.append((file.relative_to(base).as_posix(), status.st_size, status.st_mtime_ns))
    return _digest(listing)


def code_fingerprint() -> str:
    """Give the MD5 of the modules of this package that can change a result."""
    package = Path(nuclei3d.__file__).parent
    digest = hashlib.md5(usedforsecurity=False)
    for file in sorted(package.rglob("*.py")):
        relative = file.relative_to(package)
        if relative.parts[0] not in _OUTSIDE:
            digest.update(relative.as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _digest(tree: object) -> str:
    text = json.dumps(tree, sort_keys=True, default=str)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class PipelineResult:
    """What the job made.

    Attributes
    ----------
    out
        The folder with all of it.
    metrics
        The few numbers that a reader looks at first, on the held-out embryos.
    name, version
        The registered model; None with tracking switched off.
    champion, reason
        The version that is champion now, and why it moved or stayed.
    skipped
        Stages that were done before with the same inputs.
    run_id
        The parent run in MLflow.
    """

    out: Path
    metrics: dict[str, Any]
    name: str | None
    version: str | None
    champion: str | None
    reason: str | None
    skipped: tuple[str, ...]
    run_id: str | None

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        return {
            "out": str(self.out),
            "metrics": self.metrics,
            "name": self.name,
            "version": self.version,
            "champion": self.champion,
            "reason": self.reason,
            "skipped": list(self.skipped),
            "run_id": self.run_id,
        }


@dataclass(frozen=True)
class JobFolders:
    """Where the stages of a job put their results, below one folder."""

    out: Path
    model_name: str

    @property
    def slices(self) -> Path:
        """Planes and flows."""
        return self.out / "slices"

    @property
    def model(self) -> Path:
        """The model folder."""
        return self.out / "models" / self.model_name

    @property
    def assessment(self) -> AssessFolders:
        """Masks of the held-out frames, and what they are worth."""
        return AssessFolders.below(self.out)


def run_pipeline(params: Params, data: Path, out: Path) -> PipelineResult:
    """Prepare, train, predict the held-out embryos, evaluate, register.

    One MLflow run holds a child per stage. Stages that were done before with the same inputs, parameters and
    code are kept; so a job that was killed goes on where it was when it is started again.

    Parameters
    ----------
    params
        All of them.
    data
        ``<embryo>/images/<frame>.tif`` and ``<embryo>/labels/<frame>.tif``.
    out
        The folder to write: slices, models/<name>, predictions, baselines, evaluation.

    Raises
    ------
    InputError
        If the data, a parameter or the tracking store is at fault.
    """
    from nuclei3d.experiment.runs import stage_run

    _check(data, out)
    ledger = Ledger(out / ".done")
    tree = params_as_dict(params)
    signature = hashlib.md5(json.dumps([tree, str(data)]).encode(), usedforsecurity=False).hexdigest()
    open_job = ledger.read("job")
    before = open_job.get("run_id") if open_job.get("signature") == signature else None
    name = f"whole job: {params.train.name} from {data.name}"
    with stage_run("pipeline", params, inputs={"data": data}, name=name, resume=before) as run:
        ledger.write("job", {"signature": signature, "run_id": run.run_id})
        result = _do_stages(params, data, JobFolders(out, params.train.name), ledger, run)
    ledger.write("job", {})
    _say_result(result, JobFolders(out, params.train.name))
    return result


def _do_stages(
    params: Params, data: Path, folders: JobFolders, ledger: Ledger, run: StageRun
) -> PipelineResult:
    from nuclei3d.stages.assess import (
        HEADLINE_FILE,
        evaluate_held_out,
        predict_baselines_held_out,
        predict_held_out,
    )
    from nuclei3d.stages.register import register
    from nuclei3d.stages.tracked import prepare_tracked
    from nuclei3d.stages.train import train

    tree = params_as_dict(params)

    def settings(*without: str) -> dict[str, Any]:
        left_out = {"search", "serve", "simulate", *without}
        return {name: _decisive(section) for name, section in tree.items() if name not in left_out}

    entries = {
        "prepare": ledger.do(
            "prepare",
            {
                **settings("train", "calibrate", "predict", "evaluate", "tracking"),
                "network": params.train.network,
            },
            [data],
            [folders.slices],
            lambda: prepare_tracked(params, data, folders.slices).as_json(),
        )
    }
    entries["train"] = ledger.do(
        "train",
        settings("prepare", "evaluate", "tracking"),
        [data, folders.slices],
        [folders.model],
        lambda: train(params, folders.slices, folders.model, data=data).as_json(),
    )
    held_out = folders.assessment
    entries["predict"] = ledger.do(
        "predict",
        settings("prepare", "train", "calibrate", "evaluate", "tracking"),
        [data, folders.model],
        [held_out.predictions],
        lambda: predict_held_out(params, data, str(folders.model), held_out.predictions),
    )
    # The champion at the time when this model was made: one that came after it does not call for another
    # evaluation.
    entries["baselines"] = ledger.do(
        "baselines",
        settings("prepare", "train", "calibrate", "evaluate", "tracking")
        | {"baselines": tree["evaluate"]["baselines"]},
        [data, folders.model],
        [held_out.baselines],
        lambda: predict_baselines_held_out(params, data, str(folders.model), held_out.baselines),
    )
    baselines = entries["baselines"].result
    entries["evaluate"] = ledger.do(
        "evaluate",
        settings("prepare", "train", "calibrate", "predict", "tracking"),
        [
            data,
            held_out.predictions,
            held_out.baselines,
            folders.slices / "summary.json",
            folders.model / "history.csv",
        ],
        [held_out.evaluation],
        lambda: evaluate_held_out(
            params,
            data,
            held_out,
            baselines,
            slices=folders.slices,
            model=folders.model,
        ).as_json(),
    )
    metrics = folders.assessment.evaluation / "metrics.json"
    registered: Mapping[str, Any] = {}
    if params.tracking.enabled:
        entries["register"] = ledger.do(
            "register",
            {"tracking": tree["tracking"], "predict": _decisive(tree["predict"])},
            [folders.model, metrics],
            [],
            lambda: register(params, folders.model, metrics).as_json(),
        )
        registered = entries["register"].result
    else:
        say("register: left out, tracking is switched off")
    scores = json.loads((folders.assessment.evaluation / HEADLINE_FILE).read_text(encoding="utf-8"))
    run.metrics({f"test/{name}": value for name, value in scores.items()})
    run.note(_note(scores, registered))
    if registered:
        run.tags({"nuclei3d.registered": f"{registered['name']} version {registered['version']}"})
    return PipelineResult(
        out=folders.out,
        metrics=scores,
        name=registered.get("name"),
        version=registered.get("version"),
        champion=registered.get("champion"),
        reason=registered.get("reason"),
        skipped=tuple(name for name, entry in entries.items() if not entry.fresh),
        run_id=run.run_id,
    )


def _check(data: Path, out: Path) -> None:
    if not data.is_dir():
        raise missing(
            data, f"no data set at {data}; give --data DIR with <embryo>/images and <embryo>/labels"
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give another folder with --out")
    if out.resolve() == data.resolve() or data.resolve() in out.resolve().parents:
        raise InputError(f"the output folder {out} lies in the data set; give another with --out")


def _decisive(section: Any) -> Any:
    """Leave out what may change how a stage is computed but not what it makes."""
    if not isinstance(section, dict):
        return section
    machine = {"device", "workers", "memory_gb", "memory_limit_gb", "scheduler"}
    return {key: value for key, value in section.items() if key not in machine}


def _note(scores: Mapping[str, Any], registered: Mapping[str, Any]) -> str:
    """Describe the job for MLflow's UI, in Markdown."""
    table = "".join(f"| {name} | {value:.4g} |\n" for name, value in scores.items())
    text = f"On the held-out embryos:\n\n| | |\n|---|---|\n{table}"
    if registered:
        text += (
            f"\nRegistered {registered['name']} version {registered['version']}: {registered['reason']}.\n"
        )
    return text + "\nThe report is an artifact of the child run *evaluate*.\n"


def _say_result(result: PipelineResult, folders: JobFolders) -> None:
    say("")
    say("On the held-out embryos:")
    for name, value in result.metrics.items():
        say(f"  {name:<14} {value:.3f}" if isinstance(value, float) else f"  {name:<14} {value}")
    if result.version is not None:
        say(f"Registered {result.name} version {result.version}: {result.reason}.")
    report = folders.assessment.evaluation / "report.html"
    say(f"Report: {report if report.exists() else folders.assessment.evaluation}")
    say("Next:")
    say(f"  nuclei3d predict FILE... --model {folders.model} --out masks    segment your own frames")
    say("  mlflow ui --backend-store-uri sqlite:///mlflow.db                look at the runs")
    if result.champion is not None:
        say(f"  nuclei3d serve --model models:/{result.name}@champion            serve the champion")
