"""The stage that compares predicted with true labels: metrics.json, nuclei.csv, figures and the report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.stages.evaluation_inputs import (
    OTSU,
    TrainingFacts,
    VolumePair,
    pair_volumes,
    read_training_facts,
)
from nuclei3d.volumes.whole import whole_folder

if TYPE_CHECKING:
    from nuclei3d.core.assessment import Assessment
    from nuclei3d.core.summary import Summary
    from nuclei3d.report.nuclei_table import NucleusRow

_WORST_SHOWN = 8


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

    Raises
    ------
    InputError
        If nothing pairs, shapes differ, a file is damaged or `out` is no place for an evaluation.
    """
    from nuclei3d.core.summary import summarise
    from nuclei3d.stages.assessing import assess_pairs

    _refuse_foreign_folder(out)
    for name in baselines or {}:
        if name in (method, OTSU):
            raise InputError(f"a baseline cannot be called '{name}', which is taken; give it another name")
    facts = read_training_facts(summary)
    pairing = pair_volumes(params, truth, pred, images, baselines or {})
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
        _write(params, folder, metrics, pairs, assessed[method], edges, method, history)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names.sort(key=lambda name: name != "metrics.json")
    _say_result(metrics, summaries, method, out)
    return EvaluateResult(out, metrics, tuple(out / name for name in names))


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
    from nuclei3d.core.contrast import contrast_edges

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
    from nuclei3d.core.metrics import score
    from nuclei3d.core.summary import by_embryo, by_stage

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
    from nuclei3d.core.summary import lead_of

    lead = lead_of(
        model,
        rival,
        embryos,
        replicates=params.evaluate.bootstrap,
        over=params.evaluate.resample,
        rng=np.random.default_rng(params.seed),
    )
    return None if lead is None else {"ap_0.50": lead.difference, "interval": [lead.low, lead.high]}


def _write(
    params: Params,
    folder: Path,
    metrics: dict[str, Any],
    pairs: Sequence[VolumePair],
    assessments: Sequence[Assessment],
    edges: Sequence[float] | None,
    method: str,
    history: Path | None,
) -> None:
    """Write everything into a folder that is not yet in its place."""
    from nuclei3d.report.nuclei_table import nucleus_rows, write_nuclei
    from nuclei3d.report.plot_data import write_plot_data

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
        from nuclei3d.report.page import build_page
        from nuclei3d.report.viewer_data import ViewedVolume, pack_volumes

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
    from nuclei3d.report.figures import ShownVolume, draw_nuclei, draw_overlay, draw_scores, worst_nuclei

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


def _refuse_foreign_folder(out: Path) -> None:
    """Replace only what is missing, empty, or an evaluation."""
    if out.is_dir() and any(out.iterdir()) and not (out / "metrics.json").is_file():
        raise InputError(f"{out} exists and is no evaluation; give another folder or remove it yourself")


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
