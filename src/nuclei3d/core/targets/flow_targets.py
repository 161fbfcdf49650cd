"""Flow targets: at every voxel of a nucleus the unit vector that leads to its centre.

Heat is set free at the centre of a nucleus, spreads inside it only, and the normalised gradient of the
heat is the flow (Stringer et al., Cellpose, Nature Methods 2021). Each connected piece of a label is
treated on its own, inside its own bounding box: a touching neighbour is background to it, label numbers
may have gaps, and the pieces of a label that is split flow each to their own centre (heat cannot cross
background, so anything else would leave the smaller pieces without a flow). The centre is the voxel of
the piece that lies closest to the piece's mean position. A piece of one voxel has no direction: flow 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.label_boxes import compact_labels, find_boxes, share_labels
from nuclei3d.core.targets.heat import many_nucleus_flows_3d
from nuclei3d.core.targets.heat_plane import piece_flows_2d
from nuclei3d.errors import InputError
from nuclei3d.volumes.voxel_size import VoxelSize

Labels = NDArray[np.integer[Any]]

_TANH_VOXELS = 5.0


def _check(labels: Labels, ndim: int) -> None:
    if labels.ndim != ndim or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"flow targets: expected integer labels with {ndim} axes, got {labels.dtype} {labels.shape}"
        )


def flows_2d(labels: Labels) -> NDArray[np.float32]:
    """Compute the flow of every pixel of a labelled plane, as Cellpose's training targets.

    For labels of one piece this is Cellpose's own target (`masks_to_flows` on the CPU): heat from the
    centre, spread by the mean over 3 x 3 pixels, 2 (height + width) times, each nucleus as often as its
    own size asks. Runs in one thread and without the GIL; use threads or processes over planes.

    Parameters
    ----------
    labels : integer array, shape (Y, X)
        0 (or less) is background; numbers may have gaps.

    Returns
    -------
    float32 array, shape (2, Y, X)
        Unit vectors (dy, dx) in pixels; 0 on the background and at the centres of symmetric pieces.

    Raises
    ------
    InputError
        If `labels` is not a plane of integers.
    """
    _check(labels, 2)
    flows = np.zeros((2, *labels.shape), np.float32)
    piece_flows_2d(np.ascontiguousarray(labels, dtype=np.int64), flows)
    return flows


def flows_3d(
    labels: Labels,
    voxel_size: VoxelSize,
    *,
    tolerance: float = 1e-3,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """Compute the flow of every voxel of a labelled volume, in physical space.

    The steady heat of a source at the nucleus' centre, with heat 0 outside the nucleus, is solved in um:
    neighbours exchange heat with the weight 1 / (voxel edge)^2 and gradients are taken per um, so a nucleus
    has the same flows whatever the voxels it was sampled with. That heat has no maximum but its source
    (maximum principle), so every flow line ends at the centre, in concave nuclei too.

    Parameters
    ----------
    labels : integer array, shape (Z, Y, X)
        0 (or less) is background; numbers may have gaps.
    voxel_size : VoxelSize
        Edges of a voxel in um.
    tolerance : float
        Error of the heat, relative to that at the far ends of a nucleus, at which its iteration ends.
    threads : int, optional
        Threads to share the nuclei between; all processors by default.

    Returns
    -------
    float32 array, shape (3, Z, Y, X)
        Unit vectors (dz, dy, dx), of length 1 in um; 0 on the background and in pieces of one voxel.

    Raises
    ------
    InputError
        If `labels` is not a volume of integers.
    """
    _check(labels, 3)
    volume = compact_labels(labels)
    where = find_boxes(volume)
    flows = np.zeros((3, *volume.shape), np.float32)
    edges = np.array(voxel_size.zyx) / min(voxel_size.zyx)

    def work(chosen: NDArray[np.int64]) -> None:
        many_nucleus_flows_3d(volume, chosen, where.boxes, edges, tolerance, flows)

    share_labels(work, where.present, where.voxels, threads)
    return flows


def tanh_flows_3d(labels: Labels) -> NDArray[np.float32]:
    """Compute the targets of Cellpose3D (Eschweiler et al. 2022), for comparison.

    Along each axis tanh of the distance to the centre of the nucleus (its mean position) over 5 voxels,
    whatever the size of a voxel: at high anisotropy hardly anything is left along z.

    Parameters
    ----------
    labels : integer array, shape (Z, Y, X)
        0 (or less) is background; numbers may have gaps.

    Returns
    -------
    float32 array, shape (3, Z, Y, X)
        (z, y, x); 0 on the background.

    Raises
    ------
    InputError
        If `labels` is not a volume of integers.
    """
    _check(labels, 3)
    volume = compact_labels(labels)
    count = np.maximum(np.bincount(volume.ravel()), 1)
    flows = np.zeros((3, *volume.shape), np.float32)
    inside = volume > 0
    for axis, size in enumerate(volume.shape):
        along = [1, 1, 1]
        along[axis] = size
        place = np.broadcast_to(np.arange(size, dtype=np.float64).reshape(along), volume.shape)
        centre = np.bincount(volume.ravel(), weights=place.ravel()) / count
        flows[axis][inside] = np.tanh((centre[volume[inside]] - place[inside]) / _TANH_VOXELS)
    return flows
