"""Pictures for the runs and for slides: curves, outlines in three views, nuclei, training planes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.report.charts import OUTLINES, draw_ap, draw_bins
from nuclei3d.report.projections import Box
from nuclei3d.report.viewer import Arrays, ShownVolume
from nuclei3d.scoring.matching import Integers
from nuclei3d.views import VIEWS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nuclei3d.training.samples import SampleSet

OUTLINE = "#e69f00"
_WORST_SHOWN = 8
_LEGEND = "blue: true, found   yellow dashed: predicted   orange: missed   pink dashed: false"


def draw_figures(
    folder: Path,
    methods: Mapping[str, Mapping[str, Any]],
    volumes: Sequence[ShownVolume],
    nuclei: pd.DataFrame,
) -> None:
    """Draw scores.png, overlay.png (the volume with the most errors) and worst_nuclei.png into a new folder.

    `methods` has the metrics.json by method, the model first; `nuclei` is all of nuclei.csv.
    """
    folder.mkdir()
    draw_scores(methods, folder / "scores.png")
    busiest = max(volumes, key=lambda volume: volume.errors)
    draw_overlay(busiest, nuclei[nuclei["volume"] == busiest.name], folder / "overlay.png")
    # the lowest best IoU; among equals the highest contrast first
    order = np.lexsort([-nuclei["contrast"].fillna(0), nuclei["best_iou"]])
    worst = nuclei.iloc[order][lambda table: table["outcome"] != "false"][:_WORST_SHOWN]
    if len(worst):
        draw_nuclei(worst, {volume.name: volume for volume in volumes}, folder / "worst_nuclei.png")


def draw_scores(methods: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Draw AP by IoU and, where contrast was measured, recall by contrast into one PNG."""
    from matplotlib.figure import Figure

    bins = len(next(iter(methods.values()))["recall_by_contrast"])
    figure = Figure(figsize=(10 if bins else 5, 3.6), layout="constrained")
    panels = figure.subplots(1, 2 if bins else 1, squeeze=False)[0]
    draw_ap(panels[0], methods)
    panels[0].legend(frameon=False)
    if bins:
        draw_bins(panels[1], methods, "recall_by_contrast", "recall", "contrast, faintest true nuclei left")
    _save(figure, out)


