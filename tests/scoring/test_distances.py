"""Distances of centres and surfaces agree with what geometry says, in micrometres."""

import numpy as np
import pytest

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.distances import centroids_um, surface_distances_um


def test_centroids_are_those_of_scipy() -> None:
    from scipy.ndimage import center_of_mass

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, (7, 8, 9)).astype(np.uint32)
    size = VoxelSize(2.0, 0.5, 0.25)
    expected = np.array(center_of_mass(labels > 0, labels, [1, 3, 5])) * size.zyx
    np.testing.assert_allclose(centroids_um(labels, np.array([1, 3, 5]), size), expected)
    assert np.isnan(centroids_um(labels, np.array([9]), size)).all()


@pytest.mark.parametrize("size", [VoxelSize(0.5, 0.5, 0.5), VoxelSize(1.0, 0.25, 0.25)])
def test_concentric_balls_are_apart_by_the_difference_of_their_radii(size: VoxelSize) -> None:
    shape = tuple(round(24 / edge) for edge in size.zyx)
    grid = np.meshgrid(*(np.arange(n) * e for n, e in zip(shape, size.zyx, strict=True)), indexing="ij")
    radius = np.sqrt(sum((axis - 12) ** 2 for axis in grid))
    inner, outer = (radius <= 6).astype(np.uint16), 7 * (radius <= 8).astype(np.uint16)
    (distance,) = surface_distances_um(inner, outer, np.array([[1, 7]]), size)
    assert distance == pytest.approx(2, abs=0.25)
    assert surface_distances_um(inner, inner, np.array([[1, 1]]), size) == 0


def test_a_nucleus_cut_by_the_border_has_a_surface_there() -> None:
    labels = np.ones((3, 3, 3), dtype=np.uint8)
    labels[2] = 2
    assert surface_distances_um(labels, labels, np.array([[1, 1], [2, 2]]), VoxelSize(1, 1, 1)).tolist() == [
        0,
        0,
    ]
