"""Synthetic embryos with exact labels: nuclei that divide and move, seen through a light-sheet microscope.

Cells live and divide (`cells`), become bodies of chromatin and labels (`bodies`), and are photographed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nuclei3d.config.sections import SimulateParams
from nuclei3d.simulation.bodies import Body, FineGrid, chromatin, chromatin_pattern, draw_scene
from nuclei3d.simulation.cells import Cell, found_embryo, pass_time

# A nucleus loses about this share of its light to the blur, so its median is that much below its density.
_LEFT_AFTER_BLUR = 0.7
_GLOW_SHARE = 0.12
_GLOW_UM = 4.0


class FilmFrame(NamedTuple):
    """One frame: uint16 counts and uint16 labels 1..n, both (Z, Y, X), and the lineage of each label's cell.

    See `nuclei3d.simulation.cells.Cell` for the latter.
    """

    image: NDArray[np.uint16]
    labels: NDArray[np.uint16]
    lineages: tuple[tuple[int, ...], ...]


def simulate_embryo(
    params: SimulateParams, rng: np.random.Generator, *, frames: int | None = None
) -> Iterator[FilmFrame]:
    """Film one embryo: the same state of `rng` gives the same film; `frames` None takes the first embryo's
    number.

    Yields
    ------
    FilmFrame
        In its labels 0 is background. A voxel is labelled where more than half of it lies in nuclei, with the
        nucleus that holds most of it.
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
        scene = draw_scene(bodies, _at_rim(fragments, cells), grid, pattern)
        photons = expose(scene.density, _cytoplasm(cells, params), grid, illumination, params)
        seen = tuple(cells[place].lineage for place in scene.shown)
        yield FilmFrame(photograph(photons, params, rng), scene.labels, seen)


def _visible(body: Body, params: SimulateParams) -> Body:
    """Lift a body that would drown in the noise to the faintest contrast that is wanted."""
    left = float(light_at_depth(body.position[:1], params)[0])
    noise = background_noise(params, left)
    least = params.faintest_contrast * noise / (params.photons * left * _LEFT_AFTER_BLUR)
    return replace(body, density=max(body.density, least))


def _draw_fragments(params: SimulateParams, rng: np.random.Generator) -> list[Body]:
    """Polar bodies and pieces of dead cells; their places are against the embryo's middle, 1 at its rim."""
    fragments = []
    for _ in range(int(rng.poisson(params.debris))):
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        radius = params.nucleus_diameter_um * rng.uniform(0.08, 0.15)
        light = math.exp(rng.normal(0.2, 0.4))
        place = direction * rng.uniform(1.0, 1.5)
        axes, bumps, seed = np.full(3, radius), np.zeros(8), np.zeros(3)
        fragments.append(Body(place, np.eye(3), axes, bumps, light, 0.0, seed, ()))
    return fragments


def _at_rim(fragments: Sequence[Body], cells: Sequence[Cell]) -> list[Body]:
    """Fragments ride at the rim of the cluster of cells."""
    places = np.array([cell.position for cell in cells])
    middle = places.mean(axis=0)
    rim = places.std(axis=0) * 2 + 2.0
    return [replace(fragment, position=middle + fragment.position * rim) for fragment in fragments]


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


@dataclass(frozen=True)
class Illumination:
    """What is uneven in one embryo's film, fixed over its frames.

    slopes
        (3,) change of the background across the field along z, y, x.
    waves
        (n, 5): amplitude, phase and waves per field in z, y, x.
    """

    slopes: NDArray[np.float64]
    waves: NDArray[np.float64]

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> Illumination:
        """Draw slopes and three slow waves."""
        waves = np.column_stack(
            [rng.uniform(0.2, 0.5, 3), rng.uniform(0, 2 * np.pi, 3), rng.uniform(-1.2, 1.2, (3, 3))]
        )
        return cls(rng.uniform(-0.6, 0.6, 3), waves)

    def background(self, shape: tuple[int, int, int], unevenness: float) -> NDArray[np.float32]:
        """Relative light of the background, mean about 1, on the camera's voxels."""
        z, y, x = (((np.arange(n) + 0.5) / n - 0.5).astype(np.float32) for n in shape)
        z, y, x = z[:, None, None], y[None, :, None], x[None, None, :]
        field = self.slopes[0] * z + self.slopes[1] * y + self.slopes[2] * x
        for amplitude, phase, *waves in self.waves:
            field = field + amplitude * np.cos(
                phase + 2 * np.pi * (waves[0] * z + waves[1] * y + waves[2] * x)
            )
        return np.asarray(np.clip(1 + unevenness * field, 0.1, None), dtype=np.float32)


