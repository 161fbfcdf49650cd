"""The model folder that a training ends with: weights, model.json, card, history, and what was drawn."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuclei3d.config import Params
from nuclei3d.volumes.whole import whole_file

if TYPE_CHECKING:
    from torch import nn

    from nuclei3d.core.training.loop import TrainingOutcome
    from nuclei3d.core.volume_network import VolumeSpec
    from nuclei3d.models.info import ModelInfo
    from nuclei3d.stages.training_kinds import Training
    from nuclei3d.stages.training_planes import Slices

HISTORY_FILE = "history.csv"
DRAWN_FILE = "planes_drawn.csv"
DRAWN_VOLUMES_FILE = "volumes_drawn.csv"


def describe_model(
    params: Params, described: Slices, spec: VolumeSpec | None, run_id: str | None
) -> ModelInfo:
    """Gather what model.json holds; the thresholds are the defaults."""
    from nuclei3d.models.info import ModelInfo
    from nuclei3d.tracking.lineage import trace_lineage

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

    from nuclei3d.models.folder import save_model
    from nuclei3d.stages.checkpoints import write_history

    if isinstance(network, CPnet):
        with torch.no_grad():
            network.diam_labels.fill_(described.diameter_px)
    save_model(out, network, info, model_card(info, outcome, params, described))
    write_history(out / HISTORY_FILE, outcome.state.history)


def write_drawn(out: Path, training: Training, seed: int, epochs: int) -> None:
    """Write which planes (volumes) the training drew, how often and why: one row each, as in the manifest."""
    import numpy as np

    from nuclei3d.core.training.sampling import epoch_order

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
