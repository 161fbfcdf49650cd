"""How both kinds of data set begin: a labelled frame is read, freed of debris, its nuclei are measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.core.normalization import IntensityRange, measure_range
from nuclei3d.core.scoring.contrast import nucleus_contrast
from nuclei3d.core.slicing import drop_small_labels, nucleus_volumes_um3
from nuclei3d.volumes.embryos import EmbryoFrame, LabelledVolume, read_labelled

Record = TypeVar("Record")


@dataclass(frozen=True)
class PreparedFrame(Generic[Record]):
    """What one frame gave besides its files.

    Attributes
    ----------
    records
        Its rows of manifest.csv.
    voxel_um
        Edge of a pixel in x and y, as stored.
    volumes_um3, contrasts
        Of its nuclei in 3D; a contrast may be nan.
    labels_left_out
        How many were too small.
    """

    records: tuple[Record, ...]
    voxel_um: float
    volumes_um3: tuple[float, ...]
    contrasts: tuple[float, ...]
    labels_left_out: int


@dataclass(frozen=True)
class MeasuredFrame:
    """A frame with what is known of its nuclei.

    Attributes
    ----------
    volume
        Without the labels that are too small.
    intensity
        What is 0 and 1 in normalised intensities.
    volumes_um3
        Volume by label.
    contrasts
        float64 (largest label + 1,); nan where there is none.
    labels_left_out
        How many were too small.
    """

    volume: LabelledVolume
    intensity: IntensityRange
    volumes_um3: dict[int, float]
    contrasts: NDArray[np.float64]
    labels_left_out: int

    def faintest(self, labels: NDArray[np.integer[Any]]) -> float:
        """Give the lowest contrast among some labels, as the manifest has it; nan if none is known."""
        known = self.contrasts[labels]
        known = known[np.isfinite(known)]
        return round(float(known.min()), 4) if len(known) else float("nan")

    def figures(self) -> tuple[tuple[float, ...], tuple[float, ...], int]:
        """Give volumes and contrasts of the nuclei and the labels left out, as in `PreparedFrame`."""
        contrasts = tuple(float(self.contrasts[label]) for label in self.volumes_um3)
        return tuple(self.volumes_um3.values()), contrasts, self.labels_left_out


def measure_frame(frame: EmbryoFrame, params: Params) -> MeasuredFrame:
    """Read a frame, drop its labels below prepare.min_volume_um3 and measure the others."""
    volume = read_labelled(frame, params.data)
    norm = params.normalization
    intensity = measure_range(volume.image, norm.lower_percentile, norm.upper_percentile, norm.noise_floor)
    kept, dropped = drop_small_labels(volume.labels, volume.voxel_size, params.prepare.min_volume_um3)
    return MeasuredFrame(
        replace(volume, labels=kept.astype(np.uint32, copy=False)),
        intensity,
        nucleus_volumes_um3(kept, volume.voxel_size),
        nucleus_contrast(volume.image, kept, volume.voxel_size),
        dropped,
    )
