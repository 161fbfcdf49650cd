"""Labelled frames read for a stage, each embryo's at the scale of its own nuclei where that is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from nuclei3d.console import some_of
from nuclei3d.digests import digest_of
from nuclei3d.images.embryos import PARTS, EmbryoFrame, LabelledVolume, Split, read_labelled
from nuclei3d.images.ome_zarr import BESIDE_THE_IMAGE
from nuclei3d.images.unknown import find_known_mask
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


Sources = dict[str, tuple[str, str]]
"""The part of each frame (embryo/frame), and a digest of its files: image, labels, mask of what is known."""


def digest_sources(split: Split) -> Sources:
    """Digest the files of all frames of a split."""
    sources: Sources = {}
    digest = cache(digest_of)  # many frames may lie in one file
    for part in PARTS:
        for frame in split.of(part):
            labels = [] if frame.label_path is None else [frame.label_path, find_known_mask(frame.label_path)]
            digests = [digest(file) for file in labels if file is not None]
            image = digest(frame.image_path, without=BESIDE_THE_IMAGE)
            sources[f"{frame.embryo}/{frame.frame}"] = part, "-".join([image, *digests])
    return sources


def tell_changes(before: Mapping[str, Sequence[str]], now: Sources) -> str:
    """Say in words how frames differ from those before; nothing if they do not.

    Frames that are not there now do not count: a machine that trains need not have them all.
    """
    common = [place for place in now if place in before]
    changed = [place for place in common if now[place][1] != before[place][1]]
    moved = [place for place in common if now[place][0] != before[place][0]]
    new = [place for place in now if common and place not in before and now[place][0] != "test"]
    found = {"changed": changed, "now in another part": moved, "new": new}
    return "; ".join(f"{what}: {some_of(places)}" for what, places in found.items() if places)


def spread_evenly(frames: Sequence[EmbryoFrame], wanted: int | None) -> list[EmbryoFrame]:
    """Choose so many frames, or all (None), evenly over a sequence."""
    count = len(frames) if wanted is None else min(wanted, len(frames))
    return [frames[int((i + 0.5) * len(frames) / count)] for i in range(count)]
