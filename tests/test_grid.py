"""Grids of voxels: nothing shifts, frames are normalised whole, outlines hold exactly their pixels."""

import cv2
import numpy as np
import pytest
import torch
from matplotlib.path import Path as Polygon
from numpy.typing import NDArray

from nuclei3d.grid import (
    isotropic_shape,
    resize_labels,
    resize_linear,
    resize_nearest,
    shift_labels,
    trace_outlines,
)
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import measure_noise, measure_range


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


def _embryo(noise: float, nuclei: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = rng.normal(100, noise, (20, 60, 60))
    image[5:15, 10:40, 10:40] += nuclei
    return image


def test_clear_nuclei_are_ranged_by_percentiles():
    image = _embryo(noise=2, nuclei=500)
    found = measure_range(image)
    low, high = np.percentile(image, [1, 99.8])
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-5)


def test_noise_is_estimated_within_five_percent_despite_nuclei():
    assert measure_noise(_embryo(noise=7, nuclei=300)) == pytest.approx(7, rel=0.05)


def test_a_frame_of_pure_noise_is_not_blown_up():
    found = measure_range(_embryo(noise=5, nuclei=0), noise_floor=10)
    normalised = found.apply(_embryo(noise=5, nuclei=0))
    assert normalised.std() == pytest.approx(0.1, rel=0.05)
    without = measure_range(_embryo(noise=5, nuclei=0), noise_floor=0)
    assert without.apply(_embryo(noise=5, nuclei=0)).std() > 0.18


def test_scale_and_offset_of_the_camera_do_not_matter():
    image = _embryo(noise=3, nuclei=40)
    once = measure_range(image).apply(image)
    again = measure_range(image * 7 + 1000).apply(image * 7 + 1000)
    np.testing.assert_allclose(once, again, atol=1e-4)


@pytest.mark.parametrize("value", [0, 65535])
def test_empty_and_saturated_volumes_become_zero(value):
    image = np.full((4, 16, 16), value, np.uint16)
    assert not measure_range(image).apply(image).any()


def test_one_tiny_bright_object_alone_is_seen():
    image = np.zeros((10, 50, 50), np.uint16)
    image[5, 25, 25:28] = 900
    assert measure_range(image).apply(image).max() == pytest.approx(1.0)


def test_a_block_is_normalised_as_the_whole():
    image = _embryo(noise=3, nuclei=40)
    found = measure_range(image)
    np.testing.assert_array_equal(found.apply(image[3:9, 5:20]), found.apply(image)[3:9, 5:20])


def test_big_volumes_are_sampled_and_agree():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 1000, (40, 700, 700)).astype(np.uint16)
    low, high = np.percentile(image, [1, 99.8])
    found = measure_range(image, noise_floor=0)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1.5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_counted_values_have_the_range_that_sorted_ones_have(dtype):
    image = np.random.default_rng(0).poisson(30, (5, 37, 41)).astype(dtype)
    counted, sorted_ = (
        measure_range(image, noise_floor=0),
        measure_range(image.astype(np.float64), noise_floor=0),
    )
    assert (counted.low, counted.high, counted.noise) == pytest.approx(
        (sorted_.low, sorted_.high, sorted_.noise)
    )


def painted(plane: np.ndarray) -> np.ndarray:
    """Fill the outlines, with matplotlib as a judge of what lies inside."""
    y, x = np.indices(plane.shape)
    centres = np.column_stack([x.ravel(), y.ravel()]) + 0.5
    again = np.zeros_like(plane)
    for label, polygon in trace_outlines(plane):
        inside = Polygon(polygon).contains_points(centres).reshape(plane.shape)
        assert not again[inside].any(), "two outlines share pixels"
        again[inside] = label
    return again


def test_outlines_give_the_labels_back() -> None:
    y, x = np.indices((40, 50))
    seeds = np.random.default_rng(0).uniform(0, 40, (12, 2))
    # cells of a Voronoi diagram touch each other and have no holes
    nearest = np.argmin([np.hypot(y - seed[0], x - seed[1]) for seed in seeds], axis=0)
    plane = np.where(nearest < 3, 0, nearest).astype(np.uint16)
    np.testing.assert_array_equal(painted(plane), plane)


def test_single_pixels_and_borders_are_kept() -> None:
    plane = np.zeros((6, 7), np.uint32)
    plane[0, 0] = 1
    plane[5, :] = 2
    plane[2, 3] = plane[3, 4] = 70000
    np.testing.assert_array_equal(painted(plane), plane)


