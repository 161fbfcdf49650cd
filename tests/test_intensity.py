"""What is no image (fill, debris) does not move the range that a network sees."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from nuclei3d.intensity import measure_range, sampled_planes


def filmed(shape: tuple[int, int, int] = (12, 48, 40)) -> NDArray[np.uint16]:
    """A camera's image: offset 100, noise 5, a few bright bodies."""
    rng = np.random.default_rng(5)
    image = rng.normal(100, 5, shape)
    for z, y, x in rng.uniform(4, np.array(shape) - 4, (8, 3)).astype(int):
        image[z - 2 : z + 3, y - 4 : y + 4, x - 4 : x + 4] += 150
    return np.clip(image, 0, None).astype(np.uint16)


def padded(image: NDArray[np.uint16], edge: int) -> NDArray[np.uint16]:
    return np.pad(image, ((0, 0), (edge, edge), (edge, edge)))


def sheared(image: NDArray[np.uint16]) -> NDArray[np.uint16]:
    result = np.zeros((*image.shape[:2], image.shape[2] + len(image)), image.dtype)
    for z, plane in enumerate(image):
        result[z, :, z : z + image.shape[2]] = plane
    return result


def one_column_gone(image: NDArray[np.uint16]) -> NDArray[np.uint16]:
    return np.concatenate([np.zeros_like(image[..., :1]), image[..., :-1]], axis=2)


