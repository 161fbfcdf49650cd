"""What is no image (fill, debris) does not move the range that a network sees."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from nuclei3d.intensity import measure_range


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
    assert found.without_fill(image) == (image, None)


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
    filled, outside = found.without_fill(image)
    between = np.rint((image[1, 3:].astype(float) + image[3, 3:]) / 2)
    assert np.array_equal(filled[2, 3:], between)
    assert (filled[0, :3] == round(found.low)).all()
    assert outside is not None
    assert outside[:, :3].all()
    assert not outside[:, 3:].any()


@pytest.mark.parametrize("share", [0.004, 0.01])
def test_debris_twenty_times_brighter_leaves_the_range_to_the_nuclei(share: float) -> None:
    image = filmed()
    wanted = measure_range(image)
    rng = np.random.default_rng(3)
    dirty = image.astype(np.float32)
    dirty.flat[rng.choice(image.size, int(share * image.size), replace=False)] = 20 * wanted.high
    found = measure_range(dirty)
    assert found.high == pytest.approx(wanted.high, rel=0.25)
    assert found.ceiling is not None
    assert found.apply(dirty).max() < 15


def test_an_image_of_nothing_but_fill_has_a_range() -> None:
    found = measure_range(np.full((3, 8, 8), np.nan, np.float32))
    assert (found.low, found.high) == (0, 1)
