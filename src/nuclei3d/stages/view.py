"""Opening an image with its masks in napari."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.errors import InputError
from nuclei3d.images.frames import check_image
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.pairing import (
    Entry,
    find_image_entries,
    find_label_entries,
    first_voxel_size,
    pair_entries,
)


def view(params: Params, image: Path, masks: Sequence[Path] = (), *, block: bool = True) -> Any:
    """Show one volume and any number of label volumes on it, with the right scale; give napari's viewer.

    Of folders the first volume that all masks know is shown; each of the masks becomes a layer. With `block`
    it waits until the window is closed.
    """
    require_napari("view")
    entry, layers = choose_layers(image, masks, params.data.channel)
    stated = first_voxel_size(entry, *(layer for _, layer in layers))
    size = VoxelSize.given(params.data.voxel_size_um) or stated or VoxelSize(1, 1, 1)
    volume = entry.frame.read()
    check_image(volume, str(entry.frame.path))
    labels = [(name, layer.read_labels()) for name, layer in layers]
    for name, array in labels:
        if array.shape != volume.shape:
            raise InputError(
                f"{name} has shape {array.shape} and the image {volume.shape}; both must be equal"
            )
    viewer = show(entry.key, entry.stem, volume, size, labels)
    if block:
        import napari

        napari.run()
    return viewer


def require_napari(command: str, otherwise: str = "") -> None:
    """Raise InputError if napari cannot open a window, with what else one can do."""
    if any(importlib.util.find_spec(name) is None for name in ("napari", "qtpy")):
        raise InputError(
            f"nuclei3d {command} needs napari; install it with: pip install 'nuclei3d[view]'{otherwise}"
        )
    if sys.platform == "linux" and not any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM")
    ):
        # Qt would abort the process
        raise InputError(
            f"nuclei3d {command} needs a screen, and there is none (DISPLAY is not set); start it on a "
            f"desktop or with ssh -X{otherwise}"
        )


def show(
    title: str,
    name: str,
    volume: NDArray[Any],
    size: VoxelSize,
    labels: Sequence[tuple[str, NDArray[np.integer[Any]]]],
) -> Any:
    """Open napari with an image and labels on it, (Z, Y, X) each, in um; give its viewer."""
    import napari

    viewer = napari.Viewer(title=f"nuclei3d: {title}")
    viewer.add_image(volume, name=name, scale=size.zyx, units="um")
    for label_name, array in labels:
        viewer.add_labels(array, name=label_name, scale=size.zyx, units="um").contour = 1
    viewer.scale_bar.visible = True
    return viewer


def choose_layers(
    image: Path, masks: Sequence[Path], channel: str | int | None = None
) -> tuple[Entry, list[tuple[str, Entry]]]:
    """Find the first image that every folder of masks knows, and those masks with a name for each."""
    images = find_image_entries(image, channel)
    partners = [pair_entries(images, find_label_entries(path)) for path in masks]
    for entry in images:
        if all(entry in found for found in partners):
            return entry, [(path.name, found[entry]) for path, found in zip(masks, partners, strict=True)]
    raise InputError(f"no volume of {image} has masks of its name in {', '.join(map(str, masks))}")
