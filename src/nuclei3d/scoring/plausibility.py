"""What is wrong with labels of a volume, as far as labels and image tell: never the case in good labels.

Such labels can be trained on and scored, which is why they do harm in silence: a binary mask is one nucleus,
planes labelled one by one are discs, a mask resized with interpolation has a shell of nuclei that are none.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, find_objects
from scipy.ndimage import label as connected_components

from nuclei3d.console import some_of
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.matching import Labels, relabel_sequential

FaultKind = Literal[
    "intensities",
    "binary",
    "background",
    "interpolated",
    "planes",
    "pieces",
    "crumbs",
    "voxel size",
    "image",
    "contrast",
]

#: Neighbours in x that differ: .05 at most in labels of real nuclei, nearly all in an image.
_MOST_BORDERS = 0.5
_BACKGROUND_FACE = 0.5
#: Share of the steps between labels that lead over a value in between; in labels drawn by hand .02 at most.
_MOST_BETWEEN = 0.25
#: Share of the steps in z from one labelled voxel to the next that change the number.
_MOST_CHANGES = 0.6
#: A nucleus is in pieces if the largest is less than this share of it; specks of hand labelling are smaller.
_LARGEST_PIECE = 0.9
#: Share of the nuclei that are in pieces where numbers start anew in every plane.
_MOST_SCATTERED = 0.5
_CRUMB = 0.02


class LabelFault(NamedTuple):
    """One kind of fault, and what was found in words that also say how to mend it."""

    kind: FaultKind
    words: str


_INTERPOLATED = LabelFault(
    "interpolated",
    "borders have values in between: labels were resized with interpolation; resize the original labels with "
    "nearest neighbour (Fiji: interpolation None)",
)


def find_label_faults(labels: Labels, voxel_size: VoxelSize, min_volume_um3: float = 0.0) -> list[LabelFault]:
    """Find what is implausible in labels (z, y, x); of faults that follow from one another the first only.

    Labels below `min_volume_um3` are no crumbs: they are left out elsewhere.
    """
    if not labels.any():
        return []
    if looks_like_image(labels):
        return [LabelFault("intensities", "these are intensities, not labels; give the label volumes")]
    sequential, names = relabel_sequential(labels)
    background = _find_background(sequential)
    if background:
        return [
            LabelFault(
                "background",
                f"the background has the number {names[background]}; it must be 0; set it to 0 in the "
                "program that labelled it",
            )
        ]
    sizes = np.bincount(sequential.ravel())
    scattered = _find_scattered(sequential, sizes)
    if len(names) == 2:
        if not scattered and _count_cores(sequential > 0, voxel_size) == 1:
            return []
        return [
            LabelFault(
                "binary",
                f"one label, {names[1]}, for everything; each nucleus needs a number of its own (Fiji: "
                "MorphoLibJ > Distance Transform Watershed 3D)",
            )
        ]
    if _share_between(labels, (1, 2)) > _MOST_BETWEEN:
        return [_INTERPOLATED]
    if (share := _share_of_changes(labels)) > _MOST_CHANGES:
        return [
            LabelFault(
                "planes",
                f"{share:.0%} of the labelled voxels have another number in the next plane: planes were "
                "labelled one by one (join them, or label in 3D) or resized in z with interpolation",
            )
        ]
    if _share_between(labels, (0,)) > _MOST_BETWEEN:
        return [_INTERPOLATED]
    nuclei = len(names) - 1
    if len(scattered) > _MOST_SCATTERED * nuclei:
        return [
            LabelFault(
                "planes",
                f"{len(scattered)} of {nuclei} labels lie in separate pieces: planes were labelled one by "
                "one, each with numbers from 1 (join them, or label in 3D)",
            )
        ]
    faults = []
    if scattered:
        which = some_of([names[label] for label in scattered], 5)
        faults.append(
            LabelFault(
                "pieces",
                f"{len(scattered)} of {nuclei} labels lie in separate pieces ({which}): nuclei that "
                "share a number; give each its own",
            )
        )
    crumbs = _find_crumbs(sequential, sizes, min_volume_um3 / voxel_size.volume_um3)
    if len(crumbs):
        typical = _typical_size(sizes) * voxel_size.volume_um3
        faults.append(
            LabelFault(
                "crumbs",
                f"{len(crumbs)} of {nuclei} labels are crumbs (such as {names[crumbs[0]]}, voxels: "
                f"{sizes[crumbs[0]]}), the nuclei measure {typical:.3g} um3; remove them or set "
                f"prepare.min_volume_um3={_CRUMB * typical:.2g}",
            )
        )
    return faults


def looks_like_image(labels: Labels) -> bool:
    """Say whether most neighbours in x differ, which they do in an image and never in labels."""
    borders = np.count_nonzero(labels[..., 1:] != labels[..., :-1])
    return borders > _MOST_BORDERS * labels[..., 1:].size


def _find_background(labels: Labels) -> int:
    """Give the label that covers most of the volume's faces, which no nucleus does; 0 if none."""
    if min(labels.shape) < 2:
        return 0
    faces = [np.take(labels, at, axis).ravel() for axis in range(labels.ndim) for at in (0, -1)]
    on_faces = np.bincount(np.concatenate(faces), minlength=2)
    largest = int(on_faces[1:].argmax()) + 1
    return largest if on_faces[largest] > _BACKGROUND_FACE * on_faces.sum() else 0


