"""The 3D flow targets of `flow_targets.flows_3d` on a torch device, for CUDA.

The same steady heat equation, solved by the same accelerated iteration, on the list of foreground voxels of
all nuclei at once: every voxel knows the places of its six neighbours in that list, or none.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nuclei3d.core.label_boxes import compact_labels
from nuclei3d.core.targets.heat import faintest_heat
from nuclei3d.errors import InputError
from nuclei3d.volumes.voxel_size import VoxelSize


def flows_3d_torch(
    labels: NDArray[np.integer[Any]],
    voxel_size: VoxelSize,
    device: torch.device,
    *,
    tolerance: float = 1e-3,
) -> torch.Tensor:
    """Compute the flow of every voxel of a labelled volume on a device.

    Parameters
    ----------
    labels : integer array, shape (Z, Y, X)
        0 (or less) is background; numbers may have gaps.
    voxel_size : VoxelSize
    device : torch.device
    tolerance : float
        As for `flow_targets.flows_3d`.

    Returns
    -------
    float32 tensor on `device`, shape (3, Z, Y, X)
        Unit vectors (dz, dy, dx) in physical space; the same as those of `flow_targets.flows_3d`.

    Raises
    ------
    InputError
        If `labels` is not a volume of integers.
    """
    if labels.ndim != 3 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"flow targets: expected integer labels with 3 axes, got {labels.dtype} {labels.shape}"
        )
    flows = torch.zeros((3, *labels.shape), dtype=torch.float32, device=device)
    pieces = _pieces(labels).to(device)
    voxels = torch.nonzero(pieces)
    if len(voxels) == 0:
        return flows
    edges = torch.tensor(voxel_size.zyx, dtype=torch.float64, device=device) / min(voxel_size.zyx)
    piece = pieces[tuple(voxels.T)] - 1
    neighbours = _neighbours(pieces, voxels)
    rho, rounds = _convergence(voxels, piece, edges, tolerance)
    heat = _steady_heat(neighbours, _centres(voxels, piece, edges), piece, rho, rounds, edges)
    gradient = torch.stack(
        [(heat[up] - heat[down]) / edge for (down, up), edge in zip(neighbours, edges, strict=True)]
    )
    length = gradient.norm(dim=0)
    flows[(slice(None), *voxels.T)] = (gradient / length.clamp_min(1e-300)).float()
    return flows


def _pieces(labels: NDArray[np.integer[Any]]) -> torch.Tensor:
    """Number the 6-connected pieces of all labels 1..n."""
    from skimage.measure import label as label_pieces

    pieces = label_pieces(compact_labels(labels), background=0, connectivity=1)  # type: ignore[no-untyped-call]
    return torch.from_numpy(pieces.astype(np.int64))


def _neighbours(pieces: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """Give the places (3, 2, N) of the neighbours before and after on each axis; N where there is none."""
    count = len(voxels)
    padded = torch.nn.functional.pad(pieces, (1, 1, 1, 1, 1, 1))
    place = torch.full_like(padded, count)
    inner = voxels + 1
    place[tuple(inner.T)] = torch.arange(count, device=voxels.device)
    own = padded[tuple(inner.T)]
    result = torch.empty((3, 2, count), dtype=torch.int64, device=voxels.device)
    for axis in range(3):
        for side, step in enumerate((-1, 1)):
            beside = inner.clone()
            beside[:, axis] += step
            at = tuple(beside.T)
            result[axis, side] = torch.where(padded[at] == own, place[at], count)
    return result


def _centres(voxels: torch.Tensor, piece: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Find the voxel of each piece that is closest to its mean position (the first of equally close ones)."""
    pieces = int(piece.max()) + 1
    position = voxels * edges
    sums = torch.zeros((pieces, 3), dtype=torch.float64, device=voxels.device).index_add_(0, piece, position)
    mean = sums / torch.bincount(piece, minlength=pieces).unsqueeze(1)
    # Rounded, so that equal distances are equal.
    distance = (((position - mean[piece]) ** 2).sum(1) * 1e9).round()
    least = torch.full((pieces,), math.inf, dtype=torch.float64, device=voxels.device)
    least.scatter_reduce_(0, piece, distance, "amin")
    closest = torch.nonzero(distance == least[piece]).squeeze(1)
    first = torch.full((pieces,), len(voxels), dtype=torch.int64, device=voxels.device)
    return first.scatter_reduce_(0, piece[closest], closest, "amin")


def _convergence(
    voxels: torch.Tensor, piece: torch.Tensor, edges: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, int]:
    """Bound the spectral radius of each piece's iteration, and give the rounds that the slowest needs."""
    pieces = int(piece.max()) + 1
    index = piece.unsqueeze(1).expand(-1, 3)
    start = torch.zeros((pieces, 3), dtype=torch.int64, device=voxels.device)
    low = start.scatter_reduce(0, index, voxels, "amin", include_self=False)
    high = start.scatter_reduce(0, index, voxels, "amax", include_self=False)
    size = (high - low + 1).cpu().numpy()
    edge = edges.cpu().numpy()
    coupling = 1 / edge**2 / (1 / edge**2).sum()
    rho = (coupling * np.cos(np.pi / (size + 1))).sum(1)
    volume = torch.bincount(piece, minlength=pieces).cpu().numpy() * edge.prod()
    rounds = 2
    for radius, extent, filled in zip(rho, size * edge, volume, strict=True):
        if radius > 0:
            needed = max(tolerance * faintest_heat(extent, filled), 1e-15)
            rate = radius / (1 + math.sqrt(1 - radius * radius))
            rounds = max(rounds, math.ceil(math.log(needed / 2) / math.log(rate)))
    return torch.from_numpy(rho).to(voxels.device), rounds


def _steady_heat(
    neighbours: torch.Tensor,
    centres: torch.Tensor,
    piece: torch.Tensor,
    rho: torch.Tensor,
    rounds: int,
    edges: torch.Tensor,
) -> torch.Tensor:
    """Iterate (see `heat.steady_heat`); the last entry of the result is the heat 0 of all outside."""
    weights = 1 / edges**2 / (2 * (1 / edges**2).sum())
    count = len(piece)
    old = torch.zeros(count + 1, dtype=torch.float64, device=piece.device)
    new = old.clone()
    relaxation = torch.ones_like(rho)
    for step in range(rounds):
        if step == 1:
            relaxation = 1 / (1 - rho**2 / 2)
        elif step > 1:
            relaxation = 1 / (1 - rho**2 * relaxation / 4)
        mean = torch.zeros(count, dtype=torch.float64, device=piece.device)
        for axis in range(3):
            mean += weights[axis] * (old[neighbours[axis, 0]] + old[neighbours[axis, 1]])
        mean[centres] += 1
        new[:count] += relaxation[piece] * (mean - new[:count])
        old, new = new, old
    return old
