"""Resampling of volumes and labels between grids that cover the same box.

All functions put voxel centres at half-integer positions (``align_corners=False``): voxel ``i`` of ``n``
covers the interval ``[i / n, (i + 1) / n]`` of the box, so that nothing shifts when the grid changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nuclei3d.volumes.voxel_size import VoxelSize


def isotropic_shape(shape: Sequence[int], voxel_size: VoxelSize, voxel_um: float) -> tuple[int, int, int]:
    """Give the shape of the cubic grid that covers the same box.

    Parameters
    ----------
    shape
        Shape (z, y, x) of the grid with voxels of `voxel_size`.
    voxel_size
        Voxel size of that grid in um.
    voxel_um
        Edge of the cubic voxels in um.

    Returns
    -------
    tuple of int
        Number of cubic voxels along (z, y, x), at least 1 each.
    """
    z, y, x = (
        max(1, round(size * edge / voxel_um)) for size, edge in zip(shape, voxel_size.zyx, strict=True)
    )
    return z, y, x


def resize_linear(volume: NDArray[np.generic], shape: Sequence[int]) -> NDArray[np.float32]:
    """Resample an image to another number of voxels, linearly.

    Along an axis that grows the values are interpolated linearly between voxel centres and held constant
    beyond the outermost ones. Along an axis that shrinks each new voxel is the mean of the old ones that
    it covers, parts weighted by their length, so that noise is averaged and nothing is aliased; at exactly
    half the size this is the same as linear interpolation.

    Parameters
    ----------
    volume
        Array of any number of axes and any real dtype.
    shape
        Wanted shape, one size per axis.

    Returns
    -------
    float32 array of that shape
        A copy, also where the shape stays the same.
    """
    shape = _checked_shape(volume.shape, shape)
    result = resize_tensor(torch.from_numpy(np.array(volume, dtype=np.float32)), shape)
    return np.ascontiguousarray(result.numpy())


def resize_tensor(volume: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Resample a float32 tensor as `resize_linear` does, on its device; where nothing changes, the same."""
    # Shrinking axes first keeps the intermediate arrays small.
    for axis in sorted(range(volume.ndim), key=lambda axis: shape[axis] / volume.shape[axis]):
        if volume.shape[axis] != shape[axis]:
            volume = _resize_axis(volume, axis, shape[axis])
    return volume


def resize_nearest(labels: NDArray[np.generic], shape: Sequence[int]) -> NDArray[np.generic]:
    """Resample labels to another number of voxels: each new voxel takes the old one at its centre.

    Parameters
    ----------
    labels
        Array of any number of axes and any dtype.
    shape
        Wanted shape, one size per axis.

    Returns
    -------
    array of that shape and the same dtype
        A copy, also where the shape stays the same.
    """
    shape = _checked_shape(labels.shape, shape)
    result = labels
    for axis, (old, new) in enumerate(zip(labels.shape, shape, strict=True)):
        if old != new:
            result = np.take(result, nearest_indices(old, new), axis=axis)
    return np.array(result, copy=result is labels, order="C")


def nearest_indices(old: int, new: int) -> NDArray[np.intp]:
    """Index of the old voxel (of `old`) that holds the centre of each new voxel (of `new`)."""
    # Integers throughout: floating point would round some exact ties down and some up.
    return np.asarray(((2 * np.arange(new, dtype=np.int64) + 1) * old) // (2 * new), dtype=np.intp)


def linear_taps(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Give the old voxels and weights that make up each new voxel along one axis.

    Returns
    -------
    indices, weights : arrays (taps, new)
        Weights sum to 1 over the taps.
    """
    scale = old / new
    if scale <= 1:
        centre = np.clip((np.arange(new) + 0.5) * scale - 0.5, 0, old - 1)
        lower = np.minimum(centre.astype(np.intp), max(old - 2, 0))
        fraction = (centre - lower).astype(np.float32)
        return np.stack([lower, np.minimum(lower + 1, old - 1)]), np.stack([1 - fraction, fraction])
    start = np.arange(new) * scale
    first = np.floor(start + 1e-9).astype(np.intp)
    taps = first + np.arange(int(np.ceil(scale)) + 1)[:, None]
    covered = np.minimum(taps + 1, start + scale) - np.maximum(taps, start)
    weights = np.maximum(covered, 0)
    weights /= weights.sum(axis=0)
    return np.minimum(taps, old - 1), weights.astype(np.float32)


def _resize_axis(volume: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    indices, weights = linear_taps(volume.shape[axis], size)
    along = [1] * volume.ndim
    along[axis] = size
    result: torch.Tensor | None = None
    for index, weight in zip(indices, weights, strict=True):
        if not weight.any():
            continue
        there = torch.from_numpy(index).to(volume.device)
        part = volume.index_select(axis, there).mul_(torch.from_numpy(weight).view(along).to(volume.device))
        result = part if result is None else result.add_(part)
    assert result is not None
    return result


def _checked_shape(old: Sequence[int], new: Sequence[int]) -> tuple[int, ...]:
    wanted = tuple(int(size) for size in new)
    if len(wanted) != len(old) or min(wanted, default=1) < 1 or min(old, default=1) < 1:
        raise ValueError(f"cannot resample an array of shape {tuple(old)} to {wanted}")
    return wanted
