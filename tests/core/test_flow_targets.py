"""Flow targets against Cellpose's own targets, closed forms and a direct sparse solver."""

import numpy as np
import pytest
from numpy.typing import NDArray

from nuclei3d.core.flow_targets import flows_2d
from nuclei3d.errors import InputError


def ellipse(shape: tuple[int, ...], centre: tuple[float, ...], radii: tuple[float, ...]) -> NDArray[np.bool_]:
    """Voxels of an ellipsoid (any number of axes); centre and radii in voxels."""
    grids = np.indices(shape)
    parts = zip(grids, centre, radii, strict=True)
    return np.asarray(sum(((grid - c) / r) ** 2 for grid, c, r in parts) < 1)


def test_flows_2d_equal_cellpose_targets_inside_separate_nuclei() -> None:
    from cellpose.dynamics import masks_to_flows

    rng = np.random.default_rng(3)
    labels = np.zeros((120, 160), np.int64)
    for row in range(3):
        for column in range(4):
            centre = (20 + 40 * row + rng.uniform(-2, 2), 20 + 40 * column + rng.uniform(-2, 2))
            labels[ellipse(labels.shape, centre, tuple(rng.uniform(6, 16, 2)))] = row * 4 + column + 1
    flows = flows_2d(labels)
    cosine = (flows * masks_to_flows(labels)).sum(0)[labels > 0]
    # The centre of a symmetric nucleus has no direction: both give 0 there.
    assert cosine.mean() > 0.99
    assert np.mean(cosine < 0.99) < 0.002


def test_flows_2d_of_a_disc_point_to_its_centre() -> None:
    labels = ellipse((41, 41), (20, 20), (17.2, 17.2)).astype(np.uint16)
    flows = flows_2d(labels)
    dy, dx = 20 - np.indices(labels.shape)
    away = (labels > 0) & (np.hypot(dy, dx) > 3)
    cosine = ((flows[0] * dy + flows[1] * dx) / np.maximum(np.hypot(dy, dx), 1e-9))[away]
    # Single pixels that stick out of the rasterised rim turn along it.
    assert cosine.min() > 0.9
    assert cosine.mean() > 0.99
    assert np.allclose(np.hypot(*flows)[away], 1, atol=1e-5)
    assert not flows[:, labels == 0].any()


def test_flows_2d_of_touching_nuclei_do_not_feel_each_other() -> None:
    both = np.zeros((30, 40), np.int32)
    both[5:25, 4:20] = 7
    both[5:25, 20:33] = 900
    alone = np.where(both == 7, 1, 0)
    assert np.array_equal(flows_2d(both)[:, both == 7], flows_2d(alone)[:, both == 7])


def test_flows_2d_of_a_split_label_lead_each_piece_to_its_own_centre() -> None:
    labels = np.zeros((20, 50), np.int32)
    labels[4:15, 4:15] = 5
    labels[4:15, 30:41] = 5
    flows = flows_2d(labels)
    assert np.allclose(flows[1, 4:15, 4:9], flows[1, 4:15, 30:35])
    assert flows[1, 9, 5] > 0.99
    assert flows[1, 9, 39] < -0.99


def test_flows_2d_of_one_pixel_and_of_nothing_are_zero() -> None:
    labels = np.zeros((5, 6), np.uint32)
    assert not flows_2d(labels).any()
    labels[0, 5] = 4_000_000_000
    assert not flows_2d(labels).any()
    assert flows_2d(labels).shape == (2, 5, 6)


def test_flows_2d_reach_the_ends_of_a_long_thin_nucleus() -> None:
    labels = np.zeros((7, 200), np.int32)
    labels[2:5, 3:197] = 1
    flows = flows_2d(labels)
    assert np.allclose(np.hypot(*flows)[3, 3:99], 1, atol=1e-4)
    assert (flows[1, 3, 4:99] > 0.99).all()
    assert (flows[1, 3, 102:196] < -0.99).all()


@pytest.mark.parametrize("labels", [np.zeros((4, 4, 4), np.int32), np.zeros((4, 4), np.float32)])
def test_flows_2d_refuse_what_is_no_labelled_plane(labels: NDArray[np.generic]) -> None:
    with pytest.raises(InputError, match="flow targets"):
        flows_2d(labels)  # type: ignore[arg-type]
