"""Partly labelled frames: what nobody looked at is neither nucleus nor background.

It has a number of its own among the labels (`data.unknown_label`), or lies where a mask beside the labels,
``<frame>_known.tif``, is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.errors import InputError
from nuclei3d.grid import shift_labels
from nuclei3d.images.frames import Frame, frame_stem, list_volumes, single_frame, to_labels
from nuclei3d.images.voxel_size import VoxelSize

KNOWN_MARK = "_known"
"""Ends the name of a mask of what was looked at."""


def is_known_mask(path: Path) -> bool:
    """Say whether a file among labels is a mask of what was looked at."""
    return frame_stem(path).endswith(KNOWN_MARK)


def read_partial_labels(
    frame: Frame,
    unknown_label: int | None,
    shift_um: Sequence[float] | None = None,
    voxel_size: VoxelSize | None = None,
) -> tuple[NDArray[np.uint32], NDArray[np.bool_] | None]:
    """Read labels (z, y, x), 0 where unknown, and say where that is; None: all is known.

    A mask ``<frame>_known`` beside the labels counts. What was read is moved by `shift_um` (z, y, x), if
    given, with the `voxel_size`. InputError is raised as by `to_labels`, or if the mask has another shape or
    leaves nothing known.
    """
    labels: NDArray[Any] = frame.read()
    unknown = np.zeros(labels.shape, bool) if unknown_label is None else np.asarray(labels == unknown_label)
    mask = find_known_mask(frame.path)
    if mask is not None:
        known = single_frame(mask).read()
        if known.shape != labels.shape:
            raise InputError(
                f"{mask} has the shape {known.shape}, its labels {labels.shape}; expected the same"
            )
        unknown |= known == 0
    if unknown.all():
        raise InputError(f"{frame.path}: nothing is known of this frame; remove its labels")
    partial = bool(unknown.any())
    found = to_labels(np.where(unknown, labels.dtype.type(0), labels) if partial else labels, str(frame.path))
    if shift_um is not None and any(shift_um):
        assert voxel_size is not None
        found = shift_labels(found, shift_um, voxel_size)
        if partial:
            unknown = shift_labels(unknown.astype(np.uint32), shift_um, voxel_size) > 0
            found[unknown] = 0
    return found, unknown if partial else None


def find_known_mask(labels: Path) -> Path | None:
    """Find the mask beside labels; inside an OME-Zarr there is none."""
    if not labels.is_file():
        return None
    wanted = frame_stem(labels) + KNOWN_MARK
    return next((path for path in list_volumes(labels.parent) if frame_stem(path) == wanted), None)
