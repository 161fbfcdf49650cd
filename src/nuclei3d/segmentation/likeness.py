"""Whether a volume, and what was found in it, is like what a model was trained on.

A network that sees other nuclei, voxels or noise than in its training fails without a word: these are the
words, each with the parameter that mends it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import IntensityRange

if TYPE_CHECKING:
    from nuclei3d.networks.folder import TrainingRange

#: Nuclei whose median diameter is further than this factor from the expected (in volume .2 and 5).
_DIAMETER_RATIO = 1.7
_FEWEST_NUCLEI = 3
_VOXEL_RATIO = 2.0
_NOISE_RATIO = 2.0
_OF_NUCLEI = ("no nucleus was found", "the nuclei found measure")


def find_unlikeness(
    volumes_um3: NDArray[np.floating[Any]],
    voxel_size: VoxelSize,
    nucleus_diameter_um: float,
    training: TrainingRange | None = None,
    intensity: IntensityRange | None = None,
) -> list[str]:
    """Say in what a volume, its intensities and the nuclei found in it are unlike the training.

    `volumes_um3` are those of the nuclei found, `nucleus_diameter_um` is as the network was told. Voxels and
    intensities are not compared without `training`, of models that do not say it, intensities not without
    `intensity`.
    """
    found: list[str] = []
    if voxel_size.looks_reversed:
        found.append(
            f"voxels of {voxel_size} are flatter than wide, as in the order x, y, z (data.voxel_size_um "
            f"takes z, y, x)"
        )
    if training is not None:
        found += _compare_voxels(voxel_size, training)
        if intensity is not None and intensity.noise > 0:
            ratio = (intensity.high - intensity.low) / intensity.noise
            low, high = training.range_over_noise
            if ratio < low / _NOISE_RATIO or ratio > high * _NOISE_RATIO:
                found.append(
                    f"intensities span {ratio:.3g} times the noise, in the training {low:.3g} to {high:.3g}: "
                    "another channel (data.channel), or train on such frames"
                )
    return found + compare_nuclei(volumes_um3, nucleus_diameter_um)


def compare_nuclei(volumes_um3: NDArray[np.floating[Any]], nucleus_diameter_um: float) -> list[str]:
    """Say in what nuclei, by their volumes, are unlike those that were expected."""
    if not len(volumes_um3):
        return [
            f"{_OF_NUCLEI[0]}, where nuclei of {nucleus_diameter_um:.3g} um were expected: check "
            "predict.diameter_um, data.voxel_size_um and data.channel, or lower "
            "predict.cellprob_threshold"
        ]
    if len(volumes_um3) >= _FEWEST_NUCLEI:
        diameter_um = float((6 / np.pi * np.median(volumes_um3)) ** (1 / 3))
        ratio = diameter_um / nucleus_diameter_um
        if not 1 / _DIAMETER_RATIO <= ratio <= _DIAMETER_RATIO:
            return [
                f"{_OF_NUCLEI[1]} {diameter_um:.3g} um in the median, {ratio**3:.2g} of the volume "
                f"of the {nucleus_diameter_um:.3g} um that were expected: check predict.diameter_um and "
                "data.voxel_size_um"
            ]
    return []


def with_nuclei(
    unlike: Iterable[str], volumes_um3: NDArray[np.floating[Any]], nucleus_diameter_um: float
) -> tuple[str, ...]:
    """Give what was said of a volume, with what it says of nuclei said anew of others found in it."""
    others = (line for line in unlike if not line.startswith(_OF_NUCLEI))
    return *others, *compare_nuclei(volumes_um3, nucleus_diameter_um)


def _compare_voxels(voxel_size: VoxelSize, training: TrainingRange) -> list[str]:
    found = []
    for kind, value, (low, high), unit in (
        ("voxel edge", voxel_size.x, training.voxel_x_um, " um in x"),
        ("anisotropy", voxel_size.anisotropy, training.anisotropy, ""),
    ):
        if not low / _VOXEL_RATIO <= value <= high * _VOXEL_RATIO:
            trained = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
            found.append(
                f"{kind} {value:.3g}{unit}, in the training {trained}: check data.voxel_size_um, or train "
                "on such frames"
            )
    return found
