"""A picture of what the network is shown: each crop as it is cut, and a few of its augmented versions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nuclei3d.config import Params
from nuclei3d.errors import InputError
from nuclei3d.outputs import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nuclei3d.training.examples import Batch
    from nuclei3d.training.samples import SampleSet

OUTLINE = "#e69f00"


@dataclass(frozen=True)
class SheetResult:
    """Where the sheet was written, and from how many planes it shows crops."""

    out: Path
    planes: int


def write_augmentation_sheet(params: Params, slices: Path, out: Path) -> SheetResult:
    """Draw augmented crops of a slice data set into a PNG and keep it in MLflow."""
    from nuclei3d.experiment.runs import stage_run
    from nuclei3d.stages.training_data import load_samples, read_slices

    described = read_slices(slices)
    if described.summary.network != "views2d":
        raise InputError(f"{slices} holds volumes for a 3D network; the sheet shows crops of planes only")
    planes = load_samples(described, "train", params.train.memory_limit_gb)
    with stage_run("augment", params, inputs={"slices": slices}) as run:
        figure = draw_augmentation_sheet(planes, described.summary.diameter_px, params)
        with whole_file(out) as path:
            figure.savefig(path, dpi=110, format="png", metadata={"Software": None})
        run.artifact(out)
    return SheetResult(out, len(planes))


def draw_augmentation_sheet(
    planes: SampleSet, planes_diameter_px: float, params: Params, rows: int = 6, columns: int = 6
) -> Figure:
    """Draw one plane a row: left a crop without augmentation, then the augmented crops of as many epochs.

    Each is shown twice, without and with the outlines of its labels. The planes, on which a typical nucleus
    measures `planes_diameter_px`, are drawn by the sampling weights; the crops are those that a training with
    these parameters sees. InputError is raised if there is no plane to draw.
    """
    from matplotlib.figure import Figure

    from nuclei3d.training.crops import CropGrid
    from nuclei3d.training.examples import NO_AUGMENTATION, CropMaker
    from nuclei3d.training.samples import epoch_order, sample_weights

    settings = params.train
    if not len(planes):
        raise InputError("there are no training planes to draw; make slices with 'nuclei3d prepare'")
    weights = sample_weights(planes.infos, settings.sampling, settings.min_train_masks)
    chosen = epoch_order(weights, rows, params.seed, 0)
    grid = CropGrid.of_planes(settings, planes_diameter_px)
    plain = CropMaker(planes, NO_AUGMENTATION, replace(grid, nucleus_centred=1.0), params.seed)
    augmented = CropMaker(planes, settings.augment, replace(grid, nucleus_centred=0.0), params.seed)
    shown = [plain.make_batch(chosen, 0, 0)]
    shown += [augmented.make_batch(chosen, epoch, 0) for epoch in range(columns - 1)]
    figure = Figure(figsize=(1.7 * columns, 3.5 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for row in range(rows):
        for column, batch in enumerate(shown):
            upper, lower = axes[2 * row, column], axes[2 * row + 1, column]
            _show(upper, batch, row, outlines=False)
            _show(lower, batch, row, outlines=True)
            if column == 0:
                info = planes.infos[chosen[row]]
                upper.set_title(f"{info.embryo} {info.frame} {info.view} {info.index}", fontsize=6)
            elif row == 0:
                upper.set_title(f"epoch {column}", fontsize=6)
    return figure


def _show(axis: Axes, batch: Batch, crop: int, *, outlines: bool) -> None:
    axis.set_axis_off()
    axis.imshow(batch.images[crop, 0].numpy(), cmap="gray", vmin=0, vmax=1)
    if outlines:
        for label in np.unique(batch.labels[crop])[1:]:
            axis.contour(batch.labels[crop] == label, levels=[0.5], colors=OUTLINE, linewidths=0.6)
