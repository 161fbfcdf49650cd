"""Labelled volumes with 3D flows in compact types, ready to cut patches from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.training.stored_images import ImageInfo, StoredImages, quantise_flows, quantise_image
from nuclei3d.volumes.voxel_size import VoxelSize

_FAINT_QUANTILE = 0.2


@dataclass(frozen=True)
class VolumeInfo(ImageInfo):
    """Where a volume came from and what is in it (one row of manifest.csv)."""

    shape: tuple[int, int, int]
    voxel_size: VoxelSize


class VolumeArrays(NamedTuple):
    """The voxels of one volume.

    Attributes
    ----------
    pixels
        uint16 (Z, Y, X): intensities as stored.
    labels
        Unsigned integers (Z, Y, X): 0 is background, 1..n.
    flows
        int8 (Z, Y, X, 3): (dz, dy, dx) times `nuclei3d.core.training.stored_images.FLOW_STEPS`.
    """

    pixels: NDArray[np.uint16]
    labels: NDArray[np.unsignedinteger[Any]]
    flows: NDArray[np.int8]


class NucleusTable(NamedTuple):
    """The nuclei of one volume, in the order of their labels 1..n.

    Attributes
    ----------
    centres
        float32 (n, 3): (z, y, x) in voxels, voxel i covers i to i + 1.
    volumes_um3, contrasts
        float32 (n,); a contrast may be nan.
    """

    centres: NDArray[np.float32]
    volumes_um3: NDArray[np.float32]
    contrasts: NDArray[np.float32]


@dataclass(frozen=True)
class VolumeSet(StoredImages[VolumeInfo]):
    """Many volumes.

    Attributes
    ----------
    nuclei
        One table per volume.
    flow_power
        float64 (volumes, 3): mean square of the flow (z, y, x) inside nuclei; nan without nuclei.
    read
        Gives the voxels of a volume, from memory or mapped from a file; called from several threads.
    """

    nuclei: tuple[NucleusTable, ...]
    flow_power: NDArray[np.float64]
    read: Callable[[int], VolumeArrays]

    @cached_property
    def faint_contrast(self) -> float:
        """Contrast below which a nucleus is one of the faintest fifth; -inf without known contrasts."""
        known = np.concatenate([table.contrasts for table in self.nuclei] or [np.empty(0, np.float32)])
        known = known[np.isfinite(known)]
        return float(np.quantile(known, _FAINT_QUANTILE)) if len(known) else -np.inf

    @property
    def flow_variances(self) -> tuple[float, float, float]:
        """Mean square of the flow along (z, y, x) over all nuclei; y and x are alike under rotation."""
        counts = np.array([table.volumes_um3.sum() for table in self.nuclei], dtype=np.float64)
        known = np.isfinite(self.flow_power).all(axis=1) & (counts > 0)
        if not known.any():
            return 1 / 3, 1 / 3, 1 / 3
        z, y, x = (float(v) for v in np.average(self.flow_power[known], axis=0, weights=counts[known]))
        return max(z, 1e-3), max((y + x) / 2, 1e-3), max((y + x) / 2, 1e-3)


def measure_flow_power(
    flows: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]
) -> tuple[float, ...]:
    """Mean square of the flow along (z, y, x) inside nuclei; nan without nuclei."""
    inside = labels > 0
    if not inside.any():
        return (float("nan"),) * 3
    return tuple(float(np.square(part[inside], dtype=np.float64).mean()) for part in flows)


def stack_volumes(
    infos: Sequence[VolumeInfo],
    images: Sequence[NDArray[np.generic]],
    labels: Sequence[NDArray[np.integer[Any]]],
    flows: Sequence[NDArray[np.floating[Any]]],
    nuclei: Sequence[NucleusTable],
) -> VolumeSet:
    """Pack volumes given as arrays: images and labels (Z, Y, X), flows (3, Z, Y, X)."""
    stored = [quantise_image(image) for image in images]
    arrays = [
        VolumeArrays(
            np.ascontiguousarray(pixels),
            compact_type(volume_labels),
            quantise_flows(volume_flows),
        )
        for (pixels, _, _), volume_labels, volume_flows in zip(stored, labels, flows, strict=True)
    ]
    return VolumeSet(
        infos=tuple(infos),
        nuclei=tuple(nuclei),
        step=np.array([step for _, step, _ in stored]),
        offset=np.array([offset for _, _, offset in stored]),
        flow_power=np.array(
            [measure_flow_power(f, ls) for f, ls in zip(flows, labels, strict=True)], dtype=np.float64
        ).reshape(-1, 3),
        read=arrays.__getitem__,
    )


def compact_type(labels: NDArray[np.integer[Any]]) -> NDArray[np.unsignedinteger[Any]]:
    """Store labels as uint16 where they fit, else as uint32."""
    dtype = np.uint16 if int(labels.max(initial=0)) < 2**16 else np.uint32
    return np.ascontiguousarray(labels, dtype=dtype)
