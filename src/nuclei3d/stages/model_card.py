"""What a trained model says of itself: model.json and the card beside it."""

from __future__ import annotations

import json

from nuclei3d.config import Params
from nuclei3d.networks.folder import ModelInfo, TrainingFrames, TrainingRange, info_beside, thresholds_of
from nuclei3d.networks.unet3d import VolumeSpec
from nuclei3d.stages.start_model import find_start_model, trace_start
from nuclei3d.stages.training_data import Slices
from nuclei3d.training.loop import TrainingOutcome


def describe_model(
    params: Params,
    described: Slices,
    spec: VolumeSpec | None,
    run_id: str | None,
    read: TrainingFrames | None = None,
) -> ModelInfo:
    """Gather what model.json holds; the thresholds are those of the start model, else the defaults.

    Validation frames `read` beside those of the slices are told, too.
    """
    from nuclei3d.experiment.provenance import trace_provenance

    summary = described.summary
    provenance = trace_provenance(params, {"slices": described.folder}, device=params.train.device)
    elsewhere = ("nuclei3d.host", "nuclei3d.environment", "mlflow.source.git.commit")
    tags = {name: value for name, value in provenance.as_tags().items() if name not in elsewhere}
    origin = {name.removeprefix("nuclei3d."): value for name, value in tags.items()}
    if run_id is not None:
        origin["run_id"] = run_id
    origin |= trace_start(params)
    if shift_um := summary.params.get("data", {}).get("label_shift_um"):
        origin["label_shift_um"] = json.dumps(shift_um)
    voxel, own = summary.voxel_um, summary.embryo_diameters_um or {}
    of_training = [own[embryo] for embryo in summary.embryos.get("train", ()) if embryo in own]
    return ModelInfo(
        kind="views2d" if spec is None else "full3d",
        width=params.train.width,
        full3d=spec,
        name=params.train.name,
        diameter_px=params.train.diameter_px,
        nucleus_diameter_um=summary.nucleus_diameter_um,
        voxel_size_um=(summary.voxel_z_um or voxel, voxel, voxel),
        embryo_diameters_um=(min(of_training), max(of_training)) if of_training else None,
        training=_range_seen(params, described),
        versions=dict(provenance.versions),
        lineage=origin,
        frames=_frames_seen(params, described, read),
        **_thresholds_of_start(params, summary.nucleus_diameter_um),
        **described.normalization(params),
    )


def _start_info(params: Params) -> ModelInfo | None:
    start = find_start_model(params)
    return None if start is None else info_beside(start)


def _thresholds_of_start(params: Params, diameter_um: float) -> dict[str, float | None]:
    """Give the thresholds of the start model, the least volume as that of nuclei of this diameter."""
    start = _start_info(params)
    if start is None:
        return {}
    larger = diameter_um / (start.nucleus_diameter_um or diameter_um)
    return {**thresholds_of(start), "min_volume_um3": round(start.min_volume_um3 * larger**3, 3)}


def _range_seen(params: Params, described: Slices) -> TrainingRange | None:
    """Give the range of what the model has seen, start model included."""
    if described.summary.training is None:
        return None
    start = _start_info(params)
    seen = TrainingRange.model_validate(described.summary.training)
    return seen.after(None if start is None else start.training)


def _frames_seen(params: Params, described: Slices, read: TrainingFrames | None) -> TrainingFrames | None:
    """Gather the frames that the model has seen, start model included; None if prepare did not tell them."""
    digests = described.summary.frame_digests
    if digests is None:
        return None
    frames = TrainingFrames.model_validate(digests)
    if read is not None:
        known = frames.validation.values()
        others = {name: each for name, each in read.validation.items() if each not in known}
        frames = frames.after(TrainingFrames(train={}, validation=others))
    if find_start_model(params) is None:
        return frames
    start = _start_info(params)
    return frames.after(None if start is None else start.frames)


def card_text(info: ModelInfo, outcome: TrainingOutcome, params: Params, described: Slices) -> str:
    """Say in Markdown what the model is, what it was trained on, and how well it did there."""
    summary = described.summary
    unit = "planes" if info.full3d is None else "volumes"
    rows = [
        ("trained on", ", ".join(summary.embryos.get("train", ["unknown"]))),
        ("validated on", ", ".join(summary.embryos.get("validation", ["unknown"]))),
        (unit, str(summary.samples.get("train", "unknown"))),
        ("epoch kept", f"{outcome.epoch} of {outcome.state.epoch}"),
        ("nuclei", f"{info.nucleus_diameter_um:.3g} um, {info.diameter_px:.3g} px at the network's scale"),
        ("seed", str(params.seed)),
        *((name.replace("_", " "), f"{value:.4g}") for name, value in final_metrics(outcome).items()),
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


def final_metrics(outcome: TrainingOutcome) -> dict[str, float]:
    """Give the figures of the epoch that was kept, and the mean crops a second."""
    history = outcome.state.history
    metrics = next((report.metrics() for report in history if report.epoch == outcome.epoch), {})
    rates = [report["crops_per_second"] for report in history if report.epoch]
    if rates:
        metrics["crops_per_second"] = len(rates) / sum(1 / rate for rate in rates)
    return metrics
