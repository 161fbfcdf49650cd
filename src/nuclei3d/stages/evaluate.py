"""The stage that compares predicted with true labels: metrics.json, nuclei.csv, figures and the report.

The heavy part of the evaluation: every method on every volume, several volumes at a time.

What the evaluation writes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.console import progress_bar, say
from nuclei3d.errors import InputError
from nuclei3d.outputs import refuse_foreign_folder, whole_folder
from nuclei3d.report.charts import write_plot_data
from nuclei3d.report.figures import ShownVolume, draw_nuclei, draw_overlay, draw_scores, worst_nuclei
from nuclei3d.report.page import build_page
from nuclei3d.report.tables import NucleusRow, nucleus_rows, write_nuclei
from nuclei3d.report.viewer import ViewedVolume, pack_volumes
from nuclei3d.scoring.assessment import Assessment, assess_volume
from nuclei3d.scoring.watershed import otsu_watershed
from nuclei3d.stages.pairing import (
    OTSU,
    TrainingFacts,
    VolumePair,
    digest_of,
    pair_volumes,
    read_scores,
    read_training_facts,
)

if TYPE_CHECKING:
    from nuclei3d.scoring.summary import Summary

Task = TypeVar("Task")
Result = TypeVar("Result")

# Below so many voxels in all, starting processes takes longer than they save.
_WORTH_PROCESSES = 200_000_000


def assess_pairs(
    params: Params, pairs: Sequence[VolumePair], facts: TrainingFacts, method: str
) -> tuple[dict[str, list[Assessment]], list[str]]:
    """Assess the model, the given baselines and, where there are images, Otsu's watershed.

    Each process holds one volume at a time.

    Parameters
    ----------
    facts
        The diameter of nuclei for the watershed; None there: the median of the true nuclei.
    method
        Name of the model.

    Returns
    -------
    assessed
        Per method its assessments, in the order of `pairs`; the model first.
    digests
        Fingerprints of the true labels.
    """
    results = _map("evaluate", partial(_assess_methods, params=params, method=method), pairs)
    digests = [digest for digest, _ in results]
    assessed = {name: [found[name] for _, found in results] for name in (method, *pairs[0].baselines)}
    diameter_um = facts.nucleus_diameter_um or _median_diameter_um(assessed[method])
    possible = all(pair.physical and pair.image is not None for pair in pairs)
    if "otsu" in params.evaluate.baselines and possible and diameter_um is not None:
        tasks = [(pair, own.true.contrast) for pair, own in zip(pairs, assessed[method], strict=True)]
        work = partial(_assess_otsu, params=params, diameter_um=diameter_um)
        assessed[OTSU] = _map("Otsu baseline", work, tasks)
    return assessed, digests


def _map(words: str, work: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    voxels = sum(int(np.prod(_pair_of(task).truth.frame.shape)) for task in tasks)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(usable, len(tasks)) if voxels >= _WORTH_PROCESSES else 1
    results: list[Result] = []
    with progress_bar(words, total=len(tasks)) as bar:
        if workers == 1:
            for task in tasks:
                results.append(work(task))
                bar.advance()
        else:
            # spawned, not forked: threads of numerical libraries do not survive a fork
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for result in pool.map(work, tasks):
                    results.append(result)
                    bar.advance()
    return results


def _pair_of(task: object) -> VolumePair:
    pair = task[0] if isinstance(task, tuple) else task
    assert isinstance(pair, VolumePair)
    return pair


def _assess_methods(pair: VolumePair, params: Params, method: str) -> tuple[str, dict[str, Assessment]]:
    true = pair.read_truth()
    image = pair.read_image() if pair.physical else None
    found: dict[str, Assessment] = {}
    for name, entry in {method: pair.pred, **pair.baselines}.items():
        found[name] = assess_volume(
            true,
            pair.read_prediction(entry, true.shape),
            pair.voxel_size,
            image=image,
            scores=read_scores(entry),
            thresholds=params.evaluate.thresholds,
            surfaces=params.evaluate.surface_distances,
            true_contrast=found[method].true.contrast if found else None,
        )
    return digest_of(true), found


def _assess_otsu(
    task: tuple[VolumePair, NDArray[np.float64]], params: Params, diameter_um: float
) -> Assessment:
    pair, true_contrast = task
    image = pair.read_image()
    assert image is not None
    return assess_volume(
        pair.read_truth(),
        otsu_watershed(image, pair.voxel_size, diameter_um),
        pair.voxel_size,
        image=image,
        thresholds=params.evaluate.thresholds,
        surfaces=params.evaluate.surface_distances,
        true_contrast=true_contrast,
    )


def _median_diameter_um(assessments: Sequence[Assessment]) -> float | None:
    volumes = np.concatenate([assessment.true.volume_um3 for assessment in assessments])
    return float((6 / np.pi * np.median(volumes)) ** (1 / 3)) if len(volumes) else None


_WORST_SHOWN = 8


def write_evaluation(
    params: Params,
    folder: Path,
    metrics: dict[str, Any],
    pairs: Sequence[VolumePair],
    assessments: Sequence[Assessment],
    edges: Sequence[float] | None,
    method: str,
    history: Path | None,
) -> None:
    """Write metrics.json, nuclei.csv, plots, figures and report.html into an empty folder.

    Parameters
    ----------
    metrics
        The content of metrics.json.
    assessments
        Of the model, in the order of `pairs`.
    edges
        Inner edges of the contrast bins; None where contrast was not measured.
    method
        Name of the model.
    history
        history.csv of its training.
    """
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    (folder / "metrics.json").write_text(text, encoding="utf-8")
    rows = [
        row
        for pair, assessment in zip(pairs, assessments, strict=True)
        for row in nucleus_rows(pair.name, pair.embryo, pair.frame, assessment, edges)
    ]
    write_nuclei(folder / "nuclei.csv", rows)
    write_plot_data(folder / "plots", metrics)
    _draw_figures(folder / "figures", metrics, pairs, assessments, rows, method)
    if params.evaluate.report:
        viewed = [
            ViewedVolume(pair.name, pair.voxel_size, assessment, partial(_read_all, pair))
            for pair, assessment in zip(pairs, assessments, strict=True)
        ]
        page = build_page(
            metrics,
            rows,
            pack_volumes(viewed, params.evaluate.viewer_megabytes),
            method=method,
            title=f"How good is {method}?",
            unit="um" if all(pair.physical for pair in pairs) else "voxels",
            history=history,
        )
        (folder / "report.html").write_text(page, encoding="utf-8")


def _draw_figures(
    folder: Path,
    metrics: Mapping[str, Any],
    pairs: Sequence[VolumePair],
    assessments: Sequence[Assessment],
    rows: Sequence[NucleusRow],
    method: str,
) -> None:
    """Draw the scores, the volume with the most errors in three views, and the worst nuclei."""
    folder.mkdir()
    draw_scores({method: metrics, **metrics["baselines"]}, folder / "scores.png")

    def shown(name: str) -> ShownVolume:
        place = [pair.name for pair in pairs].index(name)
        pair, assessment = pairs[place], assessments[place]
        image, truth, pred = _read_all(pair)
        true, predicted = assessment.true, assessment.pred
        return ShownVolume(
            name=pair.name,
            voxel_size=pair.voxel_size,
            image=image,
            truth=truth,
            pred=pred,
            found=frozenset(true.label[true.matched].tolist()),
            right=frozenset(predicted.label[predicted.matched].tolist()),
        )

    errors = Counter(row.volume for row in rows if row.outcome != "found")
    busiest = max((pair.name for pair in pairs), key=lambda name: errors[name])
    volume = shown(busiest)
    of_volume = [row for row in rows if row.volume == busiest]
    wrong = [row for row in of_volume if row.outcome != "found"] or of_volume
    middle = (
        [n // 2 for n in volume.truth.shape]
        if not wrong
        else [
            round(place / edge)
            for place, edge in zip(
                (wrong[0].z_um, wrong[0].y_um, wrong[0].x_um), volume.voxel_size.zyx, strict=True
            )
        ]
    )
    draw_overlay(volume, middle, folder / "overlay.png")
    worst = worst_nuclei(rows, _WORST_SHOWN)
    if worst:
        volumes = {name: shown(name) for name in dict.fromkeys(row.volume for row in worst)}
        radius_um = float(np.median([(6 / np.pi * row.volume_um3) ** (1 / 3) for row in worst]))
        draw_nuclei([(volumes[row.volume], row) for row in worst], folder / "worst_nuclei.png", radius_um)


def _read_all(
    pair: VolumePair,
) -> tuple[NDArray[Any] | None, NDArray[np.uint32], NDArray[np.uint32]]:
    """Read the image (if there is one), the truth and the prediction of a pair."""
    truth = pair.read_truth()
    return pair.read_image(), truth, pair.read_prediction(pair.pred, truth.shape)


@dataclass(frozen=True)
class EvaluateResult:
    """What the evaluation found.

    Attributes
    ----------
    metrics
        The content of metrics.json.
    files
        What was written, metrics.json first; for the tracker's artifacts.
    """

    out: Path
    metrics: dict[str, Any]
    files: tuple[Path, ...]

    @property
    def headline(self) -> dict[str, float]:
        """The pooled numbers under flat names, such as ``ap_0.50``, for curves and tables of runs."""
        return headline_of(self.metrics)

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        report = self.out / "report.html"
        return {
            "out": str(self.out),
            "report": str(report) if report in self.files else None,
            "volumes": len(self.metrics["volumes"]),
            **self.headline,
        }


def evaluate(
    params: Params,
    truth: Path,
    pred: Path,
    out: Path,
    *,
    images: Path | None = None,
    baselines: Mapping[str, Path] | None = None,
    summary: Path | None = None,
    history: Path | None = None,
    method: str = "this model",
    only: Collection[Path] | None = None,
) -> EvaluateResult:
    """Score predicted label volumes against true ones, made by whatever program.

    Parameters
    ----------
    params
        The sections data and evaluate are used.
    truth, pred
        Folders of label volumes (or single volumes); see `nuclei3d.stages.pairing` for how names pair. True
        volumes without prediction, and the reverse, are left out and named.
    out
        The folder to write; an older evaluation there is replaced.
    images
        The images, for contrast, the Otsu baseline and the report. If None, those that lie beside the truth
        (``<embryo>/images`` beside ``<embryo>/labels``, or ``<stem>.tif`` beside ``<stem>_masks.tif``).
    baselines
        Label volumes of other methods by name, put beside the model everywhere.
    summary
        Slice data set or its summary.json: the contrast bins and the diameter of the training nuclei.
        If None, both come from the true labels themselves, and the report says so.
    history
        CSV of the training with a column ``epoch``, drawn in the report.
    method
        What the report calls the predictions.
    only
        The files of true labels that count, of all that lie below `truth`; None: all.

    Raises
    ------
    InputError
        If nothing pairs, it is in doubt what pairs, shapes differ, a file is damaged or `out` is no place
        for an evaluation.
    """
    from nuclei3d.scoring.summary import summarise
    from nuclei3d.stages.evaluate import assess_pairs, write_evaluation

    refuse_foreign_folder(out, "metrics.json", "evaluation")
    for name in baselines or {}:
        if name in (method, OTSU):
            raise InputError(f"a baseline cannot be called '{name}', which is taken; give it another name")
    facts = read_training_facts(summary)
    pairing = pair_volumes(params, truth, pred, images, baselines or {}, only)
    pairs = sorted(pairing.pairs, key=lambda pair: [p.embryo for p in pairing.pairs].index(pair.embryo))
    if alone := pairing.truths_alone:
        say(f"{len(alone)} true volumes have no prediction and are left out: {_few(alone)}")
    if alone := pairing.predictions_alone:
        say(f"{len(alone)} predictions have no truth and are left out: {_few(alone)}")
    assessed, digests = assess_pairs(params, pairs, facts, method)
    embryos = [pair.embryo for pair in pairs]
    edges, edges_from = _contrast_edges(params, assessed[method], facts)
    summaries = {
        name: summarise(
            assessments,
            embryos,
            thresholds=params.evaluate.thresholds,
            contrast_edges=edges,
            replicates=params.evaluate.bootstrap,
            over=params.evaluate.resample,
            # The same draws for every method: their intervals differ by the method alone.
            rng=np.random.default_rng(params.seed),
        )
        for name, assessments in assessed.items()
    }
    metrics = _metrics(params, pairs, assessed, summaries, digests, method)
    metrics["contrast_edges"] = None if edges is None else list(edges)
    metrics["contrast_edges_from"] = edges_from
    metrics["unpaired"] = {"truth": pairing.truths_alone, "prediction": pairing.predictions_alone}
    with whole_folder(out) as folder:
        write_evaluation(params, folder, metrics, pairs, assessed[method], edges, method, history)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names.sort(key=lambda name: name != "metrics.json")
    _say_result(metrics, summaries, method, out)
    return EvaluateResult(out, metrics, tuple(out / name for name in names))


def read_baselines(given: Sequence[str]) -> dict[str, Path]:
    """Read baselines written as ``NAME=DIR``.

    Raises
    ------
    InputError
        If one is not, or a name occurs twice.
    """
    baselines: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (equals and name.strip() and folder):
            raise InputError(
                f"--baseline {text}: expected a name and a folder of labels, such as stardist=DIR"
            )
        if name.strip() in baselines:
            raise InputError(f"--baseline {text}: two baselines are called '{name.strip()}'; rename one")
        baselines[name.strip()] = Path(folder)
    return baselines


def headline_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Give the pooled numbers of a metrics.json under flat names; undefined ones are left out."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if name in ("ap", "f1"):
            flat.update({f"{name}_{key}": number for key, number in value.items() if number is not None})
        elif isinstance(value, int | float):
            flat[name] = value
    return flat


def _contrast_edges(
    params: Params, assessments: Sequence[Assessment], facts: TrainingFacts
) -> tuple[tuple[float, ...] | None, str | None]:
    from nuclei3d.scoring.contrast import contrast_edges

    contrast = np.concatenate([assessment.true.contrast for assessment in assessments])
    if not np.isfinite(contrast).any():
        return None, None
    if facts.contrast_edges is not None:
        return facts.contrast_edges, "training labels"
    return tuple(float(e) for e in contrast_edges(contrast, params.evaluate.contrast_bins)), "true labels"


def _metrics(
    params: Params,
    pairs: Sequence[VolumePair],
    assessed: Mapping[str, Sequence[Assessment]],
    summaries: Mapping[str, Summary],
    digests: Sequence[str],
    method: str,
) -> dict[str, Any]:
    """Put metrics.json together; the layout is the contract of the project."""
    from nuclei3d import __version__
    from nuclei3d.scoring.metrics import score
    from nuclei3d.scoring.summary import by_embryo, by_stage

    thresholds = params.evaluate.thresholds
    assessments = assessed[method]
    counts = summaries[method].contrast_counts
    volumes = {}
    for index, (pair, assessment) in enumerate(zip(pairs, assessments, strict=True)):
        volumes[pair.name] = {
            **score(assessment.tally, thresholds).as_json(),
            "embryo": pair.embryo,
            "frame": pair.frame,
            "truth_digest": digests[index],
            "counts": assessment.tally.as_json(),
            "contrast_counts": None
            if counts is None
            else {
                part: getattr(counts, part)[index].astype(int).tolist()
                for part in ("true", "found", "pred", "right")
            },
        }
    embryos = [pair.embryo for pair in pairs]
    return {
        "nuclei3d": __version__,
        **summaries[method].as_json(),
        "by_embryo": {
            name: scores.as_json() for name, scores in by_embryo(assessments, embryos, thresholds).items()
        },
        "by_stage": {name: scores.as_json() for name, scores in by_stage(assessments, thresholds).items()},
        "baselines": {
            name: {**item.as_json(), "behind_model": _lead(params, assessments, assessed[name], embryos)}
            for name, item in summaries.items()
            if name != method
        },
        "volumes": volumes,
    }


def _lead(
    params: Params, model: Sequence[Assessment], rival: Sequence[Assessment], embryos: Sequence[str]
) -> dict[str, Any] | None:
    """Give the lead of the model in AP at .5 over a baseline as plain data."""
    from nuclei3d.scoring.summary import lead_of

    lead = lead_of(
        model,
        rival,
        embryos,
        replicates=params.evaluate.bootstrap,
        over=params.evaluate.resample,
        rng=np.random.default_rng(params.seed),
    )
    return None if lead is None else {"ap_0.50": lead.difference, "interval": [lead.low, lead.high]}


def _say_result(metrics: Mapping[str, Any], summaries: Mapping[str, Summary], method: str, out: Path) -> None:
    for name, item in summaries.items():
        scores = {
            "AP .5": item.pooled.ap[0],
            "precision": item.pooled.precision,
            "recall": item.pooled.recall,
        }
        scores["recall of the faintest"] = np.asarray(item.recall_faint)
        words = ", ".join(f"{key} {value:.3f}" for key, value in scores.items() if not np.isnan(value))
        say(f"{name}: {words}" if name != method else f"{name}, {len(metrics['volumes'])} volumes: {words}")
    say(f"evaluation in {out}")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