def draw_overlay(volume: ShownVolume, nuclei: pd.DataFrame, out: Path) -> None:
    """Draw the three planes through the first error, else nucleus, else the middle, with all outlines."""
    from matplotlib.figure import Figure

    arrays = volume.read()
    errors_first = nuclei.iloc[np.argsort(nuclei["outcome"] == "found", kind="stable")]
    centre = [n // 2 for n in arrays[1].shape]
    if len(nuclei):
        centre = _voxel_of(next(errors_first.itertuples()), volume.voxel_size)
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    for axis, panel in enumerate(figure.subplots(1, 3)):
        _draw_plane(panel, volume, arrays, axis, centre[axis], [slice(None)] * 3)
        panel.set_title(f"{VIEWS[axis]}, plane {centre[axis]}", fontsize=9)
    figure.suptitle(f"{volume.name}    {_LEGEND}", fontsize=9)
    _save(figure, out)


def draw_nuclei(nuclei: pd.DataFrame, volumes: Mapping[str, ShownVolume], out: Path) -> None:
    """Draw nuclei, one a column, in xy (above) and xz (below), with outlines, into a PNG."""
    from matplotlib.figure import Figure

    # half the width of the shown region: a diameter of these nuclei
    radius_um = float(np.median((6 / np.pi * nuclei["volume_um3"]) ** (1 / 3)))
    arrays = {name: volumes[name].read() for name in nuclei["volume"].unique()}
    figure = Figure(figsize=(1.9 * max(len(nuclei), 2), 4.2), layout="constrained")
    panels = figure.subplots(2, len(nuclei), squeeze=False)
    rows: Iterable[Any] = nuclei.itertuples()
    for column, row in enumerate(rows):
        volume = volumes[row.volume]
        centre = _voxel_of(row, volume.voxel_size)
        box = [
            slice(max(c - round(radius_um / edge), 0), c + round(radius_um / edge) + 1)
            for c, edge in zip(centre, volume.voxel_size.zyx, strict=True)
        ]
        for axis, panel in enumerate(panels[:, column]):
            _draw_plane(panel, volume, arrays[row.volume], axis, centre[axis], box)
        contrast = "" if np.isnan(row.contrast) else f"\ncontrast {row.contrast:.1f}"
        panels[0, column].set_title(
            f"{volume.name}\n{row.outcome} {row.label}, IoU {row.best_iou:.2f}{contrast}", fontsize=7
        )
    figure.suptitle(_LEGEND, fontsize=8)
    _save(figure, out)


def _voxel_of(row: Any, voxel_size: VoxelSize) -> list[int]:
    place_um = (row.z_um, row.y_um, row.x_um)
    return [round(place / edge) for place, edge in zip(place_um, voxel_size.zyx, strict=True)]


def _draw_plane(
    panel: Axes, volume: ShownVolume, arrays: Arrays, axis: int, index: int, box: Sequence[slice]
) -> None:
    image = arrays[0]
    cut = tuple(index if k == axis else box[k] for k in range(3))
    down, across = (k for k in range(3) if k != axis)
    aspect = volume.voxel_size.zyx[down] / volume.voxel_size.zyx[across]
    truth, pred = arrays[1][cut], arrays[2][cut]
    plane = np.zeros(truth.shape) if image is None else _grey(image[cut], image)
    panel.imshow(plane, cmap="gray", vmin=0, vmax=1, aspect=aspect)
    for labels, nuclei, hit, miss in (
        (truth, volume.assessment.true, "true", "missed"),
        (pred, volume.assessment.pred, "pred", "false"),
    ):
        _outline(panel, labels, nuclei.label[nuclei.matched], OUTLINES[hit], OUTLINES[miss])
    panel.set_axis_off()


def _grey(plane: NDArray[Any], image: NDArray[Any]) -> NDArray[Any]:
    """Give grey values, square roots between the image's percentiles 1 and 99.8."""
    low, high = np.percentile(image, (1, 99.8))
    return np.asarray(np.sqrt(np.clip((plane - low) / max(high - low, 1e-12), 0, 1)))


def _outline(panel: Axes, labels: NDArray[np.integer[Any]], right: Integers, hit: str, miss: str) -> None:
    """Draw the outlines of a plane's labels in one colour where they are right, else in another, bolder."""
    for label in np.unique(labels[labels > 0]):
        color = hit if label in right else miss
        panel.contour(
            np.arange(-1, labels.shape[1] + 1),
            np.arange(-1, labels.shape[0] + 1),
            # padding closes outlines at the border of the plane
            np.pad(labels == label, 1).astype(float),
            levels=[0.5],
            colors=color,
            linewidths=1.6 if color == miss else 0.9,
            linestyles="dashed" if color in (OUTLINES["pred"], OUTLINES["false"]) else "solid",
        )


def _save(figure: Figure, out: Path) -> None:
    # Without the software tag the same figure gives the same bytes.
    figure.savefig(out, dpi=110, metadata={"Software": None})


def draw_slices_sheet(samples: SampleSet, out: Path, columns: int = 5) -> None:
    """Draw evenly chosen training planes into a PNG, one view a row, with outlines of labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * columns, 2.6 * len(VIEWS)), layout="constrained")
    axes = figure.subplots(len(VIEWS), columns, squeeze=False)
    for view, axes_of_view in zip(VIEWS, axes, strict=True):
        of_view = [index for index, info in enumerate(samples.infos) if info.view == view]
        picks = np.unique(np.linspace(0, len(of_view) - 1, columns).round().astype(int)) if of_view else []
        for axis in axes_of_view:
            axis.set_axis_off()
        for axis, pick in zip(axes_of_view, picks, strict=False):
            info, (pixels, labels, _) = samples.infos[of_view[pick]], samples.read(of_view[pick])
            step, offset = samples.step[of_view[pick]], samples.offset[of_view[pick]]
            low, high = (info.norm_low - offset) / step, (info.norm_high - offset) / step
            axis.imshow(pixels[0], cmap="gray", vmin=low, vmax=high)
            for label in range(1, int(labels.max()) + 1):
                axis.contour(labels[0] == label, levels=[0.5], colors=OUTLINE, linewidths=0.7)
            axis.set_title(f"{info.embryo} {info.frame} {view} {info.index}", fontsize=7)
    _save(figure, out)


@dataclass(frozen=True)
class ShownBlock:
    """A block of an image with what lies around it.

    `image` and `labels` (z, y, x) are cut to the box `around`; labels that `kept` (by label) does not name
    are candidates below the score threshold. `focus` is a plane along each axis; boxes and planes are counted
    in voxels of the whole image.
    """

    title: str
    image: NDArray[Any]
    labels: NDArray[np.integer[Any]]
    kept: NDArray[np.bool_]
    voxel_size: VoxelSize
    around: Box
    box: Box
    focus: tuple[int, int, int]


def draw_blocks(blocks: Sequence[ShownBlock], out: Path, columns: int = 5) -> None:
    """Draw blocks with outlines of nuclei in xy and, below, xz, into a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = max(1, min(columns, len(blocks)))
    rows = max(1, -(-len(blocks) // columns))
    figure = Figure(figsize=(2.6 * columns, 5.0 * rows + 0.4), layout="constrained")
    panels = figure.subplots(2 * rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for number, block in enumerate(blocks):
        row, column = divmod(number, columns)
        for axis in (0, 1):
            panel = panels[2 * row + axis, column]
            down, across = (k for k in range(3) if k != axis)
            at = block.focus[axis] - block.around[axis].start
            plane = np.take(block.image, at, axis).astype(np.float32)
            edges = block.voxel_size.zyx
            panel.imshow(
                _grey(plane, block.image), cmap="gray", vmin=0, vmax=1, aspect=edges[down] / edges[across]
            )
            kept = np.flatnonzero(block.kept)
            _outline(panel, np.take(block.labels, at, axis), kept, OUTLINE, OUTLINES["false"])
            corner, sides = (
                [of[k] for k in (across, down)]
                for of in (
                    [b.start - a.start - 0.5 for a, b in zip(block.around, block.box, strict=True)],
                    [b.stop - b.start for b in block.box],
                )
            )
            panel.add_patch(Rectangle((corner[0], corner[1]), sides[0], sides[1], fill=False, color="white"))
            panel.set_title(
                f"{block.title}\nplane z {block.focus[0]}" if axis == 0 else f"y {block.focus[1]}", fontsize=8
            )
    figure.suptitle(
        "white: the block   orange: nuclei   pink dashed: candidates below the score threshold", fontsize=9
    )
    _save(figure, out)
