"""Which nuclei of a segmentation are most likely wrong or missed: unlike the others, or in dispute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, find_objects, maximum_position
from scipy.ndimage import label as label_pieces

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.matching import Floats, Labels, relabel_sequential

#: How odd a nucleus is that the frame before does not have.
_NEWCOMER = 3.0
#: Depth from which on foreground without a label is no rind of a nucleus, in diameters.
_LEAST_DEPTH = 0.2
#: Oddness from which on a reason is told.
_ODD = 2.0
#: Spread below which nuclei are called alike, however alike the others are.
_LEAST_SPREAD = {"score": 0.03, "size": 0.1, "shape": 0.04, "growth": 0.1, "agreement": 0.1}


@dataclass(frozen=True)
class Suspect:
    """A nucleus; `oddness` is how many robust standard deviations it lies off the others where it is worst.

    The centre is (z, y, x) in um, that of the first voxel is at 0. `reasons` start with the worst. Label 0 is
    a place without a label.
    """

    label: int
    centre_um: tuple[float, float, float]
    volume_um3: float
    score: float | None
    oddness: float
    reasons: tuple[str, ...]


def rank_nuclei(
    labels: Labels,
    voxel_size: VoxelSize,
    *,
    score: Mapping[int, float] | None = None,
    growth: Mapping[int, float] | None = None,
    agreement: Mapping[int, float] | None = None,
) -> list[Suspect]:
    """List the nuclei of labels (z, y, x), whose numbers may have gaps, most suspicious first.

    By label, `score` is what the network was sure of, `growth` the volume over that of the same nucleus in
    the frame before (absent: it was not there), `agreement` the best intersection over union with another
    segmentation.
    """
    sequential, names = relabel_sequential(labels)
    numbers = names[1:]
    if not len(numbers):
        return []
    centre, volume, fullness, cut = _measure(sequential, voxel_size)
    size = np.log(volume / np.median(volume))
    size_words = ["small" if value < 0 else "large" for value in size]
    # what the border of the volume cuts may be small
    size[cut & (size < 0)] = 0.0
    found: list[tuple[Floats, list[str]]] = [
        (_oddness("size", np.abs(size)), size_words),
        (_oddness("shape", -fullness), ["no ellipsoid: two nuclei, or pieces"] * len(numbers)),
    ]
    if score is not None:
        values = np.array([score.get(int(number), np.nan) for number in numbers])
        found.append((_oddness("score", -values), [f"low score ({value:.2f})" for value in values]))
    if agreement is not None:
        values = np.array([agreement.get(int(number), 0.0) for number in numbers])
        words = [f"the model sees it otherwise (IoU {value:.2f})" for value in values]
        found.append((_oddness("agreement", -values), words))
    if growth is not None:
        values = np.array([growth.get(int(number), np.nan) for number in numbers])
        odd = _oddness("growth", np.abs(np.log(values)))
        odd[np.isnan(values)] = _NEWCOMER
        words = [f"{value:.2g} x its volume before" for value in values]
        words = ["not in the frame before" if np.isnan(v) else w for v, w in zip(values, words, strict=True)]
        found.append((odd, words))
    suspects = []
    for index, number in enumerate(numbers):
        ordered = sorted(
            ((float(odd[index]), words[index]) for odd, words in found), key=lambda each: -each[0]
        )
        value = score.get(int(number)) if score is not None else None
        z, y, x = (float(at) for at in centre[index])
        reasons = tuple(words for odd, words in ordered if odd >= _ODD)
        suspects.append(Suspect(int(number), (z, y, x), float(volume[index]), value, ordered[0][0], reasons))
    return sorted(suspects, key=lambda suspect: (-suspect.oddness, suspect.label))


def find_missed(
    labels: Labels, foreground: NDArray[np.bool_], voxel_size: VoxelSize, diameter_um: float
) -> list[Suspect]:
    """List where a nucleus fits into the `foreground` (z, y, x) outside all labels, deepest first.

    The centre is the deepest point, the volume that of the sphere that fits there. Rinds of nuclei are left
    out, for outlines never agree. `diameter_um` is that of a typical nucleus.
    """
    depth = distance_transform_edt(foreground & (labels == 0), sampling=voxel_size.zyx)
    pieces, count = label_pieces(depth >= _LEAST_DEPTH * diameter_um)
    places = sorted(maximum_position(depth, pieces, range(1, count + 1)), key=lambda at: -depth[at])
    reasons = ("the model sees a nucleus that has no mask",)
    missed = []
    for place in places:
        z, y, x = (float(at * edge) for at, edge in zip(place, voxel_size.zyx, strict=True))
        missed.append(
            Suspect(0, (z, y, x), float(4 / 3 * np.pi * depth[place] ** 3), None, _NEWCOMER, reasons)
        )
    return missed


def _oddness(kind: str, values: Floats) -> Floats:
    """Give how many robust standard deviations values lie above their median; 0 where nan."""
    known = values[np.isfinite(values)]
    if not len(known):
        return np.zeros(len(values))
    middle = np.median(known)
    spread = max(1.4826 * float(np.median(np.abs(known - middle))), _LEAST_SPREAD[kind])
    return np.asarray(np.maximum(np.nan_to_num((values - middle) / spread), 0.0), np.float64)


def _measure(
    labels: NDArray[np.uint32], voxel_size: VoxelSize
) -> tuple[Floats, Floats, Floats, NDArray[np.bool_]]:
    """Give, by label 1..n, centre (n, 3) and volume in um, fullness, and what the volume's border cuts.

    Fullness is the volume over that of the ellipsoid with the same second moments: 1 for ellipsoids of any
    axes, less for all other bodies.
    """
    edges = np.array(voxel_size.zyx)
    boxes = find_objects(labels)
    centre, volume, fullness = np.empty((len(boxes), 3)), np.empty(len(boxes)), np.empty(len(boxes))
    cut = np.zeros(len(boxes), bool)
    for index, box in enumerate(boxes):
        points = (np.argwhere(labels[box] == index + 1) + [axis.start for axis in box]) * edges
        volume[index] = len(points) * voxel_size.volume_um3
        centre[index] = points.mean(axis=0)
        away = points - centre[index]
        # voxels are no points: each has the moments of a box
        moments = away.T @ away / len(points) + np.diag(edges**2 / 12)
        fullness[index] = volume[index] / (4 / 3 * np.pi * np.sqrt(np.linalg.det(5 * moments)))
        cut[index] = any(
            axis.start == 0 or axis.stop == length for axis, length in zip(box, labels.shape, strict=True)
        )
    return centre, volume, fullness, cut
