"""Synthetic labels for the benchmarks: touching ellipsoids of unequal size, sampled at any voxel size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation.masks import clean_labels


@dataclass(frozen=True)
class Ellipsoid:
    """A nucleus: centre (z, y, x) in um, semi-axes in um and their directions (rows of a rotation)."""

    centre: NDArray[np.float64]
    semi_axes: NDArray[np.float64]
    rotation: NDArray[np.float64]

    @property
    def radius(self) -> float:
        """Radius of the sphere of equal volume."""
        return float(np.prod(self.semi_axes) ** (1 / 3))


def pack_ellipsoids(
    box_um: tuple[float, float, float],
    count: int,
    diameter_um: float,
    rng: np.random.Generator,
    *,
    spread: float = 0.25,
    closeness: float = 0.92,
) -> list[Ellipsoid]:
    """Place ellipsoids one after the other, each as close to the others as `closeness` lets it.

    Radii are uniform in diameter / 2 (1 +- spread). Two centres are at least `closeness` times the sum of
    their radii apart: below 1 neighbours cut into each other, and their labels touch.
    """
    placed: list[Ellipsoid] = []
    radii = diameter_um / 2 * np.sort(rng.uniform(1 - spread, 1 + spread, count))[::-1]
    box = np.array(box_um)
    for radius in radii:
        margin = np.minimum(0.75 * radius, box / 2)
        candidates = rng.uniform(margin, box - margin, (4000, 3))
        if placed:
            centres = np.array([other.centre for other in placed])
            reach = np.array([other.radius for other in placed]) + radius
            gaps = np.linalg.norm(candidates[:, None] - centres, axis=2) / reach
            nearest = gaps.min(1)
            nearest[nearest < closeness] = np.inf
            chosen = int(np.argmin(nearest))
            if not np.isfinite(nearest[chosen]):
                continue
        else:
            chosen = 0
        axes = rng.uniform(0.88, 1.12, 3)
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        placed.append(Ellipsoid(candidates[chosen], radius * axes / np.prod(axes) ** (1 / 3), rotation))
    return placed


def draw_labels(
    ellipsoids: list[Ellipsoid], box_um: tuple[float, float, float], voxel_size: VoxelSize
) -> NDArray[np.uint32]:
    """Sample ellipsoids at voxel centres; where two overlap the voxel goes to the one it lies deeper in."""
    edges = np.array(voxel_size.zyx)
    shape = np.maximum(1, np.round(np.array(box_um) / edges)).astype(int)
    labels = np.zeros(shape, np.uint32)
    depth = np.zeros(shape, np.float32)
    for number, body in enumerate(ellipsoids, start=1):
        reach = body.semi_axes.max()
        low = np.clip(np.floor((body.centre - reach) / edges - 0.5).astype(int), 0, shape)
        high = np.clip(np.ceil((body.centre + reach) / edges + 0.5).astype(int), 0, shape)
        here = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        at = np.stack(np.meshgrid(*[np.arange(a, b) for a, b in zip(low, high, strict=True)], indexing="ij"))
        offset = (at + 0.5) * edges.reshape(3, 1, 1, 1) - body.centre.reshape(3, 1, 1, 1)
        along = np.tensordot(body.rotation, offset, 1) / body.semi_axes.reshape(3, 1, 1, 1)
        inner = (1 - np.sqrt((along**2).sum(0))) * body.radius
        deeper = inner > depth[here]
        labels[here][deeper] = number
        depth[here][deeper] = inner[deeper]
    clean_labels(labels)
    return labels


def touching_nuclei(
    box_um: tuple[float, float, float],
    count: int,
    diameter_um: float,
    voxel_size: VoxelSize,
    seed: int,
) -> NDArray[np.uint32]:
    """Pack and draw touching nuclei in one call."""
    rng = np.random.default_rng(seed)
    return draw_labels(pack_ellipsoids(box_um, count, diameter_um, rng), box_um, voxel_size)