def drifted_by_half_a_pixel(image: NDArray[np.uint16]) -> NDArray[np.uint16]:
    before = np.concatenate([np.zeros_like(image[..., :2]), image[..., :-2]], axis=2)
    after = np.concatenate([np.zeros_like(image[..., :3]), image[..., :-3]], axis=2)
    return (before // 2 + after // 2).astype(np.uint16)


def one_plane_black(image: NDArray[np.uint16]) -> NDArray[np.uint16]:
    return np.where(np.arange(len(image))[:, None, None] == 5, 0, image).astype(np.uint16)


@pytest.mark.parametrize(
    "leave_fill",
    [
        lambda image: padded(image, 8),
        lambda image: padded(image, 40),
        sheared,
        one_column_gone,
        one_plane_black,
        lambda image: np.where(padded(image, 8) == 0, np.nan, padded(image, 8)),
    ],
    ids=["padded", "padded widely", "deskewed", "one column", "one plane", "not a number"],
)
def test_fill_does_not_move_the_range(leave_fill: Callable[..., NDArray[np.generic]]) -> None:
    image = filmed()
    wanted, found = measure_range(image), measure_range(leave_fill(image))
    assert found.low == pytest.approx(wanted.low, abs=1)
    assert found.high == pytest.approx(wanted.high, rel=0.02)
    assert found.noise == pytest.approx(wanted.noise, rel=0.1)


def test_the_edge_that_interpolation_leaves_is_fill() -> None:
    image = drifted_by_half_a_pixel(filmed())
    mask = measure_range(image).fill_mask(image)
    assert mask is not None
    assert mask[..., :3].all()
    assert not mask[..., 3:].any()


def test_an_image_without_fill_is_given_as_it_is() -> None:
    image = filmed()
    found = measure_range(image)
    assert (found.fill, found.ceiling) == (None, None)
    assert found.clean(image) == (image, None)


def test_background_cut_at_zero_is_no_fill() -> None:
    rng = np.random.default_rng(2)
    image = np.clip(rng.normal(0, 3, (8, 64, 64)), 0, None).astype(np.uint8)
    assert measure_range(image).fill is None


def test_a_black_plane_is_bridged_and_a_border_becomes_background() -> None:
    image = np.full((5, 16, 16), 100, np.uint16) + np.random.default_rng(0).integers(0, 20, (5, 16, 16))
    image = image.astype(np.uint16)
    image[1] += 40
    image[2] = 0
    image[:, :3] = 0
    found = measure_range(image)
    filled, outside = found.clean(image)
    between = np.rint((image[1, 3:].astype(float) + image[3, 3:]) / 2)
    assert np.array_equal(filled[2, 3:], between)
    assert (filled[0, :3] == round(found.low)).all()
    assert outside is not None
    assert outside[:, :3].all()
    assert not outside[:, 3:].any()


@pytest.mark.parametrize("share", [0.004, 0.01])
@pytest.mark.parametrize("clump", [(1, 1, 1), (1, 2, 3), (2, 3, 3)])
def test_debris_twenty_times_brighter_is_taken_out(share: float, clump: tuple[int, int, int]) -> None:
    image = filmed()
    wanted = measure_range(image)
    rng = np.random.default_rng(3)
    seeds = np.zeros(image.shape, bool)
    seeds.flat[rng.choice(image.size, int(share * image.size / np.prod(clump)), replace=False)] = True
    debris = binary_dilation(seeds, np.ones(clump))
    dirty = np.where(debris, 20 * wanted.high, image).astype(np.uint16)
    found = measure_range(dirty)
    assert found.high == pytest.approx(wanted.high, rel=0.1)
    cleaned, outside = found.clean(dirty)
    assert outside is None
    assert cleaned.max() < 1.5 * wanted.high
    assert np.array_equal(cleaned[~debris], dirty[~debris])


def test_hot_pixels_go_and_nuclei_stay() -> None:
    image = filmed()
    hot = np.random.default_rng(1).choice(image.size, 20, replace=False)
    dirty = image.copy()
    dirty.flat[hot] = 4095
    cleaned, _ = measure_range(dirty).clean(dirty)
    assert cleaned.max() < image.max() + 20
    assert np.count_nonzero(cleaned != image) <= len(hot)


def test_debris_beside_fill_that_is_no_number_is_taken_out() -> None:
    image = padded(filmed(), 8).astype(np.float32)
    image[image == 0] = np.nan
    image[5, 20, 20:22] = 20_000
    cleaned, outside = measure_range(image).clean(image)
    assert outside is not None
    assert np.isfinite(cleaned).all()
    assert cleaned.max() < 1000


@pytest.mark.parametrize("percentile", [95.0, 98.0])
def test_a_saturated_camera_keeps_about_the_range_of_one_that_is_not(percentile: float) -> None:
    rng = np.random.default_rng(4)
    image = rng.normal(100, 5, (12, 64, 64)) + rng.exponential(30, (12, 64, 64))
    wanted = measure_range(image.astype(np.uint16))
    cut = np.minimum(image, np.percentile(image, percentile)).astype(np.uint16)
    assert measure_range(cut).high == pytest.approx(wanted.high, rel=0.15)


@pytest.mark.parametrize("uneven", ["step", "slope"])
@pytest.mark.parametrize("edge", [0, 8])
def test_an_uneven_background_is_evened_out(uneven: str, edge: int) -> None:
    image = filmed((12, 64, 64))
    added = np.zeros(64) + 40 * (np.arange(64) >= 32) if uneven == "step" else np.linspace(0, 60, 64)
    dirty = padded((image + added).astype(np.uint16), edge)
    found = measure_range(dirty)
    cleaned, _ = found.clean(dirty)
    middle = cleaned[:, edge : edge + 64, edge : edge + 64]
    darkest = np.percentile(middle, 20, axis=(0, 1))
    assert np.ptp(darkest) < 12
    nuclei = image > 200
    lifted = middle[nuclei].mean() - np.median(middle[~nuclei])
    assert lifted == pytest.approx(image[nuclei].mean() - np.median(image[~nuclei]), rel=0.1)


def test_a_part_is_cleaned_as_the_whole_is() -> None:
    image = filmed((12, 64, 64))
    image[..., 32:] += 40
    found = measure_range(image)
    assert found.background is not None
    part = np.s_[10:50, 20:60]
    whole, _ = found.clean(image)
    assert np.array_equal(found.of_part(*part).clean(image[:, *part])[0], whole[:, *part])


def test_an_even_background_is_left_alone_where_nuclei_fill_all_planes() -> None:
    image = filmed((12, 64, 64))
    image[:, 20:44, 20:44] += 150
    assert measure_range(image).background is None


def test_an_image_of_nothing_but_fill_has_a_range() -> None:
    found = measure_range(np.full((3, 8, 8), np.nan, np.float32))
    assert (found.low, found.high) == (0, 1)


def test_the_range_of_large_planes_is_not_that_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(100, 4, (40, 64, 64))
    y, x = np.mgrid[:64, :64]
    disc = ((y % 32 - 16) ** 2 + (x % 32 - 16) ** 2) < 81
    image[8:32] += 200 * disc
    image = image.astype(np.uint16)
    whole = measure_range(image)
    monkeypatch.setattr("nuclei3d.intensity._MAX_SAMPLES", 2 * 64 * 64)
    monkeypatch.setattr("nuclei3d.intensity._MOST_TOLD_BY", 64 * 64)
    assert list(sampled_planes(image.shape)) == [0, 10, 20, 30]
    found = measure_range(image)
    assert found.ceiling is None
    assert (found.low, found.high) == pytest.approx((whole.low, whole.high), rel=0.02)
