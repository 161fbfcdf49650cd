"""The whole job: from labelled embryos to a registered model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuclei3d.config import Params, params_as_dict
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.stages.assess import AssessFolders
from nuclei3d.stages.ledger import Ledger
from nuclei3d.volumes.missing import missing

if TYPE_CHECKING:
    from nuclei3d.tracking.runs import StageRun


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
    from nuclei3d.tracking.runs import stage_run

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
