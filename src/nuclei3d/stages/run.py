"""The whole job: from labelled embryos to a registered model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.errors import InputError, missing


@dataclass(frozen=True)
class PipelineResult:
    """What the job made; the metrics are those that a reader looks at first, on the held-out embryos.

    With tracking switched off nothing is registered: name, version, champion and reason are None.
    """

    out: Path
    metrics: dict[str, Any]
    name: str | None
    version: str | None
    champion: str | None
    reason: str | None
    skipped: tuple[str, ...]
    run_id: str | None


def run_pipeline(params: Params, data: Path, out: Path) -> PipelineResult:
    """Prepare, train, predict the held-out embryos, evaluate, register.

    One MLflow run holds a child per stage. Every stage finds out by itself what of it was done before: a job
    that was killed goes on where it was when it is started again, in the same MLflow run. Below `out` appear
    slices, models/<name>, predictions, baselines and evaluation.
    """
    from nuclei3d.experiment.registry import register
    from nuclei3d.experiment.runs import stage_run
    from nuclei3d.stages.assess import evaluate_held_out, headline, predict_held_out
    from nuclei3d.stages.recorded import record_prepare
    from nuclei3d.stages.train import train

    _check(data, out)
    slices, model, evaluation = out / "slices", out / "models" / params.train.name, out / "evaluation"
    name = f"whole job: {params.train.name} from {data.name}"
    with stage_run("pipeline", params, inputs={"data": data}, name=name, job=_job(params, data, out)) as run:
        record_prepare(params, data, slices)
        trained = train(params, slices, model, data=data)
        predicted_before = predict_held_out(params, data, str(model), out, link=True)
        evaluated = evaluate_held_out(params, data, str(model), out, slices=slices)
        registered = None
        if params.tracking.enabled:
            registered = register(params, model, evaluation / "metrics.json")
        else:
            say("register: left out, tracking is switched off")
        scores = headline(evaluated.metrics)
        run.metrics({f"test/{name}": value for name, value in scores.items()})
        table = "".join(f"| {name} | {value:.4g} |\n" for name, value in scores.items())
        note = f"On the held-out embryos:\n\n| | |\n|---|---|\n{table}"
        if registered is not None:
            run.tags({"nuclei3d.registered": f"{registered.name} version {registered.version}"})
            note += f"\nRegistered {registered.name} version {registered.version}: {registered.reason}.\n"
        run.note(note + "\nThe report is an artifact of the child run *evaluate*.\n")
    made = {} if registered is None else vars(registered)
    skipped = {"train": trained.done_before, "predict": predicted_before, "register": made.get("done_before")}
    result = PipelineResult(
        out=out,
        metrics=scores,
        **{key: made.get(key) for key in ("name", "version", "champion", "reason")},
        skipped=tuple(stage for stage, done in skipped.items() if done),
        run_id=run.run_id,
    )
    _say_result(result, model, evaluation)
    return result


def _check(data: Path, out: Path) -> None:
    if not data.is_dir():
        raise missing(
            data, f"no data set at {data}; give --data DIR with <embryo>/images and <embryo>/labels"
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give another folder with --out")
    if out.resolve() == data.resolve() or data.resolve() in out.resolve().parents:
        raise InputError(f"the output folder {out} lies in the data set; give another with --out")
    from nuclei3d.stages.evaluate import refuse_other_evaluation

    refuse_other_evaluation(out / "evaluation")


def _job(params: Params, data: Path, out: Path) -> str:
    """Name the job, so that a second start finds the MLflow run that the first one left unfinished."""
    text = json.dumps([params.model_dump(mode="json"), str(data.resolve()), str(out.resolve())])
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _say_result(result: PipelineResult, model: Path, evaluation: Path) -> None:
    from nuclei3d.stages.predict_page import PAGE_FILE

    say("")
    say("On the held-out embryos:")
    for name, value in result.metrics.items():
        say(f"  {name:<14} {value:.3f}" if isinstance(value, float) else f"  {name:<14} {value}")
    if result.version is not None:
        say(f"Registered {result.name} version {result.version}: {result.reason}.")
    report = evaluation / "report.html"
    say(f"Report: {report if report.exists() else evaluation}")
    for page in sorted(result.out.glob(f"predictions/*/{PAGE_FILE}")):
        say(f"Pictures of the held-out time-lapse: {page}")
    say("Next:")
    say(f"  nuclei3d predict FILE... --model {model} --out masks    segment your own frames")
    say("  mlflow ui --backend-store-uri sqlite:///mlflow.db                look at the runs")
    if result.champion is not None:
        say(f"  nuclei3d serve --model models:/{result.name}@champion            serve the champion")
