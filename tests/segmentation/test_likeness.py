"""A volume that is unlike the training is said, with the parameter that mends it."""

import numpy as np
import pytest

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import IntensityRange
from nuclei3d.networks.folder import ModelInfo, TrainingRange
from nuclei3d.segmentation.likeness import find_unlikeness

TRAINING = TrainingRange(
    diameter_um=(8.0, 12.0), voxel_x_um=(0.3, 0.4), anisotropy=(4.0, 6.0), range_over_noise=(22.0, 30.0)
)
VOXEL = VoxelSize(2.0, 0.35, 0.35)
BALLS = np.full(9, np.pi / 6 * 10.0**3)


def said(volumes_um3: np.ndarray = BALLS, voxel_size: VoxelSize = VOXEL, span: float = 25.0) -> list[str]:  # type: ignore[type-arg]
    return find_unlikeness(volumes_um3, voxel_size, 10.0, TRAINING, IntensityRange(100.0, 100 + span, 1.0))


def test_what_is_like_the_training_is_not_said() -> None:
    assert said() == []
    assert find_unlikeness(BALLS, VoxelSize(9, 0.1, 0.1), 10.0) == []  # an older model does not say


@pytest.mark.parametrize(
    ("change", "words", "parameter"),
    [
        ({"volumes_um3": BALLS[:0]}, "no nucleus was found", "predict.diameter_um"),
        ({"volumes_um3": BALLS / 10}, "0.1 of the volume", "predict.diameter_um"),
        ({"voxel_size": VoxelSize(4.0, 0.8, 0.85)}, "voxel edge 0.85 um in x", "data.voxel_size_um"),
        ({"voxel_size": VoxelSize(0.35, 0.35, 0.35)}, "anisotropy 1,", "data.voxel_size_um"),
        ({"span": 10.0}, "span 10 times the noise, in the training 22 to 30", "data.channel"),
        ({"span": 80.0}, "span 80 times the noise", "data.channel"),
    ],
)
def test_what_is_not_is_said_with_its_parameter(change: dict, words: str, parameter: str) -> None:  # type: ignore[type-arg]
    (warning,) = said(**change)
    assert words in warning
    assert parameter in warning


def test_voxels_in_the_order_x_y_z_are_recognised() -> None:
    assert "order x, y, z" in said(voxel_size=VoxelSize(0.35, 0.35, 2.0))[0]


def test_the_range_of_the_training_is_kept_in_model_json() -> None:
    info = ModelInfo(diameter_px=30, training=TRAINING)
    assert ModelInfo.model_validate_json(info.model_dump_json()).training == TRAINING
    assert ModelInfo.model_validate_json('{"diameter_px": 30}').training is None
