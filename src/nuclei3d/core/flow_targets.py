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

from nuclei3d.core.heat import piece_flows_2d
from nuclei3d.errors import InputError

Labels = NDArray[np.integer[Any]]


def _checked(labels: Labels, ndim: int) -> NDArray[np.int64]:
    if labels.ndim != ndim or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"flow targets: expected integer labels with {ndim} axes, got {labels.dtype} {labels.shape}"
        )
    return np.ascontiguousarray(labels, dtype=np.int64)


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
    plane = _checked(labels, 2)
    flows = np.zeros((2, *plane.shape), np.float32)
    piece_flows_2d(plane, flows)
    return flows
