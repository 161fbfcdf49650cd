"""train: a prepared data set in, a model folder out; survives being killed."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from nuclei3d import __version__
from nuclei3d.config import Params
from nuclei3d.console import progress_bar, say, some_of, warn
from nuclei3d.digests import digest_of
from nuclei3d.errors import InputError
from nuclei3d.images.embryos import find_embryos, split_embryos
from nuclei3d.networks.cpnet import choose_device, choose_precision, new_network
from nuclei3d.networks.folder import CARD_FILE, INFO_FILE, load_model, read_info, save_model
from nuclei3d.networks.planning import plan_architecture, plan_patch
from nuclei3d.networks.unet3d import (
    VolumeSpec,
    count_parameters,
    describe,
    new_volume_network,
    same_architecture,
)
from nuclei3d.outputs import refuse_foreign_folder, require_replaceable, require_writable, write_table
from nuclei3d.stages.checkpoints import Checkpoints, TrainResult, write_history
from nuclei3d.stages.labelled_frames import Sources, digest_sources, tell_changes
from nuclei3d.stages.model_card import card_text, describe_model, final_metrics
from nuclei3d.stages.start_model import find_start_model, scale_of
from nuclei3d.stages.training_data import Slices, load_samples, read_slices
from nuclei3d.training.crops import CropGrid
from nuclei3d.training.examples import Examples
from nuclei3d.training.loop import Callbacks, EpochReport, TrainingOutcome, train_network
from nuclei3d.training.samples import SampleSet, epoch_order

if TYPE_CHECKING:
    from nuclei3d.experiment.runs import StageRun


_NO_INFLUENCE = ("name", "patience", "select", "workers", "memory_limit_gb", "device", "fine_tune")
"""Parameters that decide when to stop, what to keep or where to compute, not what an epoch does."""


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
    and slices, the training goes on from there, on a CPU to the same weights bit by bit. A training that was
    finished with them is kept as it is.

    Parameters
    ----------
    params
        The sections train, normalization, data (for volumes), calibrate, predict and tracking are used.
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
    DivergedError
        If the loss becomes NaN or explodes; the checkpoint of the last good epoch stays.
    """
    from nuclei3d.experiment.runs import stage_run
    from nuclei3d.segmentation.segmenter import Segmenter
    from nuclei3d.stages.augment import draw_augmentation_sheet
    from nuclei3d.stages.calibrate import (
        read_validation_volumes,
        validation_settings,
        volumes_ap,
        with_thresholds,
    )

    device = choose_device(params.train.device)
    described = read_slices(slices)
    described.check_content()
    checkpoints = _refuse_to_lose(out, params.train.start_from)
    _warn_of_start(params, described)
    sources = _find_sources(params, data or described.summary.data)
    _warn_of_changes(described, data, sources)
    cause = _cause_of_model(params, described, sources)
    if resume and (finished := checkpoints.find_finished(cause)) is not None:
        say(f"model of epoch {finished.epoch} of {finished.epochs} in {out}: trained before, kept")
        return finished
    for place in (out, checkpoints.folder / "last.pt"):
        require_writable(place)
    training = open_training(params, described)
    network = training.network
    if not resume:
        shutil.rmtree(checkpoints.folder, ignore_errors=True)
    volumes = read_validation_volumes(params, data, described)
    with stage_run("train", params, inputs={"slices": slices}, name=_run_name(params, described)) as run:
        info = describe_model(params, described, training.spec, run.run_id, volumes.frames)
        _say_plan(training, params, device, described)

        def judge(judged: nn.Module) -> float:
            judging = Segmenter(judged, validation_settings(info, params), device)
            return volumes_ap(judging, volumes.judging)

        outcome = _train_epochs(
            training, params, device, checkpoints, judge if volumes.judging else None, run, on_epoch
        )
        network.load_state_dict(outcome.weights)
        network.eval()
        metrics = final_metrics(outcome)
        if volumes.calibrating:
            segmenter = Segmenter(network, validation_settings(info, params), device)
            info, chosen = with_thresholds(info, params.calibrate, segmenter, volumes.calibrating)
            metrics |= {"calibrated_ap": chosen.ap, "uncalibrated_ap": chosen.ap_default}
        if training.spec is None:
            with torch.no_grad():
                network.diam_labels.fill_(described.summary.diameter_px)  # type: ignore[operator]
        save_model(out, network, info, card_text(info, outcome, params, described))
        write_history(out / "history.csv", outcome.state.history)
        _write_drawn(out, training, params.seed, outcome.state.epoch)
        run.metrics({f"kept_{name}": value for name, value in metrics.items()})
        run.tags({"nuclei3d.kept_epoch": outcome.epoch, "nuclei3d.stopped": outcome.stopped or "no"})
        run.artifact(out, "model")
        if run.run_id is not None and training.spec is None:
            shown = draw_augmentation_sheet(training.samples, described.summary.diameter_px, params, 4, 5)
            run.figure(shown, "augmented_crops.png")
    say(
        f"model of epoch {outcome.epoch} of {outcome.state.epoch} in {out}"
        + (f" ({outcome.stopped})" if outcome.stopped else "")
        + ("" if outcome.epoch else ": no epoch was better than the model that this started from")
    )
    result = TrainResult(out, outcome.state.epoch, outcome.epoch, outcome.stopped, metrics, run.run_id)
    if outcome.state.epoch >= params.train.epochs or on_epoch is None:
        checkpoints.note_finished(result, cause)
    return result


