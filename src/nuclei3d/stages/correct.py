"""correct: masks in napari, with the panel that lists the most suspicious nuclei first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.images.tiff import write_labels
from nuclei3d.outputs import free_path
from nuclei3d.stages.correction import open_correction
from nuclei3d.stages.view import require_napari, show


def correct(
    params: Params,
    image: Path,
    masks: Path | None = None,
    model: str | None = None,
    data: Path | None = None,
    embryo: str | None = None,
    *,
    overwrite: bool = False,
    block: bool = True,
) -> Any:
    """Open a frame in napari to correct its masks; give the panel.

    Of a folder of images the first volume that the masks know is taken. `masks` are a label volume or a
    folder of them; if None, what the data set has of the frame, or what the model finds. `model` is a folder,
    weights file, ``models:/name@alias`` or URL; nuclei on which it disagrees come first. Corrections go to
    `data` and the folder of `embryo`, if not to where the image lies; with `overwrite` they replace labels
    that the data set has of this frame. With `block` it waits until the window is closed; what was not saved
    by then goes to ``unsaved/``.
    """
    require_napari(
        "correct", "; or correct masks in Cellpose or Fiji and take them in with: nuclei3d import FILE"
    )
    correction = open_correction(params, image, masks, model, data, embryo, overwrite=overwrite)
    from nuclei3d.stages.correction_panel import CorrectionPanel

    title = f"{correction.folder.name}/{correction.frame}"
    viewer = show(
        title, "image", correction.volume, correction.voxel_size, [("nuclei", correction.labels.copy())]
    )
    panel = CorrectionPanel(viewer, correction)
    viewer.window.add_dock_widget(panel, name="Correct nuclei", area="right")
    if block:
        import napari

        napari.run()
        if panel.unsaved:
            name = f"{correction.folder.name}_{correction.frame}_masks.ome.tif"
            rescued = free_path(Path("unsaved") / name)
            write_labels(rescued, panel.layer.data, correction.voxel_size)
            say(f"closed without saving; the labels as they were: {rescued} (nuclei3d import takes them in)")
    return panel
