"""A sheet of training planes with the outlines of their labels.

Pictures for the tracker and for slides: curves, outlines in three views, and the worst nuclei.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.report.charts import OUTLINES, style_of
from nuclei3d.report.tables import NucleusRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nuclei3d.training.samples import SampleSet

_VIEWS = (("xy", 0), ("xz", 1), ("yz", 2))
_DPI = 110


@dataclass(frozen=True)
class ShownVolume:
    """A volume with its labels, and for each label whether it is matched."""

    name: str
    voxel_size: VoxelSize
    image: NDArray[Any] | None
    truth: NDArray[np.uint32]
    pred: NDArray[np.uint32]
    found: frozenset[int]
    right: frozenset[int]


def draw_scores(methods: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Draw AP by IoU and, where contrast was measured, recall by contrast into one PNG."""
    from matplotlib.figure import Figure

    bins = len(next(iter(methods.values()))["recall_by_contrast"])
    figure = Figure(figsize=(10 if bins else 5, 3.6), layout="constrained")
    panels = figure.subplots(1, 2 if bins else 1, squeeze=False)[0]
    for place, (name, scores) in enumerate(methods.items()):
        style = style_of(place)
        ap = {float(key): value for key, value in scores["ap"].items() if value is not None}
        panels[0].plot(list(ap), list(ap.values()), color=style.color, marker="os^Dx"[place % 5], label=name)
        if bins:
            _draw_bins(panels[1], scores["recall_by_contrast"], name, place, len(methods))
    panels[0].set(xlabel="IoU that a match needs", ylabel="average precision", ylim=(0, 1))
    panels[0].legend(frameon=False)
    if bins:
        panels[1].set(xlabel="contrast bin, faintest first", ylabel="recall", ylim=(0, 1.02))
        panels[1].set_xticks(range(bins), [str(k + 1) for k in range(bins)])
    _save(figure, out)


def draw_overlay(volume: ShownVolume, centre: Sequence[int], out: Path) -> None:
    """Draw the three planes through a voxel (z, y, x) with all outlines into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    for (view, axis), panel in zip(_VIEWS, figure.subplots(1, 3), strict=True):
        box = [slice(None)] * 3
        _draw_plane(panel, volume, axis, centre[axis], box)
        panel.set_title(f"{view}, plane {centre[axis]}", fontsize=9)
    figure.suptitle(f"{volume.name}    {_legend_text()}", fontsize=9)
    _save(figure, out)


def draw_nuclei(shown: Sequence[tuple[ShownVolume, NucleusRow]], out: Path, radius_um: float) -> None:
    """Draw nuclei, one a column, in xy (above) and xz (below), with outlines, into a PNG.

    Parameters
    ----------
    radius_um
        Half the width of the shown region.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9 * max(len(shown), 2), 4.2), layout="constrained")
    panels = figure.subplots(2, max(len(shown), 1), squeeze=False)
    for column, (volume, row) in enumerate(shown):
        centre = [
            round(place / edge)
            for place, edge in zip((row.z_um, row.y_um, row.x_um), volume.voxel_size.zyx, strict=True)
        ]
        box = [
            slice(max(c - round(radius_um / edge), 0), c + round(radius_um / edge) + 1)
            for c, edge in zip(centre, volume.voxel_size.zyx, strict=True)
        ]
        for axis, panel in zip((0, 1), panels[:, column], strict=True):
            _draw_plane(panel, volume, axis, centre[axis], box)
        contrast = "" if np.isnan(row.contrast) else f"\ncontrast {row.contrast:.1f}"
        panels[0, column].set_title(
            f"{volume.name}\n{row.outcome} {row.label}, IoU {row.best_iou:.2f}{contrast}", fontsize=7
        )
    figure.suptitle(_legend_text(), fontsize=8)
    _save(figure, out)


def worst_nuclei(rows: Sequence[NucleusRow], count: int) -> list[NucleusRow]:
    """Choose the true nuclei with the lowest best IoU; among equals those of the highest contrast first."""
    true = [row for row in rows if row.outcome != "false"]
    return sorted(true, key=lambda row: (row.best_iou, -np.nan_to_num(row.contrast)))[:count]


def _draw_bins(panel: Axes, bins: Sequence[Mapping[str, Any]], name: str, place: int, methods: int) -> None:
    shift = (place - (methods - 1) / 2) * 0.1
    known = [(k, entry) for k, entry in enumerate(bins) if entry["recall"] is not None]
    recall = np.array([entry["recall"] for _, entry in known])
    bounds = np.array([entry["interval"] or [entry["recall"]] * 2 for _, entry in known]).reshape(-1, 2)
    # The bounds of a percentile interval need not hold the estimate itself.
    errors = np.maximum([recall - bounds[:, 0], bounds[:, 1] - recall], 0)
    style = style_of(place)
    panel.errorbar(
        [k + shift for k, _ in known],
        recall,
        errors,
        color=style.color,
        marker="os^Dx"[place % 5],
        linestyle="",
        capsize=3,
        label=name,
    )


def _draw_plane(panel: Axes, volume: ShownVolume, axis: int, index: int, box: Sequence[slice]) -> None:
    cut = tuple(index if k == axis else box[k] for k in range(3))
    down, across = (k for k in range(3) if k != axis)
    aspect = volume.voxel_size.zyx[down] / volume.voxel_size.zyx[across]
    truth, pred = volume.truth[cut], volume.pred[cut]
    if volume.image is None:
        panel.imshow(np.zeros(truth.shape), cmap="gray", vmin=0, vmax=1, aspect=aspect)
    else:
        low, high = np.percentile(volume.image, (1, 99.8))
        plane = np.sqrt(np.clip((volume.image[cut] - low) / max(high - low, 1e-12), 0, 1))
        panel.imshow(plane, cmap="gray", vmin=0, vmax=1, aspect=aspect)
    for labels, matched, hit, miss in (
        (truth, volume.found, "true", "missed"),
        (pred, volume.right, "pred", "false"),
    ):
        for label in np.unique(labels[labels > 0]):
            kind = hit if int(label) in matched else miss
            # Padding closes outlines at the border of the plane.
            mask = np.pad(labels == label, 1).astype(float)
            panel.contour(
                np.arange(-1, labels.shape[1] + 1),
                np.arange(-1, labels.shape[0] + 1),
                mask,
                levels=[0.5],
                colors=OUTLINES[kind],
                linewidths=1.6 if kind in ("missed", "false") else 0.9,
                linestyles="dashed" if kind in ("pred", "false") else "solid",
            )
    panel.set_axis_off()


def _legend_text() -> str:
    return "blue: true, found   yellow dashed: predicted   orange: missed   pink dashed: false"


def _save(figure: Figure, out: Path) -> None:
    # Without the software tag the same figure gives the same bytes.
    figure.savefig(out, dpi=_DPI, metadata={"Software": None})


VIEWS = ("xy", "xz", "yz")
OUTLINE = "#e69f00"


def draw_slices_sheet(samples: SampleSet, out: Path, columns: int = 5) -> None:
    """Draw evenly chosen planes of each view into a PNG, one view a row, outlines of labels on them.

    Parameters
    ----------
    samples
        Training planes.
    out
        The PNG to write.
    columns
        Planes a view.
    """
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
    # without the software tag the same planes give the same bytes
    figure.savefig(out, dpi=110, metadata={"Software": None})