def _refuse_to_lose(out: Path, start_from: str | None) -> Checkpoints:
    """Raise InputError where the model's folder holds the start model, or what no training there wrote, or
    the command runs in it; give its checkpoints.
    """
    require_replaceable(out)
    if start_from is not None and out.resolve() in (
        Path(start_from).resolve(),
        Path(start_from).parent.resolve(),
    ):
        raise InputError(f"{out} holds the model that this starts from; give the new one another folder")
    described = out / INFO_FILE
    name = read_info(described).name if described.is_file() else "*"
    own = (name, CARD_FILE, "history.csv", "*_drawn.csv")
    refuse_foreign_folder(out, "model folder", (INFO_FILE, "diameter_px"), own)
    checkpoints = Checkpoints(out)
    if described.is_file() and not checkpoints.folder.is_dir():
        raise InputError(
            f"{out} holds a model that was not trained there and would be replaced; give another folder, or "
            "remove it yourself"
        )
    return checkpoints


def _run_name(params: Params, described: Slices) -> str:
    wanted = params.train
    embryos = some_of(described.summary.embryos.get("train", ())) or described.folder.name
    start = "" if wanted.start_from is None else f" from {Path(wanted.start_from).name}"
    return (
        f"train {wanted.name}{start} on {embryos}: {wanted.network}, {wanted.epochs} epochs, rate "
        f"{wanted.learning_rate:g}, batch {wanted.batch_size}, seed {params.seed}"
    )


def _md5(cause: list[Any]) -> str:
    return hashlib.md5(json.dumps(cause, default=str).encode(), usedforsecurity=False).hexdigest()


def _find_sources(params: Params, data: Path) -> Sources | None:
    """Digest the labelled frames as they are now; None where they are gone or cannot be found."""
    try:
        return digest_sources(split_embryos(find_embryos(data), params.data.split)) if data.is_dir() else None
    except InputError:
        return None  # whoever reads them says it


def _cause_of_model(params: Params, described: Slices, sources: Sources | None) -> str:
    """Digest everything that decides the model folder, thresholds included."""
    # the start model counts by its content, wherever it lies
    machine = {"device", "workers", "memory_gb", "memory_limit_gb", "scheduler", "fine_tune", "start_from"}
    sections = (params.data, params.normalization, params.train, params.calibrate, params.predict)
    chosen = [section.model_dump(mode="json", exclude=machine) for section in sections]
    start = find_start_model(params)
    start_md5 = None if start is None else digest_of(start)
    return _md5([__version__, chosen, params.seed, described.digest, start_md5, sources])


@dataclass(frozen=True)
class Training:
    """A network to train, a digest of all that decides its weights, its examples, and what there is in words.

    `spec` is that of a 3D network, None for a 2D one.
    """

    network: nn.Module
    fingerprint: str
    spec: VolumeSpec | None
    examples: Examples
    samples: SampleSet
    plan: str


