"""Overlaps and matching agree with StarDist's and Cellpose's on random and hand-made labels."""

import numpy as np
import pytest
from numpy.typing import NDArray

from nuclei3d.errors import InputError
from nuclei3d.scoring.matching import average_precision, match, overlap_table, relabel_sequential
from nuclei3d.scoring.metrics import tally_of

THRESHOLDS = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)


def random_labels(rng: np.random.Generator, shape: tuple[int, int, int], nuclei: int) -> NDArray[np.uint16]:
    """Draw overlapping boxes; later ones cover earlier ones, so some labels are fragments or missing."""
    labels = np.zeros(shape, dtype=np.uint16)
    for label in range(1, nuclei + 1):
        corner = [rng.integers(0, length - 2) for length in shape]
        box = tuple(slice(c, c + rng.integers(2, 8)) for c in corner)
        labels[box] = label
    return labels


def disturbed(rng: np.random.Generator, labels: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Shift, drop, cut and join labels."""
    other = np.roll(labels, int(rng.integers(-2, 3)), axis=int(rng.integers(0, 3)))
    for label in rng.choice(np.arange(1, labels.max() + 1), size=5, replace=False):
        mask = other == label
        action = rng.integers(0, 3)
        if action == 0:
            other[mask] = 0
        elif action == 1:
            mask[:, :, : labels.shape[2] // 2] = False
            other[mask] = other.max() + 1
        else:
            other[mask] = max(label - 1, 1)
    return other


@pytest.mark.parametrize("seed", range(12))
def test_matches_are_as_many_as_stardist_and_cellpose_find(seed: int) -> None:
    from cellpose.metrics import average_precision as cellpose_ap
    from stardist.matching import matching as stardist_matching

    rng = np.random.default_rng(seed)
    truth = random_labels(rng, (12, 24, 24), 25)
    prediction = disturbed(rng, truth)
    table = overlap_table(truth, prediction)
    ours = average_precision(table, THRESHOLDS)
    stardist = stardist_matching(truth, prediction, thresh=THRESHOLDS)
    compact_truth, _ = relabel_sequential(truth)
    compact_prediction, _ = relabel_sequential(prediction)
    theirs, _, _, _ = cellpose_ap(
        compact_truth.astype(np.int64), compact_prediction.astype(np.int64), list(THRESHOLDS)
    )
    np.testing.assert_allclose(ours, [entry.accuracy for entry in stardist], rtol=1e-12)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_matched_pairs_have_the_largest_sum_of_ious_where_choices_conflict(seed: int) -> None:
    from stardist.matching import matching as stardist_matching

    rng = np.random.default_rng(seed)
    truth = random_labels(rng, (8, 10, 10), 30)
    prediction = random_labels(rng, (8, 10, 10), 30)
    for threshold in (0.05, 0.1, 0.2):
        ours = match(overlap_table(truth, prediction), threshold)
        theirs = stardist_matching(truth, prediction, thresh=threshold)
        assert ours.tp == theirs.tp
        # theirs breaks ties by the IoUs of pairs below the threshold too, so its sum can only be smaller
        assert ours.ious.sum() >= theirs.mean_matched_score * theirs.tp - 1e-6


def test_more_matches_win_over_one_better_match() -> None:
    truth = np.array([[[1, 1, 1, 1, 1, 1, 2, 2, 2, 0]]], dtype=np.uint8)
    prediction = np.array([[[5, 5, 0, 7, 7, 7, 7, 7, 0, 0]]], dtype=np.uint8)
    # 1-5: 2/6, 1-7: 3/8, 2-7: 2/6; the best single pair is 1-7, the most pairs are 1-5 and 2-7
    matching = match(overlap_table(truth, prediction), 0.3)
    assert list(zip(matching.true_index, matching.pred_index, strict=True)) == [(0, 0), (1, 1)]
    np.testing.assert_allclose(matching.ious, [2 / 6, 2 / 6])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.uint32])
def test_the_table_counts_every_voxel_whatever_the_labels(dtype: type) -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 5, (7, 9, 11)).astype(dtype) * dtype(17)
    prediction = rng.integers(0, 4, (7, 9, 11)).astype(dtype) * dtype(31)
    table = overlap_table(truth, prediction)
    assert list(table.true_labels) == [17, 34, 51, 68]
    assert list(table.pred_labels) == [31, 62, 93]
    for row, column, voxels in zip(table.rows, table.columns, table.overlaps, strict=True):
        both = (truth == table.true_labels[row]) & (prediction == table.pred_labels[column])
        assert voxels == both.sum()
    assert len(table.overlaps) == 12
    assert table.overlaps.sum() == ((truth > 0) & (prediction > 0)).sum()
    assert tally_of(table).foreground_union == ((truth > 0) | (prediction > 0)).sum()


def test_the_table_is_the_same_when_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    truth, prediction = random_labels(rng, (9, 20, 20), 15), random_labels(rng, (9, 20, 20), 15)
    whole = overlap_table(truth, prediction)
    monkeypatch.setattr("nuclei3d.scoring.matching._CHUNK_VOXELS", 137)
    pieces = overlap_table(truth, prediction)
    for name in ("true_labels", "true_sizes", "pred_labels", "pred_sizes", "rows", "columns", "overlaps"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(pieces, name))


def test_labels_may_be_as_large_as_31_bits() -> None:
    truth = np.array([[[0, 2**31 - 1, 2**31 - 1]]], dtype=np.uint32)
    prediction = np.array([[[3, 2**31 - 1, 0]]], dtype=np.uint32)
    table = overlap_table(truth, prediction)
    assert list(table.true_labels) == [2**31 - 1]
    assert list(table.pred_labels) == [3, 2**31 - 1]
    assert list(table.overlaps) == [1]


def test_an_iou_of_exactly_the_threshold_is_a_match() -> None:
    truth = np.array([[[1, 1, 0]]])
    prediction = np.array([[[1, 0, 0]]])
    table = overlap_table(truth, prediction)
    assert match(table, 0.5).tp == 1
    assert match(table, 0.501).tp == 0


def test_empty_volumes_give_no_matches_and_undefined_precision() -> None:
    nothing = np.zeros((2, 3, 4), dtype=np.uint8)
    one = nothing.copy()
    one[0, 0, 0] = 1
    assert np.isnan(average_precision(overlap_table(nothing, nothing), [0.5])).all()
    assert average_precision(overlap_table(one, nothing), [0.5]) == 0
    assert average_precision(overlap_table(nothing, one), [0.5]) == 0


def test_relabelling_keeps_the_order_and_names_the_originals() -> None:
    labels = np.array([[[0, 900, 7]], [[7, 0, 2**30]]], dtype=np.uint32)
    compact, originals = relabel_sequential(labels)
    np.testing.assert_array_equal(compact, [[[0, 2, 1]], [[1, 0, 3]]])
    np.testing.assert_array_equal(originals, [0, 7, 900, 2**30])
    np.testing.assert_array_equal(originals[compact], labels)


@pytest.mark.parametrize(
    ("truth", "prediction", "words"),
    [
        (np.zeros((2, 2, 2), int), np.zeros((2, 2, 3), int), "shape"),
        (np.zeros((2, 2, 2), float), np.zeros((2, 2, 2), int), "integers"),
        (np.full((2, 2, 2), -1), np.zeros((2, 2, 2), int), "-1"),
        (np.full((2, 2, 2), 2**31), np.zeros((2, 2, 2), int), str(2**31)),
    ],
)
def test_unusable_labels_are_refused_in_words(truth, prediction, words):
    with pytest.raises(InputError, match=words):
        overlap_table(truth, prediction)


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    table = overlap_table(np.ones((1, 1, 1), int), np.ones((1, 1, 1), int))
    with pytest.raises(InputError, match="threshold"):
        match(table, threshold)
