"""The stage that compares predicted with true labels: metrics.json, nuclei.csv, figures and the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
from nuclei3d.volumes.whole import refuse_foreign_folder, whole_folder

if TYPE_CHECKING:
    from nuclei3d.core.scoring.assessment import Assessment
    from nuclei3d.core.scoring.summary import Summary


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
    from nuclei3d.core.scoring.summary import summarise
    from nuclei3d.stages.assessing import assess_pairs
    from nuclei3d.stages.evaluation_outputs import write_evaluation

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
    from nuclei3d.core.scoring.contrast import contrast_edges

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
    from nuclei3d.core.scoring.metrics import score
    from nuclei3d.core.scoring.summary import by_embryo, by_stage

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
    from nuclei3d.core.scoring.summary import lead_of

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
