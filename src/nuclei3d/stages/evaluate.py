"""The stage that compares predicted with true labels: metrics.json, nuclei.csv, plots, figures, report."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d import __version__
from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.grid import available_threads
from nuclei3d.images.frames import frame_stem
from nuclei3d.intensity import measure_range
from nuclei3d.outputs import refuse_foreign_folder, whole_folder
from nuclei3d.report.figures import draw_figures
from nuclei3d.report.page import build_page
from nuclei3d.report.tables import nucleus_rows, write_nuclei, write_plot_data
from nuclei3d.report.viewer import ShownVolume, pack_volumes
from nuclei3d.scoring.assessment import Assessment, Summary, assess_volume, by_embryo, by_stage, summarise
from nuclei3d.scoring.bootstrap import average_precision_of, compare_paired
from nuclei3d.scoring.contrast import contrast_edges
from nuclei3d.scoring.metrics import score
from nuclei3d.scoring.watershed import otsu_watershed
from nuclei3d.stages import map_in_processes
from nuclei3d.stages.pairing import Entry, VolumePair, pair_volumes, some_of
from nuclei3d.stages.track_scores import score_track_folders

#: Name of the baseline that the evaluation makes itself.
OTSU = "Otsu + watershed"

# Below so many voxels in all, starting processes takes longer than they save.
_WORTH_PROCESSES = 200_000_000


@dataclass(frozen=True)
class EvaluateResult:
    """The content of metrics.json, and what was written, metrics.json first."""

    out: Path
    metrics: dict[str, Any]
    files: tuple[Path, ...]

    @property
    def scores(self) -> dict[str, float]:
        """The pooled numbers under flat names, such as ``ap_0.50``, for curves and tables of runs."""
        return flat_scores(self.metrics)

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        report = self.out / "report.html"
        return {
            "out": str(self.out),
            "report": str(report) if report in self.files else None,
            "volumes": len(self.metrics["volumes"]),
            **self.scores,
        }


def flat_scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Give the pooled numbers of a metrics.json under flat names; undefined ones are left out."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if name in ("ap", "f1"):
            flat.update({f"{name}_{key}": number for key, number in value.items() if number is not None})
        elif name == "tracks":
            flat.update({f"tracks_{key}": n for key, n in value.items() if isinstance(n, int | float)})
        elif isinstance(value, int | float):
            flat[name] = value
    return flat


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
    tracks: Path | None = None,
) -> EvaluateResult:
    """Score predicted label volumes against true ones, made by whatever program.

    Parameters
    ----------
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
    tracks
        What `nuclei3d track` wrote, scored where the truth has tracks; None: if such lies below `pred`.
    """
    refuse_foreign_folder(out, "metrics.json", "evaluation")
    for name in baselines or {}:
        if name in (method, OTSU):
            raise InputError(f"a baseline cannot be called '{name}', which is taken; give it another name")
    facts = read_training_facts(summary)
    pairing = pair_volumes(params, truth, pred, images, baselines or {}, only)
    if alone := pairing.truths_alone:
        say(f"{len(alone)} true volumes have no prediction and are left out: {some_of(alone)}")
    if alone := pairing.predictions_alone:
        say(f"{len(alone)} predictions have no truth and are left out: {some_of(alone)}")
    assessed, digests = _assess(params, pairing.pairs, facts, method)
    edges, edges_from = _contrast_edges(params, assessed[method], facts)
    summaries = {
        name: summarise(
            assessments,
            [pair.embryo for pair in pairing.pairs],
            thresholds=params.evaluate.thresholds,
            contrast_edges=edges,
            replicates=params.evaluate.bootstrap,
            over=params.evaluate.resample,
            # The same draws for every method: their intervals differ by the method alone.
            rng=np.random.default_rng(params.seed),
        )
        for name, assessments in assessed.items()
    }
    metrics = _metrics(params, pairing.pairs, assessed, summaries, digests, method)
    metrics["contrast_edges"] = None if edges is None else list(edges)
    metrics["contrast_edges_from"] = edges_from
    metrics["unpaired"] = {"truth": pairing.truths_alone, "prediction": pairing.predictions_alone}
    if found := score_track_folders(truth, pred if tracks is None else tracks, required=tracks is not None):
        metrics["tracks"] = found
    with whole_folder(out) as folder:
        _write(params, folder, metrics, pairing.pairs, assessed[method], method, history)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names.sort(key=lambda name: name != "metrics.json")
    _say_result(summaries, method, len(pairing.pairs), out)
    return EvaluateResult(out, metrics, tuple(out / name for name in names))


def read_baselines(given: Sequence[str]) -> dict[str, Path]:
    """Read baselines written as ``NAME=DIR``."""
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


@dataclass(frozen=True)
class TrainingFacts:
    """What summary.json of a slice data set fixes for the evaluation; None where it is not known."""

    contrast_edges: tuple[float, ...] | None = None
    nucleus_diameter_um: float | None = None


def read_training_facts(summary: Path | None) -> TrainingFacts:
    """Read the bins of contrast and the diameter of nuclei from a slice data set or its summary.json."""
    if summary is None:
        return TrainingFacts()
    path = summary / "summary.json" if summary.is_dir() else summary
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        edges = tuple(float(edge) for edge in tree["contrast_quintiles"])
        diameter_um = float(tree["nucleus_diameter_um"])
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; nuclei3d prepare writes it") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no summary.json of nuclei3d prepare") from None
    if list(edges) != sorted(edges) or diameter_um <= 0:
        raise InputError(f"{path}: contrast_quintiles must ascend and nucleus_diameter_um be positive")
    return TrainingFacts(edges, diameter_um)


def read_scores(prediction: Entry, column: str = "score") -> dict[int, float] | None:
    """Read the scores (or another column) that `nuclei3d predict` writes beside its masks; None if none."""
    stem = frame_stem(prediction.frame.path)
    path = prediction.frame.path.with_name(stem.removesuffix("_masks") + "_nuclei.csv")
    if prediction.frame.time is not None or not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"label", column} <= rows[0].keys():
        return None
    try:
        scores = {int(row["label"]): float(row[column]) for row in rows if row[column]}
    except (TypeError, ValueError):
        raise InputError(
            f"{path}: cannot read the columns label and {column}; remove the file or have predict write it "
            "again"
        ) from None
    return scores if all(math.isfinite(value) for value in scores.values()) else None


def _assess(
    params: Params, pairs: Sequence[VolumePair], facts: TrainingFacts, method: str
) -> tuple[dict[str, list[Assessment]], list[str]]:
    """Assess the model first, the given baselines and, where there are images, Otsu's watershed.

    Gives the assessments of each method in the order of `pairs`, and fingerprints of the true labels.
    """
    voxels = sum(math.prod(pair.truth.frame.shape) for pair in pairs)
    workers = min(available_threads(), len(pairs)) if voxels >= _WORTH_PROCESSES else 1
    results = map_in_processes("evaluate", partial(_assess_methods, params, method), pairs, workers=workers)
    digests = [digest for digest, _ in results]
    assessed = {name: [found[name] for _, found in results] for name in (method, *pairs[0].baselines)}
    diameter_um = facts.nucleus_diameter_um or _median_diameter_um(assessed[method])
    possible = all(pair.physical and pair.image is not None for pair in pairs)
    if "otsu" in params.evaluate.baselines and possible and diameter_um is not None:
        contrasts = [own.true.contrast for own in assessed[method]]
        otsu = partial(_assess_otsu, params, diameter_um)
        assessed[OTSU] = map_in_processes("Otsu baseline", otsu, pairs, contrasts, workers=workers)
    return assessed, digests


def _assess_methods(params: Params, method: str, pair: VolumePair) -> tuple[str, dict[str, Assessment]]:
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
    return _digest_of(true), found


def _read_shown(
    pair: VolumePair,
) -> tuple[NDArray[Any] | None, NDArray[np.uint32], NDArray[np.uint32]]:
    """Read a pair for a picture: background in the place of fill."""
    image, truth, pred = pair.read()
    if image is not None:
        image, _ = measure_range(image).without_fill(image)
    return image, truth, pred


def _assess_otsu(
    params: Params, diameter_um: float, pair: VolumePair, true_contrast: NDArray[np.float64]
) -> Assessment:
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


def _digest_of(labels: NDArray[np.uint32]) -> str:
    """Give a short fingerprint, by which two evaluations know that they used the same truth."""
    digest = hashlib.blake2b(repr(labels.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(labels, dtype="<u4").data)
    return digest.hexdigest()


def _median_diameter_um(assessments: Sequence[Assessment]) -> float | None:
    volumes = np.concatenate([assessment.true.volume_um3 for assessment in assessments])
    return float((6 / np.pi * np.median(volumes)) ** (1 / 3)) if len(volumes) else None


def _contrast_edges(
    params: Params, assessments: Sequence[Assessment], facts: TrainingFacts
) -> tuple[tuple[float, ...] | None, str | None]:
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
    thresholds, embryos = params.evaluate.thresholds, [pair.embryo for pair in pairs]
    own, counts = assessed[method], summaries[method].contrast_counts
    volumes = {}
    for index, (pair, assessment) in enumerate(zip(pairs, own, strict=True)):
        binned = None
        if counts is not None:
            binned = {name: part[index].astype(int).tolist() for name, part in vars(counts).items()}
        volumes[pair.name] = {
            **score(assessment.tally, thresholds).as_json(),
            "embryo": pair.embryo,
            "frame": pair.frame,
            "truth_digest": digests[index],
            "counts": assessment.tally.as_json(),
            "contrast_counts": binned,
        }

    def lead(rival: Sequence[Assessment]) -> dict[str, Any] | None:
        """Give the lead of the model in AP at .5 over a baseline."""
        compared = compare_paired(
            average_precision_of([assessment.tally for assessment in rival]),
            average_precision_of([assessment.tally for assessment in own]),
            embryos,
            replicates=params.evaluate.bootstrap,
            over=params.evaluate.resample,
            rng=np.random.default_rng(params.seed),
        )
        ap = compared.differences["ap_0.50"]
        if np.isnan([ap.difference, ap.low, ap.high]).any():
            return None
        return {"ap_0.50": ap.difference, "interval": [ap.low, ap.high]}

    return {
        "nuclei3d": __version__,
        **summaries[method].as_json(),
        "by_embryo": {name: pool.as_json() for name, pool in by_embryo(own, embryos, thresholds).items()},
        "by_stage": {name: pool.as_json() for name, pool in by_stage(own, thresholds).items()},
        "baselines": {
            name: {**item.as_json(), "behind_model": lead(assessed[name])}
            for name, item in summaries.items()
            if name != method
        },
        "volumes": volumes,
    }


def _write(
    params: Params,
    folder: Path,
    metrics: dict[str, Any],
    pairs: Sequence[VolumePair],
    assessments: Sequence[Assessment],
    method: str,
    history: Path | None,
) -> None:
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    (folder / "metrics.json").write_text(text, encoding="utf-8")
    rows = [
        row
        for pair, assessment in zip(pairs, assessments, strict=True)
        for row in nucleus_rows(pair.name, pair.embryo, pair.frame, assessment, metrics["contrast_edges"])
    ]
    write_nuclei(folder / "nuclei.csv", rows)
    write_plot_data(folder / "plots", metrics)
    volumes = [
        ShownVolume(pair.name, pair.voxel_size, assessment, partial(_read_shown, pair))
        for pair, assessment in zip(pairs, assessments, strict=True)
    ]
    draw_figures(folder / "figures", {method: metrics, **metrics["baselines"]}, volumes, rows)
    if params.evaluate.report:
        page = build_page(
            metrics,
            rows,
            pack_volumes(volumes, params.evaluate.viewer_megabytes),
            method=method,
            unit="um" if all(pair.physical for pair in pairs) else "voxels",
            history=history,
        )
        (folder / "report.html").write_text(page, encoding="utf-8")


def _say_result(summaries: Mapping[str, Summary], method: str, volumes: int, out: Path) -> None:
    for name, item in summaries.items():
        scores = {
            "AP .5": item.pooled.ap[0],
            "precision": item.pooled.precision,
            "recall": item.pooled.recall,
            "recall of the faintest": item.recall_faint,
        }
        words = ", ".join(f"{key} {value:.3f}" for key, value in scores.items() if not np.isnan(value))
        say(f"{name}: {words}" if name != method else f"{name}, {volumes} volumes: {words}")
    say(f"evaluation in {out}")
