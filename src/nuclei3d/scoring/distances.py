"""Distances in micrometres between matched nuclei: of their centres and of their surfaces."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects, generate_binary_structure

from nuclei3d.images.voxel_size import VoxelSize


def centroids_um(
    labels: NDArray[np.integer[Any]], present: NDArray[np.int64], voxel_size: VoxelSize
) -> NDArray[np.float64]:
    """Give the centroids of the labels in `present`.

    Parameters
    ----------
    labels
        Volume (Z, Y, X), with labels not much larger than their number.
    present
        Labels, shape (n,).

    Returns
    -------
    centroids
        Shape (n, 3): z, y, x in um from the centre of the first voxel. nan for labels that are absent.
    """
    voxels = np.nonzero(labels)
    label = labels[voxels]
    length = max(int(present.max(initial=0)), int(label.max(initial=0))) + 1
    sizes = np.bincount(label, minlength=length)[present]
    centres = np.full((len(present), 3), np.nan)
    for axis, edge_um in enumerate(voxel_size.zyx):
        sums = np.bincount(label, weights=voxels[axis], minlength=length)[present]
        np.divide(sums * edge_um, sizes, out=centres[:, axis], where=sizes > 0)
    return centres


def surface_distances_um(
    truth: NDArray[np.integer[Any]],
    prediction: NDArray[np.integer[Any]],
    pairs: NDArray[np.int64],
    voxel_size: VoxelSize,
) -> NDArray[np.float64]:
    """Give the mean distance between the surfaces of each pair of nuclei.

    For every voxel on either surface the distance to the nearest voxel on the other; the mean of the two
    means (average symmetric surface distance).

    Parameters
    ----------
    truth, prediction
        Labelled volumes (Z, Y, X) of equal shape.
    pairs
        Shape (n, 2): labels in truth and in prediction.

    Returns
    -------
    distances
        Shape (n,), in um.
    """
    true_boxes, pred_boxes = find_objects(truth), find_objects(prediction)
    distances = np.full(len(pairs), np.nan)
    for index, (true_label, pred_label) in enumerate(pairs):
        box = tuple(
            slice(min(a.start, b.start), max(a.stop, b.stop))
            for a, b in zip(true_boxes[true_label - 1], pred_boxes[pred_label - 1], strict=True)
        )
        first = _surface(truth[box] == true_label)
        second = _surface(prediction[box] == pred_label)
        to_first = distance_transform_edt(~first, sampling=voxel_size.zyx)
        to_second = distance_transform_edt(~second, sampling=voxel_size.zyx)
        distances[index] = (to_first[second].mean() + to_second[first].mean()) / 2
    return distances


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    # What lies outside the box counts as background, so a nucleus has a surface there too.
    eroded = binary_erosion(mask, generate_binary_structure(3, 1))
    surface: NDArray[np.bool_] = mask & ~eroded
    return surface