def _find_scattered(labels: Labels, sizes: NDArray[np.int64]) -> list[int]:
    """Name the labels of which a large part lies apart; pieces that touch by a corner are one."""
    scattered = []
    for label, box in enumerate(find_objects(labels), start=1):
        parts, count = connected_components(labels[box] == label, np.ones((3,) * labels.ndim))
        if count > 1 and np.bincount(parts.ravel())[1:].max() < _LARGEST_PIECE * sizes[label]:
            scattered.append(label)
    return scattered


def _share_between(labels: Labels, axes: tuple[int, ...]) -> float:
    """Give the largest share, over these axes, of borders with 0 where the value rises in several steps.

    A step in between is a voxel whose neighbours on either side are one smaller and one larger.
    """
    largest = 0.0
    for axis in axes:
        line = np.moveaxis(labels, axis, -1).astype(np.int64)
        if line.shape[-1] < 3:
            continue
        step = np.diff(line, axis=-1)
        between = np.count_nonzero(step[..., 1:] * step[..., :-1] > 0)
        borders = np.count_nonzero((line[..., 1:] == 0) != (line[..., :-1] == 0))
        largest = max(largest, between / max(borders, 1))
    return largest


def _share_of_changes(labels: Labels) -> float:
    """Give the share of pairs of labelled voxels, one above the other, whose numbers differ."""
    both = (labels[1:] > 0) & (labels[:-1] > 0)
    return float(np.count_nonzero(both & (labels[1:] != labels[:-1])) / max(np.count_nonzero(both), 1))


def _count_cores(mask: NDArray[np.bool_], voxel_size: VoxelSize) -> int:
    """Count the pieces left half as deep in a mask as its deepest voxel: one for a nucleus."""
    depth = distance_transform_edt(np.pad(mask, 1), sampling=voxel_size.zyx)
    _, count = connected_components(depth > depth.max() / 2, np.ones((3,) * mask.ndim))
    return int(count)


def _typical_size(sizes: NDArray[np.int64]) -> float:
    """Give the size of the label of a typical labelled voxel, which no number of crumbs changes."""
    ordered = np.sort(sizes[1:])
    return float(ordered[np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)])


def _find_crumbs(labels: Labels, sizes: NDArray[np.int64], least: float) -> NDArray[np.int64]:
    """Name labels far smaller than nuclei, smallest first; those at the border of the volume may be cut."""
    crumbs = (sizes < _CRUMB * _typical_size(sizes)) & (sizes >= least) & (sizes > 0)
    for axis in range(labels.ndim):
        for at in (0, -1):
            crumbs[np.unique(np.take(labels, at, axis))] = False
    crumbs[0] = False
    found = np.flatnonzero(crumbs)
    return found[np.argsort(sizes[found], kind="stable")]
