"""The stage that compares predicted with true labels: metrics.json, nuclei.csv, plots, figures, report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nuclei3d import __version__
from nuclei3d.config import Params
from nuclei3d.config.sections import PredictParams
from nuclei3d.console import say, some_of, warn
from nuclei3d.errors import InputError
from nuclei3d.images.embryos import ONE_IMAGE
from nuclei3d.intensity import measure_range
from nuclei3d.networks.folder import ModelInfo, digest_of_weights, info_beside, scored_model, thresholds_of
from nuclei3d.outputs import list_written, refuse_foreign_folder, whole_folder, write_json
from nuclei3d.report.figures import draw_figures
from nuclei3d.report.page import build_page
from nuclei3d.report.tables import nucleus_table, write_plot_data
from nuclei3d.report.viewer import Arrays, ShownVolume, pack_volumes
from nuclei3d.scoring.watershed import OTSU
from nuclei3d.stages.evaluation import Evaluation
from nuclei3d.stages.pairing import VolumePair, pair_volumes
from nuclei3d.stages.predicted import made_by, tell_changed_images, tell_changed_masks
from nuclei3d.stages.track_files import score_track_folders
from nuclei3d.stages.training_data import read_summary

_WRITTEN = ("nuclei.csv", "report.html", "plots", "figures")
"""Beside metrics.json, what is in the folder of an evaluation."""
_ADDED = ("headline.json", "compare.json")
"""What assess and compare put there."""
_SIZE_RATIO = 8.0


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
    only: Mapping[tuple[Path, int | None], tuple[float, float] | None] | None = None,
    tracks: Path | None = None,
    model: Path | None = None,
    made: Mapping[str, str] | None = None,
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
        Slice data set or its summary.json: the contrast bins of the training nuclei. If None, those of the
        true labels themselves, and the report says so.
    history
        CSV of the training with a column ``epoch``, drawn in the report.
    method
        What the report calls the predictions.
    only
        Files of true labels that count, and times in them (None: a file of one), of all that lie below
        `truth`, each with the part that counts (`nuclei3d.images.embryos.EmbryoFrame.share`); None: all.
    tracks
        What `nuclei3d track` wrote, scored where the truth has tracks; None: if such lies below `pred`.
    model
        Folder or weights of the model that made the predictions: volumes that it was trained on are marked
        and told. InputError is raised where predict noted another beside the masks.
    made
        Where the predictions come from, by name, such as the data and the MLflow run: told by the report.
    """
    refuse_other_evaluation(out)
    for name in baselines or {}:
        if name in (method, OTSU):
            raise InputError(f"a baseline cannot be called '{name}', which is taken; give it another name")
    edges = None if summary is None else list(read_summary(summary).contrast_quintiles)
    pairing = pair_volumes(params, truth, pred, images, baselines or {}, only)
    if alone := pairing.truths_alone:
        say(f"{len(alone)} true volumes have no prediction and are left out: {some_of(alone)}")
    if alone := pairing.predictions_alone:
        say(f"{len(alone)} predictions have no truth and are left out: {some_of(alone)}")
    told = tell_changed_images(
        (pair.pred.frame.path, pair.image.frame) for pair in pairing.pairs if pair.image is not None
    )
    info, weights = (None, None) if model is None else (info_beside(model), digest_of_weights(model))
    if weights is not None:
        _refuse_others(pairing.pairs, weights, str(model))
        told += tell_changed_masks(pair.pred.frame.path for pair in pairing.pairs)
    if info is not None:
        info, changed = _as_predicted(pairing.pairs, info, params.predict, str(model))
        told += changed
    evaluation = Evaluation.of(params, method, pairing.pairs, edges)
    metrics = {
        **evaluation.metrics(),
        **({} if info is None or weights is None else {"model": scored_model(info, weights)}),
        "training_frames_known": info is not None and info.frames is not None and info.frames.complete,
        "unpaired": {"truth": pairing.truths_alone, "prediction": pairing.predictions_alone},
    }
    moved = {pair.embryo: list(pair.label_shift_um) for pair in pairing.pairs if pair.label_shift_um}
    if moved:
        metrics["label_shift_um"] = moved
        say(f"true labels are moved by (z, y, x) um (data.label_shift_um): {moved}")
    if info is not None and info.frames is not None:
        info.frames.mark_seen(metrics["volumes"])
    if warnings := [*told, *_find_warnings(evaluation, metrics)]:
        metrics["warnings"] = warnings
    if found := score_track_folders(truth, tracks or pred, pred, required=tracks is not None):
        metrics["tracks"] = found
    with whole_folder(out) as folder:
        _write(evaluation, folder, metrics, history, _about(info, made or {}))
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        list_written(folder)
    names.sort(key=lambda name: name != "metrics.json")
    _say_result(evaluation, out)
    return EvaluateResult(out, metrics, tuple(out / name for name in names))


def refuse_other_evaluation(out: Path) -> None:
    """Raise InputError where an evaluation would replace a folder with anything else in it."""
    refuse_foreign_folder(out, "evaluation", ("metrics.json", "volumes"), _WRITTEN, _ADDED)


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


def _refuse_others(pairs: Sequence[VolumePair], weights: str, model: str) -> None:
    """Raise InputError where predict noted that another model than the one given made the masks."""
    paths = [pair.pred.frame.path for pair in pairs]
    others = [
        path for path in paths if (known := made_by(path).get("weights_sha256")) and weights not in known
    ]
    if others:
        raise InputError(
            f"{others[0]} was predicted by another model than {model}; give the one that made the masks, or "
            "predict them with this one"
        )


