import cv2
import numpy as np
import pytest
import torch

from nuclei3d.grid import isotropic_shape, resize_linear, resize_nearest
from nuclei3d.images.voxel_size import VoxelSize


def test_isotropic_shape_covers_the_same_box():
    assert isotropic_shape((97, 100, 40), VoxelSize(2.0, 0.174, 0.348), 0.348) == (557, 50, 40)


def test_upsampling_equals_opencv_in_a_plane():
    plane = np.random.default_rng(0).normal(size=(13, 22)).astype(np.float32)
    expected = cv2.resize(plane, (59, 31), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(resize_linear(plane, (31, 59)), expected, atol=1e-4)


def test_upsampling_equals_torch_in_a_volume():
    volume = np.random.default_rng(1).normal(size=(5, 8, 9)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(volume)[None, None], size=(29, 8, 12), mode="trilinear", align_corners=False
    )
    np.testing.assert_allclose(resize_linear(volume, (29, 8, 12)), expected[0, 0].numpy(), atol=1e-5)


def test_halving_is_the_mean_of_eight():
    volume = np.random.default_rng(2).integers(0, 65535, (4, 6, 8)).astype(np.uint16)
    expected = volume.reshape(2, 2, 3, 2, 4, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(resize_linear(volume, (2, 3, 4)), expected, rtol=1e-6)


@pytest.mark.parametrize("new", [1, 2, 3, 5, 7, 10])
def test_shrinking_keeps_the_sum_of_intensity(new):
    line = np.random.default_rng(3).random(10)
    assert resize_linear(line, (new,)).mean() == pytest.approx(line.mean(), rel=1e-6)


@pytest.mark.parametrize("shape", [(6, 10, 30), (24, 3, 7), (1, 1, 1)])
def test_a_constant_stays_constant(shape):
    np.testing.assert_allclose(resize_linear(np.full((12, 5, 14), 7.5), shape), 7.5, rtol=1e-6)


def test_a_ramp_stays_in_place():
    """Voxel centres in box coordinates: nothing shifts, whichever way the grid changes."""
    ramp = (np.arange(60) + 0.5) / 60
    for size in (24, 133):
        expected = (np.arange(size) + 0.5) / size
        np.testing.assert_allclose(resize_linear(ramp, (size,))[3:-3], expected[3:-3], atol=1e-3)


def test_nearest_takes_the_voxel_at_the_centre():
    labels = np.arange(4, dtype=np.uint32)
    assert resize_nearest(labels, (8,)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert resize_nearest(labels, (2,)).tolist() == [1, 3]
    assert resize_nearest(labels, (5,)).tolist() == [0, 1, 2, 2, 3]


def test_nearest_makes_no_new_labels_and_keeps_dtype():
    labels = np.random.default_rng(4).integers(0, 70000, (3, 9, 9)).astype(np.uint32)
    resized = resize_nearest(labels, (17, 5, 9))
    assert resized.dtype == np.uint32
    assert set(np.unique(resized)) <= set(np.unique(labels))


def test_results_are_copies():
    labels = np.zeros((2, 2), np.uint16)
    resize_nearest(labels, (2, 2))[:] = 1
    volume = np.zeros((2, 2), np.float32)
    resize_linear(volume, (2, 2))[:] = 1
    assert labels.sum() == 0
    assert volume.sum() == 0
