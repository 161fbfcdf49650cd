"""Nuclei of a volume: who is found, where, how far off, and at which score to cut."""

import numpy as np
import pytest
from numpy.typing import NDArray

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.assessment import (
    Assessment,
    assess_volume,
    by_embryo,
    by_stage,
    centroids_um,
    count_by_contrast,
    count_by_depth,
    recall_at_precision,
    score_bins,
    summarise,
    surface_distances_um,
)
from nuclei3d.scoring.metrics import THRESHOLDS

SIZE = VoxelSize(2.0, 0.5, 0.5)


def scene() -> tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.float64]]:
    """Three true nuclei (labels 2, 5, 9; the last missed), one shifted by 1 um in x, and a false one."""
    truth = np.zeros((16, 40, 60), dtype=np.uint16)
    truth[4:7, 10:20, 10:20] = 2
    truth[4:7, 10:20, 35:45] = 5
    truth[11:14, 25:35, 10:20] = 9
    prediction = np.zeros_like(truth)
    prediction[4:7, 10:20, 12:22] = 30
    prediction[4:7, 10:20, 35:45] = 10
    prediction[11:14, 25:35, 40:50] = 20
    rng = np.random.default_rng(0)
    image = 100 + rng.normal(0, 10, truth.shape)
    image[truth == 2] += 100
    image[truth == 5] += 300
    image[truth == 9] += 20
    return truth, prediction, image


@pytest.fixture(scope="module")
def assessed() -> Assessment:
    truth, prediction, image = scene()
    return assess_volume(truth, prediction, SIZE, image=image, scores={30: 0.9, 10: 0.8, 20: 0.3})


def test_found_missed_and_false_nuclei_are_named_by_their_own_labels(assessed: Assessment) -> None:
    assert list(assessed.true.label) == [2, 5, 9]
    assert list(assessed.true.partner) == [30, 10, 0]
    assert list(assessed.pred.label) == [10, 20, 30]
    assert list(assessed.pred.partner) == [5, 0, 2]
    np.testing.assert_allclose(assessed.true.score, [0.9, 0.8, np.nan])
    np.testing.assert_allclose(assessed.true.best_iou, [8 / 12, 1, 0])


def test_places_sizes_and_distances_are_in_micrometres(assessed: Assessment) -> None:
    np.testing.assert_allclose(assessed.true.place_um[0], [5 * 2.0, 14.5 * 0.5, 14.5 * 0.5])
    np.testing.assert_allclose(assessed.true.volume_um3, 300 * 0.5)
    np.testing.assert_allclose(assessed.centre_distance_um, [1.0, 0.0])
    assert assessed.true.surface_um[1] == 0
    # of the surfaces of the shifted box only the two faces across x moved, by 1 um
    assert 0 < assessed.true.surface_um[0] < 1
    assert np.isnan(assessed.true.surface_um[2])


def test_contrast_orders_the_nuclei(assessed: Assessment) -> None:
    np.testing.assert_allclose(assessed.true.contrast, [10, 30, 2], rtol=0.3)
    # a prediction is measured on its own mask: nothing is there
    assert abs(assessed.pred.contrast[1]) < 1


def test_recall_and_precision_by_contrast_and_depth(assessed: Assessment) -> None:
    bins = score_bins(count_by_contrast([assessed], [5.0, 20.0]), [5.0, 20.0], None)
    assert [entry["n"] for entry in bins] == [1, 1, 1]
    assert [entry["recall"] for entry in bins] == [0, 1, 1]
    assert bins[0]["n_pred"] == 1
    assert bins[0]["precision"] == 0
    assert bins[2]["precision"] == 1
    shallow, deep = score_bins(count_by_depth([assessed], [15.0]), [15.0], None)
    assert [shallow[name] for name in ("to", "n", "recall", "precision")] == [15, 2, 1, 1]
    assert [deep[name] for name in ("from", "n", "recall", "precision")] == [15, 1, 0, 0]


def test_recall_at_a_precision_cuts_false_nuclei_by_their_score(assessed: Assessment) -> None:
    assert recall_at_precision([assessed], 0.95) == (2 / 3, 0.8)
    # at precision 2/3 all predictions may stay
    assert recall_at_precision([assessed], 0.6) == (2 / 3, 0.3)
    assert recall_at_precision([assessed], 0.95, edges=[20.0]) == (0.5, 0.8)


def test_without_scores_or_if_no_cut_is_precise_enough_there_is_no_such_recall() -> None:
    truth, prediction, _ = scene()
    assert np.isnan(recall_at_precision([assess_volume(truth, prediction, SIZE)], 0.9)).all()
    nothing = assess_volume(truth, np.zeros_like(truth), SIZE, scores={})
    assert np.isnan(recall_at_precision([nothing], 0.9)).all()
    upside_down = assess_volume(truth, prediction, SIZE, scores={30: 0.1, 10: 0.2, 20: 0.9})
    assert np.isnan(recall_at_precision([upside_down], 0.9)).all()


