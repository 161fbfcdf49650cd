"""train: a prepared data set in, a model folder out; survives being killed."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from nuclei3d.errors import InputError, reason_of
from nuclei3d.networks.cpnet import choose_device, choose_precision, new_network
from nuclei3d.networks.folder import (
    ModelInfo,
    TrainingFrames,
    info_beside,
    load_model,
    save_model,
)
from nuclei3d.networks.planning import plan_architecture, plan_patch
from nuclei3d.networks.unet3d import (
    Targets,
    VolumeSpec,
    count_parameters,
    describe,
    new_volume_network,
    same_architecture,
)
from nuclei3d.outputs import refuse_foreign_folder, require_writable, whole_file, write_json, write_table
from nuclei3d.stages.start_model import find_start_model, scale_of, trace_start
from nuclei3d.stages.training_data import Slices, load_samples, read_slices
from nuclei3d.training.crops import CropGrid
from nuclei3d.training.examples import Examples
from nuclei3d.training.loop import (
    METRICS,
    Callbacks,
    EpochReport,
    TrainingOutcome,
    TrainingState,
    train_network,
)
from nuclei3d.training.samples import SampleSet, epoch_order

if TYPE_CHECKING:
    from nuclei3d.experiment.runs import StageRun


_NO_INFLUENCE = ("name", "patience", "select", "workers", "memory_limit_gb", "device", "fine_tune")
"""Parameters that decide when to stop, what to keep or where to compute, not what an epoch does."""
_UNREADABLE = (OSError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class TrainResult:
    """What `train` made.

    `epochs` were done, those before a kill included; the weights of `epoch` were kept, whose figures
    `metrics` has, and `crops_per_second`, the mean over all epochs. `stopped` says why the training ended
    early, or is empty. `done_before`: the same training had been finished before; its model was kept.
    """

    model: Path
    epochs: int
    epoch: int
    stopped: str
    metrics: dict[str, float]
    run_id: str | None
    done_before: bool = False


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
    refuse_foreign_folder(out, "model.json", "model folder")
    _warn_of_start(params, described)
    cause = _cause_of_model(params, described, data)
    checkpoints = Checkpoints(out)
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
        info = _describe_model(params, described, training.spec, run.run_id)
        _say_plan(training, params, device, described)

        def judge(judged: nn.Module) -> float:
            judging = Segmenter(judged, validation_settings(info, params), device)
            return volumes_ap(judging, volumes.judging)

        outcome = _train_epochs(
            training, params, device, checkpoints, judge if volumes.judging else None, run, on_epoch
        )
        network.load_state_dict(outcome.weights)
        network.eval()
        metrics = _final_metrics(outcome)
        if volumes.calibrating:
            segmenter = Segmenter(network, validation_settings(info, params), device)
            info, chosen = with_thresholds(info, params.calibrate, segmenter, volumes.calibrating)
            metrics |= {"calibrated_ap": chosen.ap, "uncalibrated_ap": chosen.ap_default}
        if training.spec is None:
            with torch.no_grad():
                network.diam_labels.fill_(described.diameter_px)  # type: ignore[operator]
        save_model(out, network, info, _model_card(info, outcome, params, described))
        _write_history(out / "history.csv", outcome.state.history)
        _write_drawn(out, training, params.seed, outcome.state.epoch)
        run.metrics({f"kept_{name}": value for name, value in metrics.items()})
        run.tags({"nuclei3d.kept_epoch": outcome.epoch, "nuclei3d.stopped": outcome.stopped or "no"})
        run.artifact(out, "model")
        if run.run_id is not None and training.spec is None:
            shown = draw_augmentation_sheet(training.samples, described.diameter_px, params, 4, 5)
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


def _run_name(params: Params, described: Slices) -> str:
    wanted = params.train
    embryos = some_of(described.summary.get("embryos", {}).get("train", [])) or described.folder.name
    start = "" if wanted.start_from is None else f" from {Path(wanted.start_from).name}"
    return (
        f"train {wanted.name}{start} on {embryos}: {wanted.network}, {wanted.epochs} epochs, rate "
        f"{wanted.learning_rate:g}, batch {wanted.batch_size}, seed {params.seed}"
    )


def _md5(cause: list[Any]) -> str:
    return hashlib.md5(json.dumps(cause, default=str).encode(), usedforsecurity=False).hexdigest()


def _cause_of_model(params: Params, described: Slices, data: Path | None) -> str:
    """Digest everything that decides the model folder, thresholds included."""
    machine = {"device", "workers", "memory_gb", "memory_limit_gb", "scheduler", "fine_tune"}
    sections = (params.data, params.normalization, params.train, params.calibrate, params.predict)
    chosen = [section.model_dump(mode="json", exclude=machine) for section in sections]
    start = find_start_model(params)
    start_md5 = None if start is None else digest_of(start)
    source = data if data is not None else Path(str(described.summary.get("data", "")))
    data_md5 = digest_of(source) if source.is_dir() else None
    return _md5([__version__, chosen, params.seed, described.digest, start_md5, data_md5])


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
    if described.network != settings.network:
        raise InputError(
            f"{described.folder} was prepared for train.network '{described.network}', not "
            f"'{settings.network}'; run 'nuclei3d prepare --set train.network={settings.network}', or train "
            f"with --set train.network={described.network}"
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
        grid = CropGrid.of_planes(settings, described.diameter_px)
    else:
        grid = CropGrid.of_volumes(settings, spec, float(described.summary["nucleus_diameter_um"]))
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
    normalization = {f"normalization.{name}": value for name, value in _normalization(params, described)}
    shown = {"train.diameter_px": params.train.diameter_px, **normalization}
    for name, value in scale_of(load_model(start)).items():
        if name in shown and shown[name] != value:
            warn(
                f"{name} is {shown[name]:g}, but {value:g} in the model that this starts from: it must "
                "unlearn that; 'nuclei3d prepare --for MODEL' and 'nuclei3d train --from MODEL' take it over"
            )
    if not described.infos.get("validation"):
        warn("no validation data: the last epoch is kept even if the start model is better")


def _normalization(params: Params, described: Slices) -> list[tuple[str, Any]]:
    """Give what prepare normalised with, which params.yaml may no longer say."""
    prepared: Mapping[str, Any] = described.summary.get("params", {}).get("normalization", {})
    return list((params.normalization.model_dump() | dict(prepared)).items())


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
    try:
        depth_um = float(described.summary["voxel_z_um"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{described.folder}/summary.json does not say the voxel size along z; make the data set again "
            "with 'nuclei3d prepare'"
        ) from None
    edge_um = float(described.summary["nucleus_diameter_um"]) / settings.diameter_px
    anisotropy = round(depth_um / edge_um, 4)
    architecture = plan_architecture(anisotropy, wanted.profile, wanted.pooling, wanted.style)
    multiple = architecture.multiple
    patch = wanted.patch or plan_patch(architecture, settings.diameter_px, anisotropy, wanted.patch_diameters)
    if any(size % factor for size, factor in zip(patch, multiple, strict=True)):
        raise InputError(
            f"train.full3d.patch {list(patch)} does not suit the network: (z, y, x) must be multiples of "
            f"{list(multiple)}"
        )
    targets: Targets = "tanh" if described.summary.get("targets") == "tanh" else "heat"
    return VolumeSpec(architecture, anisotropy, patch, targets)


def _say_plan(training: Training, params: Params, device: torch.device, described: Slices) -> None:
    where = f"the CPU ({torch.get_num_threads()} threads)"
    if device.type == "cuda":
        where = f"the GPU ({torch.cuda.get_device_name(device)})"
    precision = str(choose_precision(params.train.precision, device)).removeprefix("torch.")
    say(
        f"training on {where} in {precision}: {training.plan}; "
        f"nuclei of {described.diameter_px:.3g} px scaled to {params.train.diameter_px:.3g} px"
    )


def _fingerprint(params: Params, described: Slices, start_digest: str) -> str:
    """Digest everything that decides the weights; a checkpoint is used only if its fingerprint is the same.

    With the constant schedule the number of epochs does not count, so that a training can be prolonged.
    """
    ignored = {*_NO_INFLUENCE, "epochs"} if params.train.schedule == "constant" else {*_NO_INFLUENCE}
    chosen = params.train.model_dump(mode="json", exclude=ignored)
    return _md5([chosen, params.seed, described.digest, start_digest])


class Checkpoints:
    """The checkpoints of a training, in ``<model folder>.checkpoint``; every file appears whole.

    They are last.pt, best_<epoch>.pt and history.csv. When the training is finished, finished.json says what
    it was made from, and its result.
    """

    def __init__(self, model: Path) -> None:
        self.folder = model.with_name(model.name + ".checkpoint")
        self._model = model
        self._last = self.folder / "last.pt"
        self._finished = self.folder / "finished.json"

    def find_finished(self, cause: str) -> TrainResult | None:
        """Find the result of the training that left the model folder as it is now."""
        try:
            record = json.loads(self._finished.read_text(encoding="utf-8"))
            if record["cause"] != cause or record["model_md5"] != digest_of(self._model):
                return None
        except _UNREADABLE:
            return None
        record["result"].pop("warnings", None)  # of versions before
        return TrainResult(**{**record["result"], "model": self._model, "done_before": True})

    def note_finished(self, result: TrainResult, cause: str) -> None:
        """Write what `find_finished` looks for."""
        record = {"cause": cause, "model_md5": digest_of(self._model), "result": asdict(result)}
        write_json(self._finished, record, default=str)

    def _best(self, epoch: int) -> Path:
        return self.folder / f"best_{epoch:05d}.pt"

    def save(self, state: TrainingState, is_best: bool, fingerprint: str) -> None:
        """Write a state; at any moment last.pt and the best weights that it names are there."""
        if is_best:
            with whole_file(self._best(state.best_epoch)) as path:
                torch.save(state.best, path)
        with whole_file(self._last) as path:
            torch.save({"fingerprint": fingerprint, "state": state.as_plain()}, path)
        for path in self.folder.glob("best_*.pt"):
            if path != self._best(state.best_epoch):
                path.unlink()
        _write_history(self.folder / "history.csv", state.history)

    def load(self, fingerprint: str) -> TrainingState | None:
        """Read the last state; None if there is none or (said aloud) it is unusable or out of date."""
        if not self._last.is_file():
            return None
        try:
            saved = torch.load(self._last, map_location="cpu", weights_only=True)
            if saved["fingerprint"] != fingerprint:
                say(
                    f"the parameters or the slices changed since the checkpoint in {self.folder}; "
                    "training starts afresh"
                )
                return None
            best: dict[str, Any] = {}
            if saved["state"]["best_score"] > -math.inf:
                path = self._best(saved["state"]["best_epoch"])
                best = torch.load(path, map_location="cpu", weights_only=True)
            return TrainingState.from_plain(saved["state"], best)
        except (*_UNREADABLE, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = reason_of(error, 200)
            say(f"the checkpoint in {self.folder} cannot be read ({reason}); training starts afresh")
            return None


def _write_history(path: Path, history: Sequence[EpochReport]) -> None:
    rows = (
        [report.epoch, *("" if math.isnan(report[name]) else f"{report[name]:.6g}" for name in METRICS)]
        for report in history
    )
    write_table(path, ("epoch", *METRICS), rows)


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


def _final_metrics(outcome: TrainingOutcome) -> dict[str, float]:
    history = outcome.state.history
    metrics = next((report.metrics() for report in history if report.epoch == outcome.epoch), {})
    rates = [report["crops_per_second"] for report in history if report.epoch]
    if rates:
        metrics["crops_per_second"] = len(rates) / sum(1 / rate for rate in rates)
    return metrics


def _describe_model(
    params: Params, described: Slices, spec: VolumeSpec | None, run_id: str | None
) -> ModelInfo:
    """Gather what model.json holds; the thresholds are the defaults."""
    from nuclei3d.experiment.provenance import trace_provenance

    provenance = trace_provenance(params, {"slices": described.folder}, device=params.train.device)
    elsewhere = ("nuclei3d.host", "nuclei3d.environment", "mlflow.source.git.commit")
    tags = {name: value for name, value in provenance.as_tags().items() if name not in elsewhere}
    origin = {name.removeprefix("nuclei3d."): value for name, value in tags.items()}
    if run_id is not None:
        origin["run_id"] = run_id
    origin |= trace_start(params)
    if shift_um := described.summary.get("params", {}).get("data", {}).get("label_shift_um"):
        origin["label_shift_um"] = json.dumps(shift_um)
    voxel = float(described.summary["voxel_um"])
    own: Mapping[str, float] = described.summary.get("embryo_diameters_um", {})
    of_training = [
        own[embryo] for embryo in described.summary.get("embryos", {}).get("train", ()) if embryo in own
    ]
    return ModelInfo(
        kind="views2d" if spec is None else "full3d",
        width=params.train.width,
        full3d=spec,
        name=params.train.name,
        diameter_px=params.train.diameter_px,
        nucleus_diameter_um=float(described.summary["nucleus_diameter_um"]),
        voxel_size_um=(float(described.summary.get("voxel_z_um", voxel)), voxel, voxel),
        embryo_diameters_um=(min(of_training), max(of_training)) if of_training else None,
        training=described.summary.get("training"),
        versions=dict(provenance.versions),
        lineage=origin,
        frames=_frames_seen(params, described),
        **dict(_normalization(params, described)),
    )


def _frames_seen(params: Params, described: Slices) -> TrainingFrames | None:
    """Gather the frames that the model has seen, start model included; None if prepare did not tell them."""
    digests = described.summary.get("frame_digests")
    if digests is None:
        return None
    frames = TrainingFrames.model_validate(digests)
    start = find_start_model(params)
    if start is None:
        return frames
    info = info_beside(start)
    return frames.after(None if info is None else info.frames)


def _model_card(info: ModelInfo, outcome: TrainingOutcome, params: Params, described: Slices) -> str:
    embryos = described.summary.get("embryos", {})
    unit = "planes" if info.full3d is None else "volumes"
    rows = [
        ("trained on", ", ".join(embryos.get("train", ["unknown"]))),
        ("validated on", ", ".join(embryos.get("validation", ["unknown"]))),
        (unit, str(described.summary.get(unit, {}).get("train", "unknown"))),
        ("epoch kept", f"{outcome.epoch} of {outcome.state.epoch}"),
        ("nuclei", f"{info.nucleus_diameter_um:.3g} um, {info.diameter_px:.3g} px at the network's scale"),
        ("seed", str(params.seed)),
        *((name.replace("_", " "), f"{value:.4g}") for name, value in _final_metrics(outcome).items()),
        *((name.replace("_", " "), value) for name, value in info.lineage.items()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    what = f"A Cellpose 3 network retrained on planes of 3D embryos by nuclei3d. `{info.name}` is a "
    if info.for_cellpose:
        what += "plain Cellpose state dict: it loads in the Cellpose GUI, command line and `cellpose.models."
        what += "CellposeModel`."
    else:
        what += f"state dict of width {info.width}, which Cellpose itself does not load."
    if info.full3d is not None:
        what = (
            "A 3D network trained on embryos by nuclei3d, for voxels about "
            f"{info.full3d.anisotropy:.3g} times as long in z as in x at its scale. `{info.name}` is a state "
            "dict; model.json has the network's shape."
        )
    return f"# {info.name}\n\n{what}\n\n| | |\n|---|---|\n{table}\n"


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
