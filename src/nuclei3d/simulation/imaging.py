"""The microscope of the synthetic embryos: from light in the specimen to counts of the camera."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nuclei3d.config.sections import SimulateParams
from nuclei3d.simulation.bodies import FineGrid

_GLOW_SHARE = 0.12
_GLOW_UM = 4.0


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
    """Mean number of photons per camera voxel.

    Light fades with depth, is blurred by the point spread function on the fine grid, and is then averaged
    over the sub-planes of each camera plane. A wide faint glow stands for scattered light.

    Parameters
    ----------
    density
        Light on the fine grid, 1 for the typical nucleus.
    cytoplasm
        0..1 on the camera's voxels.
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
