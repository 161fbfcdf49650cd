"""Scores agree with StarDist, py-ctcmetrics and with plain loops over all pairs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from nuclei3d.errors import InputError
from nuclei3d.scoring.matching import overlap_table
from nuclei3d.scoring.metrics import Tally, parse_metrics, score, stack_tallies, tally_of
from scores_fixture import score_volumes

Labels = NDArray[np.uint16]


def random_pair(seed: int) -> tuple[Labels, Labels]:
    """Draw blocky truth and a prediction of it that misses, invents, cuts and joins nuclei."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((10, 24, 24), dtype=np.uint16)
    for label in range(1, 16):
        z, y, x = rng.integers(0, 7), rng.integers(0, 19), rng.integers(0, 19)
        truth[z : z + 3, y : y + 5, x : x + 5] = label
    prediction = np.roll(truth, int(rng.integers(0, 2)), axis=2)
    prediction[prediction == rng.integers(1, 16)] = 0
    prediction[(prediction == 3) | (prediction == 4)] = 4
    half = prediction == 5
    half[:, :, :12] = False
    prediction[half] = 40
    prediction[rng.random(prediction.shape) < 0.02] = 41
    return truth, prediction


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("seed", range(6))
def test_pooled_scores_equal_stardist_over_a_data_set(seed: int) -> None:
    from stardist.matching import matching_dataset

    pairs = [random_pair(10 * seed + k) for k in range(3)]
    truths, predictions = [p[0] for p in pairs], [p[1] for p in pairs]
    ours = score_volumes(truths, predictions, thresholds=(0.5, 0.75))
    for position, threshold in enumerate((0.5, 0.75)):
        theirs = matching_dataset(truths, predictions, thresh=threshold, show_progress=False)
        assert ours.ap[position] == pytest.approx(theirs.accuracy)
        assert ours.f1[position] == pytest.approx(theirs.f1)
        if threshold == 0.5:
            assert ours.precision == pytest.approx(theirs.precision)
            assert ours.recall == pytest.approx(theirs.recall)
            # StarDist keeps IoUs in single precision
            assert ours.pq == pytest.approx(theirs.panoptic_quality, rel=1e-5)
            assert (ours.n_true, ours.n_pred) == (theirs.n_true, theirs.n_pred)


@pytest.mark.parametrize("seed", range(6))
def test_seg_and_det_equal_py_ctcmetrics(seed: int, tmp_path: Path) -> None:
    from ctc_metrics.metrics import det, seg
    from ctc_metrics.utils.representations import match

    truth, prediction = random_pair(seed)
    for name, labels in (("truth", truth), ("prediction", prediction)):
        tifffile.imwrite(tmp_path / f"{name}.tif", labels.astype(np.int32))
    true, pred, mapped_true, mapped_pred, ious = match(
        str(tmp_path / "truth.tif"), str(tmp_path / "prediction.tif")
    )
    found_by = np.bincount(mapped_pred, minlength=1)
    ours = score_volumes([truth], [prediction])
    assert ours.seg == pytest.approx(seg([true], [ious]))
    assert ours.det == pytest.approx(
        det(
            NS=int(np.maximum(found_by - 1, 0).sum()),
            FN=len(set(true) - set(mapped_true)),
            FP=len(set(pred) - set(mapped_pred)),
            num_vertices=len(true),
        )
    )


@pytest.mark.parametrize("seed", range(3))
def test_coverages_and_foreground_equal_loops_over_all_pairs(seed: int) -> None:
    truth, prediction = random_pair(seed)
    true = [truth == label for label in np.unique(truth)[1:]]
    pred = [prediction == label for label in np.unique(prediction)[1:]]
    ours = score_volumes([truth], [prediction])
    assert ours.mucov == pytest.approx(np.mean([max(iou(p, t) for t in true) for p in pred]))
    assert ours.true_cover == pytest.approx(np.mean([max(iou(p, t) for p in pred) for t in true]))
    assert ours.foreground_iou == pytest.approx(iou(truth > 0, prediction > 0))
    assert ours.splits == sum(sum((p & t).sum() > p.sum() / 2 for p in pred) > 1 for t in true)
    assert ours.merges == sum(sum((p & t).sum() > t.sum() / 2 for t in true) > 1 for p in pred)


def test_one_cut_and_one_join_are_one_split_and_one_merge() -> None:
    truth = np.zeros((1, 1, 20), dtype=np.uint8)
    truth[..., 0:6], truth[..., 8:12], truth[..., 12:16] = 1, 2, 3
    prediction = np.zeros_like(truth)
    prediction[..., 0:3], prediction[..., 3:6], prediction[..., 8:16] = 1, 2, 3
    metrics = score_volumes([truth], [prediction])
    assert (metrics.splits, metrics.merges) == (1, 1)
    # one nucleus missed (each half covers no more than half), two false halves, one double
    assert metrics.det == pytest.approx(1 - (10 + 2 + 5) / 30)