def open_training(params: Params, described: Slices) -> Training:
    """Open the data set and make the network."""
    settings = params.train
    if described.summary.network != settings.network:
        raise InputError(
            f"{described.folder} was prepared for train.network '{described.summary.network}', not "
            f"'{settings.network}'; run 'nuclei3d prepare --set train.network={settings.network}', or train "
            f"with --set train.network={described.summary.network}"
        )
    spec = _volume_spec(params, described) if settings.network == "full3d" else None
    start = find_start_model(params)
    network, digest = _start_network(params, spec, start)
    samples = load_samples(described, "train", settings.memory_limit_gb)
    validation = load_samples(described, "validation", settings.memory_limit_gb)
    kind = "planes" if spec is None else "volumes"
    if not len(samples):
        raise InputError(
            f"{described.folder} holds no training {kind}; make the data set again with 'nuclei3d prepare'"
        )
    plan = f"{len(samples)} {kind}, {len(validation)} for validation"
    if spec is None:
        fewest, weight = settings.min_train_masks, settings.sampling.sparse
        if sparse := sum(info.nuclei < fewest for info in samples.infos):
            fate = f"drawn with weight {weight:g}" if weight else "left out"
            say(
                f"{sparse} of {len(samples)} planes show fewer than {fewest} nuclei; they are {fate} "
                "(train.sampling.sparse)"
            )
        grid = CropGrid.of_planes(settings, described.summary.diameter_px)
    else:
        grid = CropGrid.of_volumes(settings, spec, described.summary.nucleus_diameter_um)
        plan += (
            f", in patches of {' x '.join(map(str, spec.patch))} voxels; a 3D network of "
            f"{count_parameters(network) / 1e6:.2g} M parameters for anisotropy {spec.anisotropy:.3g} "
            f"({describe(spec.architecture)})"
        )
    examples = Examples(samples, validation, settings, grid, seed=params.seed)
    fingerprint = _fingerprint(params, described, digest)
    return Training(network, fingerprint, spec, examples, samples, plan)


def _warn_of_start(params: Params, described: Slices) -> None:
    """Say in what the training shows other images than the start model saw, and what cannot be judged."""
    start = find_start_model(params)
    if start is None:
        return
    prepared = described.normalization(params).items()
    normalization = {f"normalization.{name}": value for name, value in prepared}
    shown = {"train.diameter_px": params.train.diameter_px, **normalization}
    for name, value in scale_of(load_model(start)).items():
        if name in shown and shown[name] != value:
            warn(
                f"{name} is {shown[name]:g}, but {value:g} in the model that this starts from: it must "
                "unlearn that; 'nuclei3d prepare --for MODEL' and 'nuclei3d train --from MODEL' take it over"
            )
    if not described.infos.get("validation"):
        warn("no validation data: the last epoch is kept even if the start model is better")


def _warn_of_changes(described: Slices, data: Path | None, sources: Sources | None) -> None:
    """Say which labelled frames are not what they were when the slices were cut from them."""
    before = described.summary.sources
    if before is None or sources is None:
        return
    if changes := tell_changes(before, sources):
        where = data or described.summary.data
        warn(f"{described.folder} was cut before {where} changed ({changes}): run 'nuclei3d prepare' again")


def _start_network(params: Params, spec: VolumeSpec | None, path: Path | None) -> tuple[nn.Module, str]:
    settings = params.train
    network: nn.Module = (
        new_network(settings.diameter_px, params.seed, settings.width)
        if spec is None
        else new_volume_network(spec, params.seed)
    )
    if path is None:
        return network, "scratch"
    model = load_model(path)
    start = model.network
    if spec is None:
        if (model.info.kind, model.info.width) != ("views2d", settings.width):
            raise InputError(
                f"train.start_from: {path} holds a network {model.info.kind} of width {model.info.width}, "
                f"not views2d of train.width {settings.width}; give the same, or null"
            )
        network = start
        with torch.no_grad():
            network.get_parameter("diam_mean").fill_(settings.diameter_px)
    else:
        if not same_architecture(start, spec):
            raise InputError(
                f"train.start_from: {path} holds another network than this training shapes "
                f"({describe(spec.architecture)}, targets {spec.targets}); give a 3D model trained at about "
                "the same voxel size with the same train.full3d.profile, or null"
            )
        network.load_state_dict(start.state_dict())
    return network, hashlib.md5(model.path.read_bytes(), usedforsecurity=False).hexdigest()


def _volume_spec(params: Params, described: Slices) -> VolumeSpec:
    """Shape the 3D network after the voxel size of the data set and the size of its nuclei."""
    settings, wanted = params.train, params.train.full3d
    depth_um = described.summary.voxel_z_um
    if depth_um is None:
        raise InputError(
            f"{described.folder}/summary.json does not say the voxel size along z; make the data set again "
            "with 'nuclei3d prepare'"
        )
    edge_um = described.summary.nucleus_diameter_um / settings.diameter_px
    anisotropy = round(depth_um / edge_um, 4)
    architecture = plan_architecture(anisotropy, wanted.profile, wanted.pooling, wanted.style)
    multiple = architecture.multiple
    patch = wanted.patch or plan_patch(architecture, settings.diameter_px, anisotropy, wanted.patch_diameters)
    if any(size % factor for size, factor in zip(patch, multiple, strict=True)):
        raise InputError(
            f"train.full3d.patch {list(patch)} does not suit the network: (z, y, x) must be multiples of "
            f"{list(multiple)}"
        )
    return VolumeSpec(architecture, anisotropy, patch, described.summary.targets or "heat")


