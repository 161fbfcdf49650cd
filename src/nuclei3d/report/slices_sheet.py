"""A sheet of training planes with the outlines of their labels."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import tifffile

VIEWS = ("xy", "xz", "yz")
OUTLINE = "#e69f00"


def draw_slices_sheet(slices: Path, out: Path, columns: int = 5) -> None:
    """Draw evenly chosen training planes of each view, one view a row, outlines of labels on them.

    Parameters
    ----------
    slices
        A slice data set with its manifest.csv.
    out
        The PNG to write.
    columns
        Planes a view.
    """
    from matplotlib.figure import Figure

    with (slices / "manifest.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "train"]
    figure = Figure(figsize=(2.4 * columns, 2.6 * len(VIEWS)), layout="constrained")
    axes = figure.subplots(len(VIEWS), columns, squeeze=False)
    for view, axes_of_view in zip(VIEWS, axes, strict=True):
        of_view = [row for row in rows if row["view"] == view]
        picks = np.unique(np.linspace(0, len(of_view) - 1, columns).round().astype(int)) if of_view else []
        for axis in axes_of_view:
            axis.set_axis_off()
        for axis, pick in zip(axes_of_view, picks, strict=False):
            row = of_view[pick]
            image_path = slices / row["file"]
            image = tifffile.imread(image_path)
            labels = tifffile.imread(image_path.with_name(image_path.name.replace("_img.tif", "_lbl.tif")))
            axis.imshow(image, cmap="gray", vmin=float(row["norm_low"]), vmax=float(row["norm_high"]))
            for label in range(1, int(labels.max()) + 1):
                axis.contour(labels == label, levels=[0.5], colors=OUTLINE, linewidths=0.7)
            axis.set_title(f"{row['embryo']} {row['frame']} {view} {row['index']}", fontsize=7)
    # without the software tag the same planes give the same bytes
    figure.savefig(out, dpi=110, metadata={"Software": None})