def test_a_perfect_prediction_scores_one_everywhere() -> None:
    truth, _ = random_pair(0)
    metrics = score_volumes([truth], [truth.astype(np.int64) * 3])
    for name in ("pq", "seg", "det", "mucov", "true_cover", "foreground_iou", "precision", "recall"):
        assert getattr(metrics, name) == 1
    assert (metrics.ap == 1).all()
    assert (metrics.splits, metrics.merges) == (0, 0)


def test_nothing_predicted_scores_zero_and_nothing_at_all_is_undefined() -> None:
    truth, _ = random_pair(0)
    nothing = np.zeros_like(truth)
    missed = score_volumes([truth], [nothing]).as_json()
    assert [missed[name] for name in ("seg", "det", "mucov", "foreground_iou", "recall")] == [0] * 5
    assert missed["precision"] is None
    assert missed["ap"]["0.50"] == 0
    empty = score_volumes([nothing], [nothing]).as_json()
    assert empty["ap"]["0.50"] is None
    assert empty["seg"] is None
    assert empty["n_true"] == 0


def test_weighted_totals_are_totals_of_repeated_volumes() -> None:
    tallies = [tally_of(overlap_table(*random_pair(seed))) for seed in range(3)]
    weights = np.array([[2.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    replicates = score(stack_tallies(tallies).total(weights))
    repeated = score(stack_tallies([tallies[0], tallies[0], tallies[2]]).total())
    plain = score(stack_tallies(tallies).total())
    for name, values in replicates.by_name().items():
        assert values[0] == pytest.approx(repeated.by_name()[name])
        assert values[1] == pytest.approx(plain.by_name()[name])


def test_counts_survive_json() -> None:
    tally = tally_of(overlap_table(*random_pair(1)))
    again = Tally.from_json(tally.as_json())
    assert score(again).as_json() == score(tally).as_json()


def test_scores_are_asked_for_by_threshold() -> None:
    metrics = score_volumes(*[[labels] for labels in random_pair(2)], thresholds=(0.5, 0.75))
    assert metrics.ap_at(0.75) == metrics.ap[1]
    with pytest.raises(KeyError, match=r"0\.6"):
        metrics.ap_at(0.6)


def metrics_file() -> dict[str, Any]:
    table = overlap_table(np.ones((1, 2, 2), np.uint8), np.ones((1, 2, 2), np.uint8))
    counts = tally_of(table, [0.5]).as_json()
    volume = {"embryo": "E", "truth_digest": "d", "frame_digest": "0-0", "n_true": 1, "counts": counts}
    return {"ap": {"0.50": 1.0}, "f1": {"0.50": None}, "volumes": {"E/0": volume}}


def test_a_file_of_metrics_is_read_as_it_was_written():
    tree = metrics_file() | {"recall_faint": None, "anything": [1]}
    assert parse_metrics(json.dumps(tree).encode(), "metrics.json") == tree


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("some text", "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "no metrics.json"),
        ({"ap": {}}, "ap"),
        ({"ap": {"high": 1.0}}, "ap"),
        ({"ap": {"0.50": 1.0, "0.60": 1.0}}, "one count per threshold"),
        ({"ap": {"0.50": float("nan")}}, "ap"),
        ({"recall_faint": "low"}, "recall_faint"),
        ({"volumes": {}}, "volumes"),
        ({"volumes": ["E/0"]}, "volumes"),
        ({"embryo": None}, "embryo"),
        ({"frame_digest": 7}, "frame_digest"),
        ({"n_true": -1}, "n_true"),
        ({"counts": {}}, r"counts\.n_true is missing"),
        ({"counts": {"n_true": float("inf")}}, "counts"),
        ({"tp": 1.0}, "counts.tp"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_file_of_metrics_is_told_in_one_line(content, told):
    if isinstance(content, dict):
        tree = metrics_file()
        volume = tree["volumes"]["E/0"]
        for name, value in content.items():
            place = next((p for p in (tree, volume, volume["counts"]) if name in p), tree)
            place[name] = value
        content = json.dumps(tree)
    with pytest.raises(InputError, match=told) as caught:
        parse_metrics(content.encode("latin-1"), "here/metrics.json")
    assert str(caught.value).startswith("here/metrics.json is no metrics.json")
    assert "\n" not in str(caught.value)
