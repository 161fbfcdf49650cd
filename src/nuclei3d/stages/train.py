"""Training of a network: a prepared data set in, a model folder out; survives being killed.

Checkpoints of a training, in ``<model folder>.checkpoint``: last.pt, best_<epoch>.pt and history.csv.

The model folder that a training ends with: weights, model.json, card, history, and what was drawn.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nuclei3d.config import Params, params_as_dict
from nuclei3d.config.sections import TrainParams
from nuclei3d.console import progress_bar, say
from nuclei3d.outputs import refuse_foreign_folder, whole_file
from nuclei3d.training.state import REPORT_FIELDS, EpochReport, TrainingState

if TYPE_CHECKING:
    from torch import nn

    from nuclei3d.experiment.runs import StageRun
    from nuclei3d.networks.folder import ModelInfo
    from nuclei3d.networks.unet3d import VolumeSpec
    from nuclei3d.stages.training_data import Slices, Training
    from nuclei3d.training.loop import TrainingOutcome

_NO_INFLUENCE = ("name", "patience", "select", "workers", "memory_limit_gb", "device")
"""Parameters that decide when to stop, what to keep or where to compute, not what an epoch does."""


def checkpoint_folder(out: Path) -> Path:
    """Give the folder of the checkpoints of the model folder `out`."""
    return out.with_name(out.name + ".checkpoint")


def training_fingerprint(params: TrainParams, seed: int, slices_digest: str, start_digest: str) -> str:
    """Digest everything that decides the weights; a checkpoint is used only if its fingerprint is the same.

    With the constant schedule the number of epochs does not count, so that a training can be prolonged.
    """
    chosen = params_as_dict(params)
    for name in _NO_INFLUENCE:
        del chosen[name]
    if params.schedule == "constant":
        del chosen["epochs"]
    text = json.dumps([chosen, seed, slices_digest, start_digest], sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


class Checkpoints:
    """Writes and reads the checkpoints of one training; every file appears whole or not at all."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self._fingerprint = fingerprint

    @property
    def last(self) -> Path:
        """The last state."""
        return self.folder / "last.pt"

    def best(self, epoch: int) -> Path:
        """Give the file of the weights of an epoch that was the best."""
        return self.folder / f"best_{epoch:05d}.pt"

    def save(self, state: TrainingState, is_best: bool) -> None:
        """Write a state; at any moment last.pt and the best weights that it names are there."""
        if is_best:
            with whole_file(self.best(state.best_epoch)) as path:
                torch.save(state.best, path)
        with whole_file(self.last) as path:
            torch.save({"fingerprint": self._fingerprint, "state": state.as_plain()}, path)
        for path in self.folder.glob("best_*.pt"):
            if path != self.best(state.best_epoch):
                path.unlink()
        write_history(self.folder / "history.csv", state.history)

    def load(self) -> TrainingState | None:
        """Read the last state; None if there is none or (said aloud) it is unusable or out of date."""
        if not self.last.is_file():
            return None
        try:
            saved = torch.load(self.last, map_location="cpu", weights_only=True)
            if saved["fingerprint"] != self._fingerprint:
                say(
                    f"the parameters or the slices changed since the checkpoint in {self.folder}; "
                    "training starts afresh"
                )
                return None
            best: dict[str, Any] = {}
            if saved["state"]["best_epoch"]:
                path = self.best(saved["state"]["best_epoch"])
                best = torch.load(path, map_location="cpu", weights_only=True)
            return TrainingState.from_plain(saved["state"], best)
        except (
            OSError,
            pickle.UnpicklingError,
            RuntimeError,
            EOFError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:
            reason = " ".join(str(error).split())[:200]
            say(f"the checkpoint in {self.folder} cannot be read ({reason}); training starts afresh")
            return None

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_history(path: Path, history: Sequence[EpochReport]) -> None:
    """Write one row per epoch; what was not measured stays empty."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, REPORT_FIELDS, lineterminator="\n")
        writer.writeheader()
        for report in history:
            writer.writerow(
                {name: "" if value != value else _short(value) for name, value in asdict(report).items()}
            )


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


HISTORY_FILE = "history.csv"
DRAWN_FILE = "planes_drawn.csv"
DRAWN_VOLUMES_FILE = "volumes_drawn.csv"


def describe_model(
    params: Params, described: Slices, spec: VolumeSpec | None, run_id: str | None
) -> ModelInfo:
    """Gather what model.json holds; the thresholds are the defaults."""
    from nuclei3d.experiment.provenance import trace_lineage
    from nuclei3d.networks.folder import ModelInfo

    lineage = trace_lineage(params, {"slices": described.folder}, device=params.train.device)
    origin: dict[str, str] = {
        "git_commit": lineage.git_commit,
        "git_dirty": str(lineage.git_dirty).lower(),
        "seed": str(lineage.seed),
        "device": lineage.device,
        **{f"{name}_md5": md5 for name, md5 in lineage.input_md5.items()},
    }
    if run_id is not None:
        origin["run_id"] = run_id
    if params.train.start_from is not None:
        origin["start_from"] = Path(params.train.start_from).name
    # what prepare normalised with, which params.yaml may no longer say
    prepared: Mapping[str, Any] = described.summary.get("params", {}).get("normalization", {})
    normalization = params.normalization.model_dump() | dict(prepared)
    voxel = float(described.summary["voxel_um"])
    return ModelInfo(
        kind="views2d" if spec is None else "full3d",
        full3d=spec,
        name=params.train.name,
        diameter_px=params.train.diameter_px,
        nucleus_diameter_um=float(described.summary["nucleus_diameter_um"]),
        voxel_size_um=(float(described.summary.get("voxel_z_um", voxel)), voxel, voxel),
        versions=dict(lineage.versions),
        lineage=origin,
        **normalization,
    )


def write_model(
    out: Path,
    network: nn.Module,
    info: ModelInfo,
    outcome: TrainingOutcome,
    params: Params,
    described: Slices,
) -> None:
    """Write the model folder, whole, and the history into it."""
    import torch
    from cellpose.resnet_torch import CPnet

    from nuclei3d.networks.folder import save_model
    from nuclei3d.stages.train import write_history

    if isinstance(network, CPnet):
        with torch.no_grad():
            network.diam_labels.fill_(described.diameter_px)
    save_model(out, network, info, model_card(info, outcome, params, described))
    write_history(out / HISTORY_FILE, outcome.state.history)


def write_drawn(out: Path, training: Training, seed: int, epochs: int) -> None:
    """Write which planes (volumes) the training drew, how often and why: one row each, as in the manifest."""
    import numpy as np

    from nuclei3d.training.sampling import epoch_order

    infos, weights, crops = training.infos, training.weights, training.examples.crops
    drawn = np.zeros(len(infos), dtype=np.int64)
    for epoch in range(epochs):
        drawn += np.bincount(epoch_order(weights, crops, seed, epoch), minlength=len(infos))
    name = DRAWN_FILE if training.spec is None else DRAWN_VOLUMES_FILE
    with whole_file(out / name) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "embryo", "frame", "view", "nuclei", "min_contrast", "weight", "drawn"])
        for info, weight, count in zip(infos, weights, drawn, strict=True):
            contrast = "" if math.isnan(info.min_contrast) else f"{info.min_contrast:g}"
            view = getattr(info, "view", "")
            place = (info.file, info.embryo, info.frame, view, info.nuclei)
            writer.writerow([*place, contrast, f"{weight * len(infos):.4g}", int(count)])


def model_card(info: ModelInfo, outcome: TrainingOutcome, params: Params, described: Slices) -> str:
    """Write the card: what the model was trained on, how, and how far it came."""
    embryos = described.summary.get("embryos", {})
    unit = "planes" if info.full3d is None else "volumes"
    rows = [
        ("trained on", ", ".join(embryos.get("train", ["unknown"]))),
        ("validated on", ", ".join(embryos.get("validation", ["unknown"]))),
        (unit, str(described.summary.get(unit, {}).get("train", "unknown"))),
        ("epoch kept", f"{outcome.epoch} of {outcome.state.epoch}"),
        ("nuclei", f"{info.nucleus_diameter_um:.3g} um, {info.diameter_px:.3g} px at the network's scale"),
        ("seed", str(params.seed)),
        *((name.replace("_", " "), f"{value:.4g}") for name, value in final_metrics(outcome).items()),
        *((name.replace("_", " "), value) for name, value in info.lineage.items()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    what = (
        f"A Cellpose 3 network retrained on planes of 3D embryos by nuclei3d. `{info.name}` is a plain "
        "Cellpose state dict: it loads in the Cellpose GUI, command line and `cellpose.models.CellposeModel`."
    )
    if info.full3d is not None:
        what = (
            "A 3D network trained on embryos by nuclei3d, for voxels about "
            f"{info.full3d.anisotropy:.3g} times as long in z as in x at its scale. `{info.name}` is a state "
            "dict; model.json has the network's shape."
        )
    return f"# {info.name}\n\n{what}\n\n| | |\n|---|---|\n{table}\n"


def final_metrics(outcome: TrainingOutcome) -> dict[str, float]:
    """Give the figures of the kept epoch, and the crops per second over all epochs."""
    history = outcome.state.history
    metrics = history[outcome.epoch - 1].metrics() if 0 < outcome.epoch <= len(history) else {}
    rates = [report.crops_per_second for report in history]
    if rates:
        metrics["crops_per_second"] = len(rates) / sum(1 / rate for rate in rates)
    return metrics


@dataclass(frozen=True)
class TrainResult:
    """What `train` made.

    Attributes
    ----------
    model
        The model folder.
    epochs
        Epochs done, those before a kill included.
    epoch
        The epoch whose weights were kept.
    stopped
        Why the training ended early, or an empty text.
    metrics
        Figures of the kept epoch, and `crops_per_second`, the mean over all epochs.
    run_id
        MLflow run, if tracking is on.
    """

    model: Path
    epochs: int
    epoch: int
    stopped: str
    metrics: dict[str, float]
    run_id: str | None

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        return {
            "model": str(self.model),
            "epochs": self.epochs,
            "epoch": self.epoch,
            "stopped": self.stopped,
            "metrics": self.metrics,
            "run_id": self.run_id,
        }


def train(
    params: Params,
    slices: Path,
    out: Path,
    *,
    data: Path | None = None,
    resume: bool = True,
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> TrainResult:
    """Train a network on prepared planes (a 3D network: on volumes) and write a model folder.

    After every epoch a checkpoint is written beside the model folder; started again with the same parameters
    and slices, the training goes on from there, on a CPU to the same weights bit by bit.

    Parameters
    ----------
    params
        The sections train, normalization, data (for volumes), calibrate, predict and tracking are used.
    slices
        Folder made by prepare.
    out
        Model folder to write, with history.csv and planes_drawn.csv (volumes_drawn.csv); a model that is
        there is replaced at the end.
    data
        Labelled embryos, for validation in 3D and the choice of thresholds; None: those that the slices were
        made from, if they are still there.
    resume
        Whether a checkpoint may be used.
    on_epoch
        Called after each epoch and its checkpoint. It may raise
        `nuclei3d.training.loop.StopTraining` (ends well, the model is written), or anything else, such
        as a pruning signal, which passes through.

    Raises
    ------
    InputError
        If slices, weights to start from, device or output folder are unusable.
    DivergedError
        If the loss becomes NaN or explodes; the checkpoint of the last good epoch stays.
    """
    from nuclei3d.experiment.runs import stage_run
    from nuclei3d.networks.cpnet import choose_device
    from nuclei3d.segmentation.segmenter import Segmenter
    from nuclei3d.stages.augment import draw_augmentation_sheet
    from nuclei3d.stages.calibrate import (
        read_validation_volumes,
        validation_settings,
        volumes_ap,
        with_thresholds,
    )
    from nuclei3d.stages.train import (
        Checkpoints,
        checkpoint_folder,
        describe_model,
        final_metrics,
        training_fingerprint,
        write_drawn,
        write_model,
    )
    from nuclei3d.stages.training_data import open_training, read_slices

    settings = params.train
    device = choose_device(settings.device)
    described = read_slices(slices)
    refuse_foreign_folder(out, "model.json", "model folder")
    training = open_training(params, described)
    network = training.network
    fingerprint = training_fingerprint(settings, params.seed, described.digest, training.start_digest)
    checkpoints = Checkpoints(checkpoint_folder(out), fingerprint)
    if not resume:
        checkpoints.remove()
    volumes = read_validation_volumes(params, data, described)
    with stage_run("train", params, inputs={"slices": slices}) as run:
        info = describe_model(params, described, training.spec, run.run_id)
        _say_plan(training, params, device, described)

        def judge(judged: nn.Module) -> float:
            judging = Segmenter(judged, validation_settings(info, params), device)
            return volumes_ap(judging, volumes.judging)

        outcome = _train(
            training,
            params,
            device,
            checkpoints,
            judge if volumes.judging else None,
            run,
            on_epoch,
        )
        network.load_state_dict(outcome.weights)
        network.eval()
        metrics = final_metrics(outcome)
        if volumes.calibrating:
            segmenter = Segmenter(network, validation_settings(info, params), device)
            info, chosen = with_thresholds(info, params.calibrate, segmenter, volumes.calibrating)
            metrics |= {"calibrated_ap": chosen.ap, "uncalibrated_ap": chosen.ap_default}
        write_model(out, network, info, outcome, params, described)
        write_drawn(out, training, params.seed, outcome.state.epoch)
        run.metrics({f"kept_{name}": value for name, value in metrics.items()})
        run.tags({"nuclei3d.kept_epoch": outcome.epoch, "nuclei3d.stopped": outcome.stopped or "no"})
        run.artifact(out, "model")
        if run.run_id is not None and training.planes is not None:
            sheet = draw_augmentation_sheet(training.planes, described.diameter_px, params, rows=4, columns=5)
            run.figure(sheet, "augmented_crops.png")
    say(
        f"model of epoch {outcome.epoch} of {outcome.state.epoch} in {out}"
        + (f" ({outcome.stopped})" if outcome.stopped else "")
    )
    return TrainResult(out, outcome.state.epoch, outcome.epoch, outcome.stopped, metrics, run.run_id)


def _say_plan(training: Training, params: Params, device: torch.device, described: Slices) -> None:
    import torch

    from nuclei3d.networks.cpnet import choose_precision

    settings = params.train
    if device.type == "cuda":
        where = f"the GPU ({torch.cuda.get_device_name(device)})"
    else:
        where = f"the CPU ({torch.get_num_threads()} threads)"
    precision = str(choose_precision(settings.precision, device)).removeprefix("torch.")
    say(
        f"training on {where} in {precision}: {training.plan}; "
        f"nuclei of {described.diameter_px:.3g} px scaled to {settings.diameter_px:.3g} px"
    )


def _train(
    training: Training,
    params: Params,
    device: torch.device,
    checkpoints: Checkpoints,
    judge: Callable[[nn.Module], float] | None,
    run: StageRun,
    on_epoch: Callable[[EpochReport], None] | None,
) -> TrainingOutcome:
    from nuclei3d.training.loop import Callbacks, train_network

    settings = params.train
    start = checkpoints.load()
    done = start.epoch if start is not None else 0
    if start is not None:
        say(f"going on after epoch {done} of {settings.epochs}, from {checkpoints.folder}")
        for report in start.history:
            run.metrics(report.metrics(), step=report.epoch)
    crops = training.examples.crops
    with progress_bar("train", total=crops * settings.epochs) as bar:
        bar.advance(crops * done)
        seen = _Rate()

        def step(loss: float, count: int, rate: float) -> None:
            bar.advance(count)
            bar.note(f"loss {seen.smooth(loss):.3f}, rate {rate:.2g}")

        def epoch_done(report: EpochReport) -> None:
            say(_line(report, settings.epochs))
            run.metrics(report.metrics(), step=report.epoch)
            if on_epoch is not None:
                on_epoch(report)

        return train_network(
            training.network,
            training.examples,
            settings,
            device=device,
            start=start,
            callbacks=Callbacks(
                save=checkpoints.save,
                validate_volumes=judge,
                on_epoch=epoch_done,
                on_step=step,
            ),
        )


class _Rate:
    """A running mean of the loss, for the progress bar."""

    def __init__(self) -> None:
        self._mean: float | None = None

    def smooth(self, loss: float) -> float:
        self._mean = loss if self._mean is None else 0.95 * self._mean + 0.05 * loss
        return self._mean


def _line(report: EpochReport, epochs: int) -> str:
    parts = [f"epoch {report.epoch}/{epochs}: loss {report.train_loss:.4f}"]
    if report.validation_loss == report.validation_loss:
        parts.append(f"validation {report.validation_loss:.4f}")
    if report.validation_flow_cosine_z == report.validation_flow_cosine_z:
        cosines = (getattr(report, f"validation_flow_cosine_{axis}") for axis in "zyx")
        parts.append("flow cosine z {:.3f} y {:.3f} x {:.3f}".format(*cosines))
    if report.volume_ap == report.volume_ap:
        parts.append(f"AP in 3D {report.volume_ap:.3f}")
    parts.append(f"{report.crops_per_second:.1f} crops/s, {report.seconds:.1f} s")
    return ", ".join(parts)
