"""Stages with their MLflow run: the stage itself, then what it found, logged under telling names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuclei3d.config import Params
from nuclei3d.console import some_of
from nuclei3d.experiment.provenance import md5_of_input
from nuclei3d.experiment.runs import METRICS_TAG, stage_run

if TYPE_CHECKING:
    from nuclei3d.stages.evaluate import EvaluateResult
    from nuclei3d.stages.predict import PredictResult
    from nuclei3d.stages.prepare import PrepareResult
    from nuclei3d.stages.simulate import SimulateResult
    from nuclei3d.stages.track import TrackResult


def predict_run_name(params: Params, inputs: Sequence[Path], model: str) -> str:
    """Name the run of a prediction by embryos, model and mode."""
    folders = (path if path.is_dir() else path.parent for path in inputs)
    embryos = dict.fromkeys(f.parent.name if f.name in ("images", "labels") else f.name for f in folders)
    return f"predict {some_of(list(embryos))} with {Path(model).name}, mode {params.predict.mode}"


def record_simulate(params: Params, out: Path) -> SimulateResult:
    """Simulate embryos; see `nuclei3d.stages.simulate.simulate`."""
    from nuclei3d.stages.simulate import simulate

    with stage_run("simulate", params, inputs={}) as run:
        result = simulate(params, out)
        run.tags({"nuclei3d.data_md5": md5_of_input(out)})
    return result


def record_prepare(params: Params, data: Path, out: Path, *, strict: bool = False) -> PrepareResult:
    """Cut a data set into planes or, for a 3D network, volumes; see `nuclei3d.stages.prepare.prepare`."""
    from nuclei3d.stages.prepare import prepare

    name = f"prepare {data.name} for {params.train.network}"
    with stage_run("prepare", params, inputs={"data": data}, name=name) as run:
        result = prepare(params, data, out, strict=strict)
        summary = result.summary
        numbers = ("nucleus_diameter_um", "diameter_px", "voxel_um", "training_nuclei")
        run.metrics({name: getattr(summary, name) for name in numbers})
        counts = {"planes": summary.planes, "volumes": summary.volumes, "frames": summary.frames}
        for unit, by_part in counts.items():
            run.metrics({f"{unit}/{part}": count for part, count in (by_part or {}).items()})
        run.tags({"nuclei3d.slices_md5": summary.md5})
        for name in ("slices.png", "summary.json", "manifest.csv"):
            if (out / name).is_file():
                run.artifact(out / name)
    return result


def record_predict(
    params: Params, inputs: Sequence[Path], model: str, out: Path, **options: Any
) -> PredictResult:
    """Segment volumes; see `nuclei3d.stages.predict.predict`. The page becomes an artifact."""
    from nuclei3d.stages.predict import predict

    known = {"model": Path(model)} if Path(model).exists() else {}
    with stage_run("predict", params, inputs=known, name=predict_run_name(params, inputs, model)) as run:
        run.tags({"nuclei3d.model": model, "nuclei3d.out": str(out)})
        result = predict(params, inputs, model, out, **options)
        if result.tracks is not None:
            run.metrics(_track_counts(result.tracks))
        if result.page is not None:
            run.artifact(result.page, out.name)
        return result


def record_track(params: Params, masks: Path, out: Path, **options: Any) -> TrackResult:
    """Link nuclei over time; see `nuclei3d.stages.track.track`. The masks stay where they are."""
    from nuclei3d.stages.track import track

    with stage_run("track", params, inputs={"masks": masks}) as run:
        result = track(params, masks, out, **options)
        run.tags({f"nuclei3d.learnt.{name}": str(value) for name, value in result.learnt.items()})
        run.metrics(_track_counts(result))
        for name in ("res_track.txt", "tracks.csv"):
            run.artifact(out / name)
    return result


def _track_counts(result: TrackResult) -> dict[str, float]:
    return {name: getattr(result, name) for name in ("frames", "nuclei", "tracks", "divisions", "seen_once")}


def record_evaluate(
    params: Params,
    truth: Path,
    pred: Path,
    out: Path,
    *,
    baselines: Mapping[str, Path] | Sequence[str] = (),
    origin: Mapping[str, Path] | None = None,
    **options: Any,
) -> EvaluateResult:
    """Score predictions; see `nuclei3d.stages.evaluate.evaluate`. What it writes becomes artifacts.

    `baselines` may be written as ``NAME=DIR``. `origin` names what the predictions were made from (data,
    slices, model), for the provenance.
    """
    from nuclei3d.stages.evaluate import evaluate, read_baselines

    with stage_run("evaluate", params, inputs={"truth": truth, "predictions": pred, **(origin or {})}) as run:
        data = (origin or {}).get("data", truth)
        made = {"Data": f"{data} (MD5 {md5_of_input(data)})"}
        if run.run_id is not None:
            made["Evaluation run"] = run.run_id
        beside = baselines if isinstance(baselines, Mapping) else read_baselines(baselines)
        result = evaluate(params, truth, pred, out, baselines=beside, made=made, **options)
        embryos = list(result.metrics.get("by_embryo", {}))
        model = result.metrics.get("model", {}).get("name") or options.get("method", "predictions")
        told = f"evaluate {model} on {some_of(embryos)}, predicted with mode {params.predict.mode}"
        run.tags({METRICS_TAG: md5_of_input(out / "metrics.json"), "mlflow.runName": told})
        run.metrics({f"test/{name}": value for name, value in result.scores.items()})
        for file in result.files:
            folder = file.relative_to(out).parent.as_posix()
            run.artifact(file, "" if folder == "." else folder)
    return result
