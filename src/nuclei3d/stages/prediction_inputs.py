"""What a prediction reads: the frames of all inputs, each under a name of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.errors import InputError
from nuclei3d.volumes.checks import check_image
from nuclei3d.volumes.frames import Frame, find_frames
from nuclei3d.volumes.voxel_size import VoxelSize


def find_all(inputs: Sequence[Path], params: Params) -> list[Frame]:
    """Find the frames of all inputs, in their order.

    Parameters
    ----------
    inputs
        Files, folders, OME-Zarr.
    params
        Section ``data``: channel, voxel size.

    Raises
    ------
    InputError
        If there are none, one does not state its voxel size, or two frames would have outputs of one name.
    """
    if not inputs:
        raise InputError("nothing to predict: give files, folders or OME-Zarr")
    given = params.data.voxel_size_um
    frames: list[Frame] = []
    for source in inputs:
        found = find_frames(
            Path(source),
            channel=params.data.channel,
            voxel_size=VoxelSize.of(given) if given is not None else None,
        )
        # In a folder that is input and output at once, masks are no images.
        frames.extend(frame for frame in found if not (source.is_dir() and frame.name.endswith("_masks")))
    names: dict[str, Path] = {}
    for frame in frames:
        other = names.setdefault(frame.name, frame.path)
        if other != frame.path:
            raise InputError(
                f"{other} and {frame.path} would both write {frame.name}_masks.ome.tif; predict them into "
                "folders of their own"
            )
        frame.require_voxel_size()
    if not frames:
        raise InputError(f"{', '.join(map(str, inputs))}: only masks found; give images")
    return frames


def read_image(frame: Frame) -> NDArray[Any]:
    """Read a frame and check that it is an image to segment."""
    image = frame.read()
    check_image(image, str(frame.path))
    return image