def test_a_hole_is_filled_and_two_pieces_are_two_outlines() -> None:
    plane = np.zeros((7, 12), np.uint16)
    plane[1:6, 1:6] = 3
    plane[3, 3] = 0
    plane[2:4, 8:11] = 3
    outlines = trace_outlines(plane)
    assert [label for label, _ in outlines] == [3, 3]
    plane[3, 3] = 3
    np.testing.assert_array_equal(painted(plane), plane)


def test_an_empty_plane_has_none() -> None:
    assert trace_outlines(np.zeros((4, 4), np.uint16)) == []


def test_outlines_keep_numbers_of_any_size() -> None:
    plane = np.zeros((8, 9), np.uint32)
    plane[1:3, 1:4], plane[5:7, 5:8] = 7, 2**32 - 1
    assert [label for label, _ in trace_outlines(plane)] == [7, 2**32 - 1]
    full = np.full((4, 5), 10**9, np.uint32)
    assert [label for label, _ in trace_outlines(full)] == [10**9]


def test_larger_labels_take_what_trilinear_weights_favour() -> None:
    labels = np.zeros((1, 2, 2), np.uint32)
    labels[0, 0, 0], labels[0, 1, 1] = 7, 9
    assert resize_labels(labels, (1, 4, 4))[0].tolist() == [
        [7, 7, 0, 0],
        [7, 7, 0, 0],
        [0, 0, 9, 9],
        [0, 0, 9, 9],
    ]
    assert (resize_labels(labels, labels.shape) == labels).all()
    assert (
        resize_labels(np.full((3, 3, 3), 5, np.uint32), (2, 5, 1)).tolist() == np.full((2, 5, 1), 5).tolist()
    )


def test_balls_overlap_better_after_it_than_by_the_nearest_voxel() -> None:
    def ball(side: int) -> NDArray[np.uint32]:
        at = (np.indices((side, side, side)) + 0.5) / side - 0.5
        return (np.square(at).sum(0) < 0.4**2).astype(np.uint32)

    def iou(labels: NDArray[np.generic]) -> float:
        return float((labels * ball(24) > 0).sum() / ((labels + ball(24)) > 0).sum())

    small = ball(20)
    assert iou(resize_labels(small, (24, 24, 24))) > iou(resize_nearest(small, (24, 24, 24))) + 0.01


def draw_ellipsoids(offset_um=(0.0, 0.0, 0.0)):
    """Two nuclei that nearly touch, and one that the first plane cuts, in voxels of 1.75 x .8 x .8 um."""
    labels = np.zeros((18, 40, 30), np.uint32)
    places = np.stack(np.indices(labels.shape), -1) * VOXEL.zyx - offset_um
    for name, centre in ((7, (15, 8, 12)), (3, (15, 23, 12)), (9, (1, 15, 12))):
        labels[(((places - centre) / (6.0, 7.0, 6.5)) ** 2).sum(-1) < 1] = name
    return labels


VOXEL = VoxelSize(1.75, 0.8, 0.8)


@pytest.mark.parametrize("way", [(0.5, 0, 0), (-0.4, 0.3, -0.15), (0.9, 0.4, 0.4), (3.5, -1.6, 0.8)])
def test_labels_move_by_parts_of_a_voxel(way):
    moved, drawn, before = (
        shift_labels(draw_ellipsoids(), way, VOXEL),
        draw_ellipsoids(way),
        draw_ellipsoids(),
    )
    assert set(np.unique(moved)) == {0, 3, 7, 9}
    for name in (3, 7, 9):
        own, true = moved == name, drawn == name
        assert (own & true).sum() / (own | true).sum() > (0.8 if name == 9 else 0.93)
    for name in (3, 7):
        gone = np.argwhere(moved == name).mean(0) - np.argwhere(before == name).mean(0)
        assert gone * VOXEL.zyx == pytest.approx(way, abs=0.25)
        assert (moved == name).sum() == pytest.approx((before == name).sum(), rel=0.01)


def test_what_moves_out_is_gone_and_what_is_empty_stays_so():
    labels = draw_ellipsoids()
    assert set(np.unique(shift_labels(labels, (-12.0, 0, 0), VOXEL))) == {0, 3, 7}
    np.testing.assert_array_equal(shift_labels(labels * 0, (1, 1, 1), VOXEL), 0)
    plane = np.zeros((7, 12, 12), np.uint32)
    plane[3, 3:9, 3:9] = 5
    assert (shift_labels(plane, (0.8, 0, 0), VOXEL) == 5).sum() == pytest.approx(36, abs=2)
