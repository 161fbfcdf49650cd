"""Pictures of frames: what lies where, however the volume was read."""

import numpy as np
import pytest

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.report.projections import PictureGrid, coarse_labels, project_image, silhouettes

SIZE = VoxelSize(2.0, 0.5, 0.5)
SHAPE = (10, 40, 60)
WHOLE = (slice(0, 10), slice(0, 40), slice(0, 60))
# a nucleus: planes 2 to 4, rows 10 to 19, columns 30 to 49
INSIDE = (slice(2, 5), slice(10, 20), slice(30, 50))


def parts(volume: np.ndarray) -> list[tuple[tuple[slice, ...], np.ndarray]]:
    boxes = [
        (slice(z, z + 5), slice(y, y + 16 if y == 0 else 40), slice(x, x + 30))
        for z in (0, 5)
        for y in (0, 16)
        for x in (0, 30)
    ]
    return [(box, volume[box]) for box in boxes]


def test_a_picture_has_the_pixels_of_the_image_where_there_is_room() -> None:
    grid = PictureGrid.fitting(SHAPE, SIZE, 1e6)
    assert grid.px_um == 0.5
    assert grid.size == (40, 40, 60)
    assert grid.coarse == SHAPE
    # a quarter of (60 + 40) x (40 + 40) pixels: twice as large
    assert PictureGrid.fitting(SHAPE, SIZE, 2000).size == (20, 20, 30)


def test_a_nucleus_shines_in_three_views_and_its_silhouettes_lie_around_it() -> None:
    image = np.zeros(SHAPE, np.uint16)
    image[INSIDE] = 1000
    labels = np.where(image > 0, 7, 0).astype(np.uint32)
    grid = PictureGrid.fitting(SHAPE, SIZE, 1e6)
    picture = project_image(grid, [(WHOLE, image)])
    assert picture.shape == (40 + 4 + 40, 60 + 4 + 40)
    assert (picture[10:20, 30:50] == 255).all()
    assert picture[:40, :60].sum() == 255 * 10 * 20
    # z is interpolated: planes 2 to 4 are rows 8 to 19
    assert (picture[10:20, 64 + 10 : 64 + 18] == 255).all()
    assert (picture[44 + 10 : 44 + 18, 30:50] == 255).all()
    assert not picture[44:, 60:].any()
    [outlines] = silhouettes(grid, coarse_labels(grid, [(WHOLE, labels)]), [7])
    boxes = [(*polygon.min(axis=0), *polygon.max(axis=0)) for polygon in outlines]
    # left, top, right, bottom; across a plane a pixel of the picture is a quarter of it
    assert boxes[0] == (30, 10, 50, 20)
    assert boxes[1] == pytest.approx((64 + 8, 10, 64 + 20, 20), abs=2)
    assert boxes[2] == pytest.approx((30, 44 + 8, 50, 44 + 20), abs=2)


def test_a_volume_in_parts_gives_the_same_picture() -> None:
    rng = np.random.default_rng(0)
    image = rng.poisson(100, SHAPE).astype(np.float32)
    labels = rng.integers(0, 5, SHAPE).astype(np.uint32)
    grid = PictureGrid.fitting(SHAPE, SIZE, 3000)
    whole = project_image(grid, [(WHOLE, image)])
    np.testing.assert_array_equal(project_image(grid, parts(image)), whole)
    expected = coarse_labels(grid, [(WHOLE, labels)])
    np.testing.assert_array_equal(coarse_labels(grid, parts(labels)), expected)
    assert expected.shape == grid.coarse < SHAPE


def test_what_is_no_number_is_not_seen() -> None:
    image = np.full(SHAPE, 5, np.float32)
    image[INSIDE] = 9
    grid = PictureGrid.fitting(SHAPE, SIZE, 1e6)
    clear = project_image(grid, [(WHOLE, image)])
    image[0, :5], image[9, 35:] = np.nan, np.inf
    np.testing.assert_array_equal(project_image(grid, [(WHOLE, image)]), clear)


def test_a_label_that_is_not_there_has_no_outline() -> None:
    grid = PictureGrid.fitting(SHAPE, SIZE, 1e6)
    outlines = silhouettes(grid, np.zeros(grid.coarse, np.uint32), [1, 70])
    assert [len(polygon) for views in outlines for polygon in views] == [0] * 6