def test_predictions_of_equal_score_are_cut_together() -> None:
    truth, prediction, _ = scene()
    equal = assess_volume(truth, prediction, SIZE, scores={30: 0.5, 10: 0.5, 20: 0.5})
    assert np.isnan(recall_at_precision([equal], 0.9)).all()
    assert recall_at_precision([equal], 0.6) == (2 / 3, 0.5)


def test_a_resampled_recall_at_a_precision_is_that_of_the_volumes_drawn(assessed: Assessment) -> None:
    truth, prediction, image = scene()
    scores = {30: 0.4, 10: 0.7, 20: 0.95}
    other = assess_volume(truth, prediction, SIZE, image=image, scores=scores)
    weights = np.array([[1, 1], [2, 0], [3, 2], [0, 2]], dtype=float)
    for edges in (None, [5.0, 20.0]):
        recall, _ = recall_at_precision([assessed, other], 0.6, weights, edges=edges)
        for row, (first, second) in enumerate(weights.astype(int)):
            drawn = [assessed] * first + [other] * second
            expected, _ = recall_at_precision(drawn, 0.6, edges=edges)
            assert recall[row] == expected
    never, _ = recall_at_precision([assessed, other], 0.99, np.array([[0.0, 2.0]]))
    assert np.isnan(never).all()


def test_a_summary_pools_and_gives_intervals_over_embryos(assessed: Assessment) -> None:
    truth, _, image = scene()
    perfect = assess_volume(truth, truth, SIZE, image=image)
    volumes = [assessed, perfect, perfect, perfect]
    summary = summarise(
        volumes,
        ["a", "b", "c", "d"],
        contrast_edges=(5.0, 20.0),
        replicates=500,
        rng=np.random.default_rng(0),
    )
    assert summary["recall"] == 11 / 12
    assert summary["recall_faint"] == 3 / 4
    assert summary["recall_bright"] == 1
    low, high = summary["intervals"]["recall"]
    # a third of all replicates draw the imperfect embryo twice or more, a third never
    assert low == pytest.approx(10 / 12, abs=0.09)
    assert high == 1
    assert summary["intervals_over"] == "4 embryos"
    assert summary["volume_mean"]["recall"] == pytest.approx((2 / 3 + 3) / 4)
    assert "n_true" not in summary["intervals"]
    faint = summary["recall_by_contrast"][0]
    assert (faint["from"], faint["to"], faint["n"], faint["recall"]) == (None, 5.0, 4, 0.75)
    assert by_embryo(volumes, ["a", "b", "b", "b"], THRESHOLDS)["b"]["recall"] == 1
    assert list(by_stage(volumes, THRESHOLDS)) == ["0-7"]


def test_a_single_volume_has_no_bootstrap_but_wilson_intervals_by_contrast(
    assessed: Assessment, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = summarise([assessed], ["a"], contrast_edges=(5.0,), rng=np.random.default_rng(0))
    # a bin of fewer than ten nuclei has none
    assert summary["recall_by_contrast"][0]["interval"] is None
    monkeypatch.setattr("nuclei3d.scoring.assessment.FEWEST_NUCLEI", 1)
    summary = summarise([assessed], ["a"], contrast_edges=(5.0,), rng=np.random.default_rng(0))
    assert summary["intervals"] == {}
    low, high = summary["recall_by_contrast"][0]["interval"]
    assert low == 0
    assert 0.5 < high < 1


def test_without_an_image_there_is_no_recall_by_contrast() -> None:
    truth, prediction, _ = scene()
    volume = assess_volume(truth, prediction, SIZE)
    summary = summarise([volume, volume], ["a", "a"], rng=np.random.default_rng(0))
    assert summary["recall_by_contrast"] == []
    assert summary["recall_faint"] is None
    assert summary["recall_at_precision"] == {"0.90": None, "0.95": None}


def test_empty_volumes_can_be_summarised() -> None:
    nothing = np.zeros((4, 5, 6), dtype=np.uint8)
    volume = assess_volume(nothing, nothing, SIZE, image=nothing)
    summary = summarise([volume], ["a"], contrast_edges=(1.0,), rng=np.random.default_rng(0))
    assert summary["n_true"] == 0
    assert summary["ap"]["0.50"] is None
    assert summary["recall_by_depth_um"] == [] or summary["recall_by_depth_um"][0]["n"] == 0


def test_where_nobody_looked_nothing_counts() -> None:
    truth = np.zeros((4, 10, 40), np.uint16)
    truth[:, 2:8, 2:8] = 1
    truth[:, 2:8, 12:18] = 2  # cut where the known part ends
    prediction = np.zeros_like(truth)
    prediction[:, 2:8, 2:8] = 5
    prediction[:, 2:8, 12:26] = 6  # the same nucleus, whole
    prediction[:, 2:8, 30:36] = 7  # nobody looked there
    prediction[:, 8:10, 17:24] = 8  # for the most part beyond
    unknown = np.zeros(truth.shape, bool)
    unknown[:, :, 18:] = True
    tally = assess_volume(truth, prediction, VoxelSize(1, 1, 1), unknown=unknown).tally
    assert (tally.n_true, tally.n_pred, tally.tp_half) == (2, 2, 2)
    assert assess_volume(truth, prediction, VoxelSize(1, 1, 1)).tally.n_pred == 4


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
