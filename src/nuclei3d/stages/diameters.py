"""Diameters of the nuclei in frames on disk, of which blocks alone are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.console import progress_bar, say
from nuclei3d.diameter import (
    DiameterEstimate,
    choose_blocks,
    clean_block,
    estimate_from_blocks,
    smooth_over_time,
)
from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import IntensityRange, measure_boxes, sampled_boxes, sampled_planes

if TYPE_CHECKING:
    from nuclei3d.images.frames import Frame

_MOST_FRAMES = 24
"""Of a time-lapse that are looked at; the diameter of the others is interpolated."""


def read_sampled_planes(frame: Frame) -> NDArray[Any]:
    """Read the planes of a frame that `sampled_planes` names, as (z, y, x)."""
    everything = slice(None)
    planes = [
        frame.read_block((slice(z, z + 1), everything, everything)) for z in sampled_planes(frame.shape)
    ]
    return np.concatenate(planes)


@dataclass(frozen=True)
class Look:
    """What a few boxes of a frame show.

    `fill` is the share of voxels that registration or fusion left around the image, `picture` (z, y, x) what
    can be shown of it: all, or a block with nuclei. `diameter` is None where nothing stands out.
    """

    intensity: IntensityRange
    fill: float
    picture: NDArray[Any]
    diameter: DiameterEstimate | None


def look_at(frame: Frame) -> Look:
    """Measure intensities, and the diameter of the nuclei if the voxel size is known, reading few boxes."""
    boxes = sampled_boxes(frame.shape, frame.chunk)
    parts = [frame.read_block(box) for box in boxes]
    intensity = measure_boxes(parts)
    masks = [intensity.fill_mask(part) for part in parts]
    voxel_size = frame.voxel_size or VoxelSize(1, 1, 1)
    blocks = [
        clean_block(parts[0][box] if len(parts) == 1 else frame.read_block(box), box, intensity)
        for box in choose_blocks(frame.shape, boxes, parts, voxel_size, intensity)
    ]
    return Look(
        intensity,
        float(np.mean([0.0 if mask is None else mask.mean() for mask in masks])),
        clean_block(parts[0], boxes[0], intensity) if len(parts) == 1 else blocks[0],
        None if frame.voxel_size is None else estimate_from_blocks(blocks, voxel_size, intensity),
    )


def estimate_diameters(frames: Sequence[Frame]) -> list[float]:
    """Estimate the diameter of the nuclei in each frame, in um.

    Frames of one file, and files of one folder, are a time-lapse: over it the diameter is smoothed.
    """
    diameters: list[float] = []
    for source, group in groupby(frames, key=time_lapse_of):
        movie = list(group)
        places = np.linspace(0, len(movie) - 1, min(len(movie), _MOST_FRAMES))
        looked_at = [round(at) for at in places]
        found: dict[int, DiameterEstimate] = {}
        with progress_bar("diameter", total=len(looked_at)) as bar:
            for at in looked_at:
                movie[at].require_voxel_size()
                estimate = look_at(movie[at]).diameter
                if estimate is not None:
                    found[at] = estimate
                bar.advance()
        if not found:
            raise InputError(f"{source} shows nothing like nuclei; give their diameter: --diameter UM")
        smooth = smooth_over_time(list(found), [each.diameter_um for each in found.values()], len(movie))
        if len(movie) == 1:
            say(f"{movie[0].name}: nuclei of {found[0]}")
        else:
            say(f"{source}: nuclei of {smooth[0]:.3g} um in the first frame, {smooth[-1]:.3g} um in the last")
        diameters += [round(float(each), 2) for each in smooth]
    return diameters


def time_lapse_of(frame: Frame) -> Path:
    """Give what frames of one time-lapse have in common: their file, or the folder of their files."""
    return frame.path.parent if frame.time is None else frame.path
