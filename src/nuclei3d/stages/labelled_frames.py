"""Labelled frames read for a stage, each embryo's at the scale of its own nuclei where that is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nuclei3d.images.embryos import EmbryoFrame, LabelledVolume, read_labelled
from nuclei3d.training.slicing import nucleus_volumes_um3, sphere_diameter_um

if TYPE_CHECKING:
    from nuclei3d.config import Params

_MOST_LABELLED = 5
"""Frames of an embryo whose labels are measured for its scale."""


def measure_embryos(frames: Sequence[EmbryoFrame], params: Params) -> dict[str, float]:
    """Measure the median diameter of each embryo's labelled nuclei, in um; those without any are left out.

    Of an embryo with many frames a few are read, spread evenly.
    """
    diameters: dict[str, float] = {}
    for embryo in dict.fromkeys(frame.embryo for frame in frames):
        own = [frame for frame in frames if frame.embryo == embryo]
        found: list[float] = []
        for frame in spread_evenly(own, _MOST_LABELLED):
            volume = read_labelled(frame, params.data)
            volumes = nucleus_volumes_um3(volume.labels, volume.voxel_size).values()
            found += [sphere_diameter_um(v) for v in volumes if v >= params.prepare.min_volume_um3]
        if found:
            diameters[embryo] = round(float(np.median(found)), 4)
    return diameters


def read_to_scale(
    frames: Sequence[EmbryoFrame], params: Params, diameter_um: float | None
) -> Iterator[LabelledVolume]:
    """Read labelled frames, one at a time.

    With a `diameter_um` their voxel sizes are such that the nuclei of each embryo measure that in the median:
    how a network sees them that was trained on embryos with unlike nuclei.
    """
    own = {} if diameter_um is None else measure_embryos(frames, params)
    for frame in frames:
        volume = read_labelled(frame, params.data)
        if diameter_um is not None and frame.embryo in own:
            scaled = volume.voxel_size.scaled(diameter_um / own[frame.embryo])
            volume = replace(volume, voxel_size=scaled)
        yield volume


def spread_evenly(frames: Sequence[EmbryoFrame], wanted: int | None) -> list[EmbryoFrame]:
    """Choose so many frames, or all (None), evenly over a sequence."""
    count = len(frames) if wanted is None else min(wanted, len(frames))
    return [frames[int((i + 0.5) * len(frames) / count)] for i in range(count)]
