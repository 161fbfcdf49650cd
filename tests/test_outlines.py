"""Outlines hold exactly the pixels of their labels."""

import numpy as np
from matplotlib.path import Path as Polygon

from nuclei3d.grid import trace_outlines


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
