"""Stitching: truth relabelled plane by plane comes back, also with a plane missing."""

import numpy as np
import pytest
from skimage.measure import label as label_pieces

from nuclei3d.segmentation.stitching import stitch_planes
from oracle_network import ball_labels


def balls(
    shape: tuple[int, int, int], centres: list[tuple[float, float, float]], radius: float
) -> np.ndarray:
    """Give balls around voxels that are 2 x 1 x 1 um; voxel 0 lies at 0."""
    return ball_labels(shape, np.add(centres, (1, 0.5, 0.5)), np.full(len(centres), radius), (2, 1, 1))


def planewise(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Give every plane its own, shuffled numbers."""
    rng = np.random.default_rng(seed)
    planes = np.zeros_like(labels)
    for z, plane in enumerate(labels):
        names = rng.permutation(int(labels.max()) + 1) + 1
        planes[z] = np.where(plane > 0, names[plane], 0)
    return planes


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    pairs = np.unique(np.stack([first.ravel(), second.ravel()]), axis=1)
    return all(len(np.unique(row)) == len(row) for row in pairs)


def assert_each_label_is_one_piece(labels: np.ndarray) -> None:
    for number in np.unique(labels[labels > 0]):
        assert label_pieces(labels == number, connectivity=1).max() == 1


CENTRES = [(12, 14, 14), (14, 14, 33), (16, 34, 16), (10, 36, 36), (38, 15, 15), (39, 30, 34)]


@pytest.fixture
def truth() -> np.ndarray:
    return balls((27, 50, 50), CENTRES, 10.5)


def test_touching_nuclei_come_back_from_planewise_masks(truth) -> None:
    stitched = stitch_planes(planewise(truth), min_iou=0.25)
    assert same_partition(stitched, truth)
    assert set(np.unique(stitched)) == set(range(len(CENTRES) + 1))


def test_a_missing_plane_is_bridged_and_filled(truth) -> None:
    planes = planewise(truth)
    planes[6][truth[6] == 2] = 0
    stitched = stitch_planes(planes)
    number = stitched[5][truth[5] == 2][0]
    assert set(stitched[7][truth[7] == 2]) == {number}
    filled, expected = stitched[6] == number, truth[6] == 2
    assert (filled & expected).sum() / (filled | expected).sum() > 0.85
    assert_each_label_is_one_piece(stitched)
    assert len(np.unique(stitched)) - 1 == len(CENTRES)


def test_without_tolerance_a_missing_plane_splits_the_nucleus(truth) -> None:
    planes = planewise(truth)
    planes[6][truth[6] == 2] = 0
    stitched = stitch_planes(planes, max_gap=0)
    assert set(stitched[5][truth[5] == 2]).isdisjoint(stitched[7][truth[7] == 2])
    assert_each_label_is_one_piece(stitched)


def test_two_missing_planes_need_a_gap_of_two(truth) -> None:
    planes = planewise(truth)
    planes[6:8][truth[6:8] == 2] = 0
    assert len(np.unique(stitch_planes(planes, max_gap=1))) - 1 == len(CENTRES) + 1
    bridged = stitch_planes(planes, max_gap=2)
    assert len(np.unique(bridged)) - 1 == len(CENTRES)
    assert_each_label_is_one_piece(bridged)


def test_the_end_of_a_nucleus_and_the_start_of_one_above_are_not_bridged() -> None:
    pair = balls((24, 40, 40), [(11, 20, 20), (34, 22, 21)], 11.0)
    between = [z for z in range(24) if not pair[z].any() and pair[:z].any() and pair[z:].any()]
    assert len(between) == 1
    assert same_partition(stitch_planes(planewise(pair)), pair)


def test_no_bridge_through_other_nuclei() -> None:
    planes = np.zeros((3, 20, 20), np.uint16)
    planes[:, 5:15, 5:15] = 1
    planes[1, :10, :10] = 2
    planes[1, :10, 10:] = 3
    planes[1, 10:, :10] = 4
    planes[1, 10:, 10:] = 5
    stitched = stitch_planes(planes)
    assert_each_label_is_one_piece(stitched)
    assert len(np.unique(stitched)) - 1 == 6


def test_two_nuclei_on_top_of_each_other_are_cut_at_the_neck() -> None:
    pair = balls((24, 40, 40), [(12, 20, 20), (31, 20, 20)], 11.0)
    touching = [z for z in range(23) if (pair[z] == 1).any() and (pair[z + 1] == 2).any()]
    assert len(touching) == 1
    z = touching[0]
    both = (pair[z] > 0) & (pair[z + 1] > 0)
    assert both.sum() / ((pair[z] > 0) | (pair[z + 1] > 0)).sum() > 0.5
    assert same_partition(stitch_planes(planewise(pair)), pair)


def test_tapering_ends_belong_to_their_nucleus() -> None:
    grid = np.indices((9, 40, 40)) - np.array([4, 20, 20]).reshape(3, 1, 1, 1)
    ball = ((grid * np.array([4.05, 1, 1]).reshape(3, 1, 1, 1)) ** 2).sum(0) < 16.5**2
    areas = ball.sum((1, 2))
    assert areas[0] < 0.25 * areas[1]
    assert np.array_equal(stitch_planes(ball.astype(np.uint8)), ball)


def test_links_are_optimal_in_sum_not_greedy() -> None:
    # One pair alone has the highest IoU, but taking it leaves two masks without a partner.
    planes = np.zeros((2, 1, 40), np.int32)
    planes[0, 0, 0:10] = 1
    planes[0, 0, 10:20] = 2
    planes[1, 0, 0:4] = 1
    planes[1, 0, 4:17] = 2
    planes[1, 0, 17:20] = 3
    # IoU: 1-1 .4, 1-2 6/17=.35, 2-2 7/16=.44, 2-3 .3. Optimal: 1-1 and 2-2.
    stitched = stitch_planes(planes, min_iou=0.2)
    assert stitched[1, 0, 0] == stitched[0, 0, 0]
    assert stitched[1, 0, 10] == stitched[0, 0, 12]
    planes[1, 0, 0:4] = 0
    # Now 1-2 .35 with 2-3 .3 (sum .65) beats 2-2 alone (.44).
    stitched = stitch_planes(planes, min_iou=0.2)
    assert stitched[1, 0, 8] == stitched[0, 0, 0]
    assert stitched[1, 0, 18] == stitched[0, 0, 12]


def test_a_label_on_two_pieces_in_a_plane_does_not_join_two_nuclei() -> None:
    planes = np.zeros((4, 12, 30), np.uint8)
    planes[:, 2:10, 2:10] = 7
    planes[:, 2:10, 18:26] = 7
    stitched = stitch_planes(planes)
    assert_each_label_is_one_piece(stitched)
    assert len(np.unique(stitched)) - 1 == 2


def test_random_masks_never_give_a_label_on_separate_pieces() -> None:
    rng = np.random.default_rng(5)
    planes = np.kron(rng.integers(0, 4, (9, 8, 8)), np.ones((1, 4, 4), int))
    for max_gap in (0, 1, 2):
        stitched = stitch_planes(planes, 0.1, max_gap)
        assert_each_label_is_one_piece(stitched)
        kept = planes > 0
        assert (stitched[kept] > 0).all()


def test_empty_and_single_planes() -> None:
    assert not stitch_planes(np.zeros((3, 5, 6), np.uint16)).any()
    one = np.zeros((1, 5, 6), np.uint16)
    one[0, 1:3, 1:3] = 9
    assert np.array_equal(stitch_planes(one), (one > 0).astype(np.uint32))
