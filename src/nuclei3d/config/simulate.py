"""Parameters of the synthetic embryos."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from nuclei3d.config.data import PositiveFloat, Triple
from nuclei3d.config.section import Section

FrameCount = Annotated[int, Field(ge=1, le=10_000)]
Share = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(ge=0, le=1.5)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Extent = Annotated[int, Field(ge=4, le=4096)]


class SimulateParams(Section):
    """Synthetic time-lapses with exact labels; one embryo per entry of `embryos`.

    The defaults make embryos in the likeness of light-sheet data after twofold downsampling in xy:
    voxels 2 x 0.348 x 0.348 um, anisotropy 5.75. Lengths are in um, light in photons per voxel.

    embryos
        Names, each a folder of the data set.
    frames
        Frames of each embryo: one number for all, or one per embryo.
    shape, voxel_size_um
        Planes, rows and columns of a frame; edges of a voxel (z, y, x). Anisotropy follows from these.
    nuclei, nucleus_diameter_um, size_variation, shape_variation
        Mean number of nuclei in the first frame; their mean diameter; its spread (of the logarithm);
        strength of the smooth deformation of the ellipsoids.
    minutes_per_frame, cell_cycle_minutes
        Time between frames and between divisions; the quotient says how fast the number grows.
    closeness
        1: every nucleus may touch its neighbours; 0: each keeps a coat of cytoplasm around it.
    photons, brightness_variation, faint_share, faintest_contrast
        Light of the typical nucleus; spread of the logarithm from nucleus to nucleus; share of nuclei
        in the faint tail; no labelled nucleus is dimmer than this many sigmas of the background's noise.
    texture
        Contrast of the chromatin inside a nucleus, as a share of its mean.
    attenuation_um
        Depth in which the light falls to 1/e.
    background_photons, unevenness, haze
        Light outside nuclei; how much it differs across the field (share); light of the cytoplasm as
        a share of `photons`.
    psf_um
        Standard deviations of the point spread function (z, y, x).
    camera_gain, camera_offset, camera_noise, camera_bits
        Counts per photon; counts without light; read noise in counts; bit depth.
    debris
        Mean number of polar bodies and fragments in an embryo: seen, not labelled.
    """

    embryos: Annotated[tuple[str, ...], Field(min_length=1)] = ("embryo_a", "embryo_b", "embryo_c")
    frames: tuple[FrameCount, ...] = (6, 3, 3)
    shape: tuple[Extent, Extent, Extent] = (24, 128, 128)
    voxel_size_um: Triple = (2.0, 0.348, 0.348)
    nuclei: Annotated[int, Field(ge=1, le=2000)] = 22
    nucleus_diameter_um: PositiveFloat = 9.5
    size_variation: Spread = 0.08
    shape_variation: Spread = 0.09
    minutes_per_frame: PositiveFloat = 40.0
    cell_cycle_minutes: PositiveFloat = 300.0
    closeness: Share = 0.95
    photons: PositiveFloat = 30.0
    brightness_variation: Spread = 0.4
    faint_share: Share = 0.15
    faintest_contrast: NonNegativeFloat = 2.5
    texture: Spread = 0.4
    attenuation_um: PositiveFloat = 60.0
    background_photons: NonNegativeFloat = 2.5
    unevenness: Share = 0.4
    haze: Share = 0.1
    psf_um: Triple = (1.0, 0.3, 0.3)
    camera_gain: PositiveFloat = 4.0
    camera_offset: NonNegativeFloat = 100.0
    camera_noise: NonNegativeFloat = 3.0
    camera_bits: Annotated[int, Field(ge=8, le=16)] = 12
    debris: NonNegativeFloat = 2.0

    @field_validator("frames", mode="before")
    @classmethod
    def _one_number_is_a_list_of_one(cls, frames: object) -> object:
        return (frames,) if isinstance(frames, int) else frames

    @field_validator("embryos")
    @classmethod
    def _names_are_folders(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise ValueError(f"'{name}' is no folder name of letters, digits, '_', '-' and '.'")
        if len(set(names)) != len(names):
            raise ValueError("an embryo is named twice")
        return names

    @model_validator(mode="after")
    def _frames_fit_embryos(self) -> SimulateParams:
        if len(self.frames) not in (1, len(self.embryos)):
            raise ValueError(
                f"frames names {len(self.frames)} numbers for {len(self.embryos)} embryos; "
                "give one number for all, or one per embryo"
            )
        return self

    def frames_of(self, index: int) -> int:
        """Number of frames of the embryo at this position in `embryos`."""
        return self.frames[index] if len(self.frames) > 1 else self.frames[0]
