"""Where a volume can hold nuclei at all, found on a coarse grid, so that empty space need not be computed.

The criterion is meant to be wrong on one side only. A block counts as occupied as soon as its mean lies
above the darkest part of the volume by more than noise explains *and* by more than one part in fifty of the
volume's range (a network normalised to that range sees nothing there); and everything within a whole
nucleus diameter of an occupied block is kept. A piece of a volume that holds no background at all is
occupied throughout. Haze, uneven background and hot pixels only add blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import IntensityRange

Box = tuple[slice, slice, slice]

_LEAST_CONTRAST = 0.02
_NOISE_SIGMAS = 5.0
_DARK_PERCENTILE = 2.0
_DARKEST_SIGMAS = 3.0
_DARKEST = 0.05
"""The mean of a dark background lies some 2.3 standard deviations of the noise above the lower percentile."""


@dataclass(frozen=True)
class OccupiedSpace:
    """Blocks of a grid that can hold nuclei.

    `blocks` is a bool array (bz, by, bx); `edges` are, for each axis, the first voxel of each block, and the
    number of voxels at the end.
    """

    blocks: NDArray[np.bool_]
    edges: tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]

    def bounds(self, box: Sequence[slice]) -> Box | None:
        """Give the box of all blocks that are occupied and meet a box; None if none is."""
        met = tuple(
            slice(edges.searchsorted(along.start, "right") - 1, edges.searchsorted(along.stop))
            for edges, along in zip(self.edges, box, strict=True)
        )
        blocks = self.blocks[met]
        if not blocks.any():
            return None
        parts = []
        for axis, edges in enumerate(self.edges):
            found = np.flatnonzero(blocks.any(axis=tuple({0, 1, 2} - {axis}))) + met[axis].start
            parts.append(slice(int(edges[found[0]]), int(edges[found[-1] + 1])))
        return parts[0], parts[1], parts[2]


def everywhere(shape: Sequence[int]) -> OccupiedSpace:
    """Say that nuclei can be anywhere in a grid."""
    z, y, x = (np.array([0, size], dtype=np.intp) for size in shape)
    return OccupiedSpace(np.ones((1, 1, 1), np.bool_), (z, y, x))


def occupied_space(
    volume: NDArray[np.float32] | Tensor,
    intensity: IntensityRange,
    voxel_size: VoxelSize,
    grid_voxel_size: VoxelSize,
    diameter_um: float | None,
) -> OccupiedSpace:
    """Find where nuclei of a diameter (None: anywhere) can be in a normalised volume on a grid.

    `intensity` and `voxel_size` are those of the image, `grid_voxel_size` is of the grid.
    """
    if diameter_um is None:
        return everywhere(volume.shape)
    # Resampling to larger voxels averages the noise away.
    averaged = max(1.0, grid_voxel_size.volume_um3 / voxel_size.volume_um3)
    noise = intensity.noise / (intensity.high - intensity.low)
    return find_occupied(
        volume,
        noise / averaged**0.5,
        [diameter_um / edge for edge in grid_voxel_size.zyx],
        darkest=_DARKEST_SIGMAS * noise + _DARKEST,
    )


def _block_means(image: Tensor, edges: Sequence[NDArray[np.intp]]) -> NDArray[np.float32]:
    """Average over the blocks between the edges, by products with a matrix of shares for each axis."""
    shares = []
    for cuts in edges:
        sizes = np.diff(cuts)
        share = np.zeros((len(sizes), int(cuts[-1])), np.float32)
        share[np.repeat(np.arange(len(sizes)), sizes), np.arange(int(cuts[-1]))] = np.repeat(1 / sizes, sizes)
        shares.append(torch.from_numpy(share).to(image.device))
    z, y, x = shares
    planes = (z @ image.flatten(1)).reshape(-1, *image.shape[1:])
    return np.asarray((y @ planes @ x.T).cpu().numpy(), np.float32)


def find_occupied(
    image: NDArray[np.float32] | Tensor,
    noise: float,
    diameter_voxels: Sequence[float],
    *,
    darkest: float = np.inf,
) -> OccupiedSpace:
    """Find where nuclei can be: blocks a quarter of a diameter wide, with a margin of a diameter all around.

    `image` is a normalised volume (z, y, x), on any device; `noise`, a voxel's standard deviation, is in its
    units; `diameter_voxels` is that of a nucleus along (z, y, x). If even the darkest part is brighter than
    `darkest`, the image is a piece from the midst of an embryo, nothing says what empty space would look
    like, and all of it counts as occupied.
    """
    from scipy.ndimage import distance_transform_edt

    edges = []
    for size, diameter in zip(image.shape, diameter_voxels, strict=True):
        count = max(1, min(size, round(4 * size / diameter)))
        edges.append(np.linspace(0, size, count + 1).round().astype(np.intp))
    z, y, x = (np.diff(cuts) for cuts in edges)
    counts = z[:, None, None] * y[:, None] * x
    means = _block_means(torch.as_tensor(image), edges)
    dark = float(np.percentile(means, _DARK_PERCENTILE))
    if dark > darkest:
        return everywhere(image.shape)
    # Resampling correlates neighbours: count a quarter of the voxels as independent.
    least = np.maximum(_LEAST_CONTRAST, _NOISE_SIGMAS * noise / np.sqrt(np.maximum(counts / 4, 1)))
    occupied = means > dark + least
    # One block more than the diameter: a nucleus may reach into a block that is itself too dark.
    reach = np.array(
        [
            1 + np.ceil(diameter / max(1.0, size / (len(cuts) - 1)))
            for size, diameter, cuts in zip(image.shape, diameter_voxels, edges, strict=True)
        ]
    )
    if occupied.any():
        # An ellipsoid, not a box: a box's corners lie 1.7 diameters away, and every plane would pay for them.
        occupied = np.asarray(distance_transform_edt(~occupied, sampling=1 / reach) <= 1)
    return OccupiedSpace(occupied, (edges[0], edges[1], edges[2]))
