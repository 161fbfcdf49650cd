import numpy as np
import pytest

from nuclei3d.grid import measure_noise, measure_range


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