def _as_predicted(
    pairs: Sequence[VolumePair], info: ModelInfo, predict: PredictParams, model: str
) -> tuple[ModelInfo, list[str]]:
    """Give the model with the thresholds that predict noted beside masks.

    It is told where they are neither the model's nor those that the parameters give in their place.
    """
    given = predict.model_dump(include=set(thresholds_of(info)), exclude_none=True)
    own = thresholds_of(info) | given
    for path in (pair.pred.frame.path for pair in pairs):
        known = made_by(path).get("thresholds") or own
        other = [name for name, value in own.items() if not _is_close(known.get(name), value)]
        if other:
            name = other[0]
            told = (
                f"{path} was predicted with other thresholds than {model} has ({name} {known.get(name)}, not "
                f"{own[name]}): the scores are of those"
            )
            warn(told)
            return info.model_copy(update={name: known.get(name) for name in own}), [told]
    return info.model_copy(update=own), []


def _is_close(first: float | None, second: float | None) -> bool:
    return first is second if first is None or second is None else math.isclose(first, second, rel_tol=1e-6)


def _find_warnings(evaluation: Evaluation, metrics: Mapping[str, Any]) -> list[str]:
    """Say what makes scores doubtful.

    Volumes that the model knows, blocks of one image, nuclei of a volume far from the true ones'.
    """
    warnings = []
    for part, why in (
        ("train", "was trained on {}: its scores there say nothing about other embryos"),
        ("validation", "had its epoch or thresholds chosen on {}: it looks better there than it is"),
    ):
        seen = [name for name, volume in metrics["volumes"].items() if volume.get("seen") == part]
        if seen:
            warnings.append(f"the model {why.format(some_of(seen))}")
    warnings += [ONE_IMAGE] if any(pair.share is not None for pair in evaluation.pairs) else []
    for name, assessments in evaluation.assessed.items():
        medians = [
            float(np.median(volumes)) if len(volumes) else math.nan
            for volumes in (
                np.concatenate([getattr(each, side).volume_um3 for each in assessments])
                for side in ("true", "pred")
            )
        ]
        ratio = medians[1] / medians[0]
        if not math.isnan(ratio) and not 1 / _SIZE_RATIO < ratio < _SIZE_RATIO:
            warnings.append(
                f"the nuclei of {name} have {ratio:.2g} of the true ones' volume in the median: check "
                "predict.diameter_um and data.voxel_size_um"
            )
    for warning in warnings:
        warn(warning)
    return warnings


def _about(info: ModelInfo | None, made: Mapping[str, str]) -> dict[str, str]:
    """Say for the report what was evaluated, from what, and when."""
    about: dict[str, str] = {}
    if info is not None:
        run = f", MLflow run {info.lineage['run_id']}" if "run_id" in info.lineage else ""
        about["Model"] = f"{info.name} ({info.kind}), trained {info.created[:10]}{run}"
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return about | dict(made) | {"Evaluated": f"{date} with nuclei3d {__version__}"}


def _read_shown(pair: VolumePair) -> Arrays:
    """Read a pair for a picture: background in the place of fill."""
    image, (truth, _) = pair.read_image(), pair.read_truth()
    if image is not None:
        image, _ = measure_range(image).clean(image)
    return image, truth, pair.read_prediction(pair.pred, truth.shape)


def _write(
    evaluation: Evaluation,
    folder: Path,
    metrics: dict[str, Any],
    history: Path | None,
    about: Mapping[str, str],
) -> None:
    import pandas as pd

    params, method = evaluation.params.evaluate, evaluation.method
    assessed = list(zip(evaluation.pairs, evaluation.own, strict=True))
    write_json(folder / "metrics.json", metrics, allow_nan=False)
    tables = [
        nucleus_table(pair.name, pair.embryo, pair.frame, assessment, metrics["contrast_edges"])
        for pair, assessment in assessed
    ]
    nuclei = pd.concat(tables, ignore_index=True)
    nuclei.to_csv(folder / "nuclei.csv", index=False, float_format="%.4f", lineterminator="\n")
    write_plot_data(folder / "plots", metrics)
    volumes = [
        ShownVolume(pair.name, pair.voxel_size, assessment, partial(_read_shown, pair))
        for pair, assessment in assessed
    ]
    draw_figures(folder / "figures", {method: metrics, **metrics["baselines"]}, volumes, nuclei)
    if params.report:
        page = build_page(
            metrics,
            nuclei,
            pack_volumes(volumes, params.viewer_megabytes),
            method=method,
            unit="um" if all(pair.physical for pair in evaluation.pairs) else "voxels",
            history=history,
            about=about,
        )
        (folder / "report.html").write_text(page, encoding="utf-8")


def _say_result(evaluation: Evaluation, out: Path) -> None:
    for name, scores in evaluation.summaries.items():
        told = {
            "AP .5": next(iter(scores["ap"].values())),
            "precision": scores["precision"],
            "recall": scores["recall"],
            "recall of the faintest": scores["recall_faint"],
        }
        words = ", ".join(f"{key} {value:.3f}" for key, value in told.items() if value is not None)
        of = f", {len(evaluation.pairs)} volumes" if name == evaluation.method else ""
        say(f"{name}{of}: {words}")
    say(f"evaluation in {out}")
