"""Synthetic embryos with exact labels: nuclei that divide and move, seen through a light-sheet microscope.

Cells live and divide (`cells`), become bodies of chromatin and labels (`bodies`), and are photographed
(`imaging`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nuclei3d.config.sections import SimulateParams
from nuclei3d.simulation.bodies import Body, FineGrid, chromatin, chromatin_pattern, draw_scene
from nuclei3d.simulation.cells import Cell, found_embryo, pass_time
from nuclei3d.simulation.imaging import Illumination, background_noise, expose, light_at_depth, photograph

# A nucleus loses about this share of its light to the blur, so its median is that much below its density.
_LEFT_AFTER_BLUR = 0.7


@dataclass(frozen=True)
class Fragment:
    """A polar body or a piece of a dead cell: place against the embryo's middle (um), radius, light."""

    offset_um: NDArray[np.float64]
    radius_um: float
    light: float


def simulate_embryo(
    params: SimulateParams, rng: np.random.Generator, *, frames: int | None = None
) -> Iterator[tuple[NDArray[np.uint16], NDArray[np.uint16]]]:
    """Film one embryo.

    Parameters
    ----------
    params
        The section `simulate` of the parameters.
    rng
        Source of all randomness: the same generator state gives the same film.
    frames
        Number of frames; None takes the first embryo's from `params`.

    Yields
    ------
    image, labels
        uint16 counts and uint16 labels 1..n, both (Z, Y, X); 0 is background. A voxel is labelled where
        more than half of it lies in nuclei, with the nucleus that holds most of it.
    """
    grid = FineGrid.under(params.shape, params.voxel_size_um)
    pattern = chromatin_pattern(rng)
    illumination = Illumination.drawn(rng)
    cells = found_embryo(params, rng)
    fragments = _draw_fragments(params, rng)
    for index in range(params.frames_of(0) if frames is None else frames):
        if index:
            cells = pass_time(cells, params.minutes_per_frame, params, rng)
        bodies = [_visible(chromatin(cell, params.texture), params) for cell in cells]
        scene = draw_scene(bodies, _fragment_bodies(fragments, cells), grid, pattern)
        photons = expose(scene.density, _cytoplasm(cells, params), grid, illumination, params)
        yield photograph(photons, params, rng), scene.labels


def _visible(body: Body, params: SimulateParams) -> Body:
    """Lift a body that would drown in the noise to the faintest contrast that is wanted."""
    left = float(light_at_depth(body.position[:1], params)[0])
    noise = background_noise(params, left)
    least = params.faintest_contrast * noise / (params.photons * left * _LEFT_AFTER_BLUR)
    return replace(body, density=max(body.density, least))


def _draw_fragments(params: SimulateParams, rng: np.random.Generator) -> list[Fragment]:
    fragments = []
    for _ in range(int(rng.poisson(params.debris))):
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        radius = params.nucleus_diameter_um * rng.uniform(0.08, 0.15)
        light = math.exp(rng.normal(0.2, 0.4))
        fragments.append(Fragment(direction * rng.uniform(1.0, 1.5), radius, light))
    return fragments


def _fragment_bodies(fragments: Sequence[Fragment], cells: Sequence[Cell]) -> list[Body]:
    """Fragments ride at the rim of the cluster of cells."""
    places = np.array([cell.position for cell in cells])
    middle = places.mean(axis=0)
    rim = places.std(axis=0) * 2 + 2.0
    return [
        Body(
            position=middle + fragment.offset_um * rim,
            frame=np.eye(3),
            half_axes_um=np.full(3, fragment.radius_um),
            bumps=np.zeros(8),
            density=fragment.light,
            texture=0.0,
            texture_seed=np.zeros(3),
            nucleoli=(),
        )
        for fragment in fragments
    ]


def _cytoplasm(cells: Sequence[Cell], params: SimulateParams) -> NDArray[np.float32]:
    """Where there is cytoplasm, 0..1 on the camera's voxels: the cells' surroundings, smoothed."""
    # A quarter of the resolution in xy is enough for so smooth a thing.
    shape = (params.shape[0], -(-params.shape[1] // 4), -(-params.shape[2] // 4))
    step = np.multiply(params.voxel_size_um, np.divide(params.shape, shape))
    axes = [((np.arange(n) + 0.5) * s).astype(np.float32) for n, s in zip(shape, step, strict=True)]
    nearest = np.full(shape, np.inf, dtype=np.float32)
    for cell in cells:
        z, y, x = ((axis - np.float32(c)) ** 2 for axis, c in zip(axes, cell.position, strict=True))
        square = z[:, None, None] + y[None, :, None] + x[None, None, :]
        nearest = np.minimum(nearest, np.sqrt(square) / np.float32(cell.radius_um))
    soft = 1 / (1 + np.exp(4 * (nearest - np.float32(1.6))))
    factors = np.divide(params.shape, shape)
    return np.asarray(ndimage.zoom(soft, factors, order=1, grid_mode=True, mode="nearest"), dtype=np.float32)