def _say_plan(training: Training, params: Params, device: torch.device, described: Slices) -> None:
    where = f"the CPU ({torch.get_num_threads()} threads)"
    if device.type == "cuda":
        where = f"the GPU ({torch.cuda.get_device_name(device)})"
    precision = str(choose_precision(params.train.precision, device)).removeprefix("torch.")
    say(
        f"training on {where} in {precision}: {training.plan}; "
        f"nuclei of {described.summary.diameter_px:.3g} px scaled to {params.train.diameter_px:.3g} px"
    )


def _fingerprint(params: Params, described: Slices, start_digest: str) -> str:
    """Digest everything that decides the weights; a checkpoint is used only if its fingerprint is the same.

    With the constant schedule the number of epochs does not count, so that a training can be prolonged.
    """
    ignored = {*_NO_INFLUENCE, "start_from"}  # the start model's weights count, wherever they lie
    if params.train.schedule == "constant":
        ignored.add("epochs")
    chosen = params.train.model_dump(mode="json", exclude=ignored)
    return _md5([chosen, params.seed, described.digest, start_digest])


def _train_epochs(
    training: Training,
    params: Params,
    device: torch.device,
    checkpoints: Checkpoints,
    judge: Callable[[nn.Module], float] | None,
    run: StageRun,
    on_epoch: Callable[[EpochReport], None] | None,
) -> TrainingOutcome:
    settings = params.train
    start = checkpoints.load(training.fingerprint)
    done = start.epoch if start is not None else 0
    if start is not None:
        say(f"going on after epoch {done} of {settings.epochs}, from {checkpoints.folder}")
        for report in start.history:
            run.metrics(report.metrics(), step=report.epoch)
    crops = training.examples.crops
    smooth = math.nan
    with progress_bar("train", total=crops * settings.epochs) as bar:
        bar.skip(crops * done)

        def step(loss: float, count: int, rate: float) -> None:
            nonlocal smooth
            smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
            bar.advance(count)
            bar.note(f"loss {smooth:.3f}, rate {rate:.2g}")

        def epoch_done(report: EpochReport) -> None:
            nonlocal done
            done = report.epoch
            say(_line(report, settings.epochs))
            run.metrics(report.metrics(), step=report.epoch)
            if on_epoch is not None and report.epoch:
                on_epoch(report)

        try:
            return train_network(
                training.network,
                training.examples,
                settings,
                device=device,
                start=start,
                callbacks=Callbacks(
                    save=partial(checkpoints.save, fingerprint=training.fingerprint),
                    validate_volumes=judge,
                    on_epoch=epoch_done,
                    on_step=step,
                ),
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{done} of {settings.epochs} epochs are kept in {checkpoints.folder}; the same command goes "
                "on from there"
            ) from None


def _line(report: EpochReport, epochs: int) -> str:
    parts = [f"epoch {report.epoch}/{epochs}: loss {report['train_loss']:.4f}"]
    if not report.epoch:
        parts = [f"epoch 0/{epochs}: the model that this starts from"]
    if not math.isnan(report["validation_loss"]):
        parts.append(f"validation {report['validation_loss']:.4f}")
    cosines = [report[f"validation_flow_cosine_{axis}"] for axis in "zyx"]
    if not math.isnan(cosines[0]):
        parts.append("flow cosine z {:.3f} y {:.3f} x {:.3f}".format(*cosines))
    if not math.isnan(report["volume_ap"]):
        parts.append(f"AP in 3D {report['volume_ap']:.3f}")
    if report.epoch:
        parts.append(f"{report['crops_per_second']:.1f} crops/s")
    parts.append(f"{report['seconds']:.1f} s")
    return ", ".join(parts)


def _write_drawn(out: Path, training: Training, seed: int, epochs: int) -> None:
    """Write which samples the training drew, how often and why: one row each, as in the manifest."""
    infos, weights = training.samples.infos, training.examples.weights
    drawn = np.zeros(len(infos), dtype=np.int64)
    for epoch in range(epochs):
        order = epoch_order(weights, training.examples.crops, seed, epoch)
        drawn += np.bincount(order, minlength=len(infos))
    name = "planes_drawn.csv" if training.spec is None else "volumes_drawn.csv"
    rows = []
    for info, weight, count in zip(infos, weights, drawn, strict=True):
        contrast = "" if math.isnan(info.min_contrast) else f"{info.min_contrast:g}"
        view = info.view if info.is_plane else ""
        place = (info.file, info.embryo, info.frame, view, info.nuclei)
        rows.append((*place, contrast, f"{weight * len(infos):.4g}", int(count)))
    columns = ("file", "embryo", "frame", "view", "nuclei", "min_contrast", "weight", "drawn")
    write_table(out / name, columns, rows)
