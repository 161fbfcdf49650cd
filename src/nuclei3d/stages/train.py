"""Training of a network: a prepared data set in, a model folder out; survives being killed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuclei3d.config import Params
from nuclei3d.console import progress_bar, say
from nuclei3d.volumes.whole import refuse_foreign_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nuclei3d.core.training.loop import TrainingOutcome
    from nuclei3d.core.training.state import EpochReport
    from nuclei3d.stages.checkpoints import Checkpoints
    from nuclei3d.stages.training_kinds import Training
    from nuclei3d.stages.training_planes import Slices
    from nuclei3d.tracking.runs import StageRun


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
        `nuclei3d.core.training.loop.StopTraining` (ends well, the model is written), or anything else, such
        as a pruning signal, which passes through.

    Raises
    ------
    InputError
        If slices, weights to start from, device or output folder are unusable.
    DivergedError
        If the loss becomes NaN or explodes; the checkpoint of the last good epoch stays.
    """
    from nuclei3d.core.networks import choose_device
    from nuclei3d.stages.augmentation_sheet import draw_augmentation_sheet
    from nuclei3d.stages.calibrate import with_thresholds
    from nuclei3d.stages.checkpoints import Checkpoints, checkpoint_folder, training_fingerprint
    from nuclei3d.stages.trained_model import describe_model, final_metrics, write_drawn, write_model
    from nuclei3d.stages.training_kinds import open_training
    from nuclei3d.stages.training_planes import read_slices
    from nuclei3d.stages.validation_volumes import read_validation_volumes, validation_settings, volumes_ap
    from nuclei3d.tracking.runs import stage_run

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
            return volumes_ap(judged, volumes.judging, validation_settings(info, params), device)

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
            info, chosen = with_thresholds(network, info, params, volumes.calibrating, device)
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

    from nuclei3d.core.networks import choose_precision

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
    from nuclei3d.core.training.loop import Callbacks, train_network

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