def light_at_depth(depth_um: NDArray[np.float64], params: SimulateParams) -> NDArray[np.float64]:
    """Share of the light that is left at a depth (exponential attenuation)."""
    return np.asarray(np.exp(-np.clip(depth_um, 0, None) / params.attenuation_um))


def background_noise(params: SimulateParams, left: float) -> float:
    """Shot and read noise of a voxel of cytoplasm in photons, where this share of the light is left."""
    light = params.background_photons + params.haze * params.photons * left
    return float(np.sqrt(light + (params.camera_noise / params.camera_gain) ** 2))


def expose(
    density: NDArray[np.float32],
    cytoplasm: NDArray[np.float32],
    grid: FineGrid,
    illumination: Illumination,
    params: SimulateParams,
) -> NDArray[np.float32]:
    """Mean number of photons per camera voxel, of light on the fine grid and of cytoplasm (0..1, camera
    voxels).

    Light fades with depth, is blurred by the point spread function on the fine grid, and is then averaged
    over the sub-planes of each camera plane. A wide faint glow stands for scattered light.
    """
    depth = (np.arange(grid.shape[0]) + 0.5) * grid.step[0]
    lit = density * light_at_depth(depth, params).astype(np.float32)[:, None, None]
    sigma = np.divide(params.psf_um, grid.step)
    blurred = ndimage.gaussian_filter(lit, sigma, truncate=3.0, mode="constant")
    nuclei = blurred.reshape(-1, grid.parts, *grid.shape[1:]).mean(axis=1)
    left = light_at_depth((np.arange(params.shape[0]) + 0.5) * params.voxel_size_um[0], params)
    haze = params.haze * cytoplasm * left.astype(np.float32)[:, None, None]
    light = (1 - _GLOW_SHARE) * nuclei + _GLOW_SHARE * _glow(nuclei, params) + haze
    stray = params.background_photons * illumination.background(params.shape, params.unevenness)
    return np.asarray(params.photons * light + stray, dtype=np.float32)


def photograph(
    photons: NDArray[np.float32], params: SimulateParams, rng: np.random.Generator
) -> NDArray[np.uint16]:
    """Counts of the camera: shot noise, gain, read noise, offset, and the ceiling of its bit depth."""
    counts = params.camera_offset + params.camera_gain * rng.poisson(photons).astype(np.float32)
    counts += params.camera_noise * rng.standard_normal(photons.shape, dtype=np.float32)
    return np.asarray(np.clip(np.rint(counts), 0, 2**params.camera_bits - 1), dtype=np.uint16)


def _glow(nuclei: NDArray[np.float32], params: SimulateParams) -> NDArray[np.float32]:
    """Scattered light: the picture under a wide blur, computed on every fourth pixel of xy."""
    thin = ndimage.zoom(nuclei, (1, 0.25, 0.25), order=1, grid_mode=True, mode="grid-constant")
    sigma = _GLOW_UM / np.multiply(params.voxel_size_um, np.divide(nuclei.shape, thin.shape))
    wide = ndimage.gaussian_filter(thin, sigma, mode="constant")
    factors = np.divide(nuclei.shape, wide.shape)
    return np.asarray(ndimage.zoom(wide, factors, order=1, grid_mode=True, mode="nearest"))
