"""Where a model is unsure, and which blocks are chosen for it."""

import numpy as np
import pytest

from nuclei3d.flows import flows_3d
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.settings import MaskSettings, SegmentationSettings
from nuclei3d.segmentation.uncertainty import (
    Place,
    choose_blocks,
    find_blocks,
    measure_uncertainty,
    similarity,
)
from oracle_network import ball_labels

EDGES = (2.0, 1.0, 1.0)
SHAPE = (20, 80, 80)
CENTRES = np.array([(20, y, x) for y in (20, 60) for x in (20, 60)], float)
SETTINGS = SegmentationSettings(
    diameter_px=12, nucleus_diameter_um=12, masks=MaskSettings(score_threshold=0.4)
)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return ball_labels(SHAPE, CENTRES, np.full(4, 6.0), EDGES)


def measure(labels: np.ndarray, number: int = 0, *, logit: float = 8.0, length: float = 1.0):
    """Exact flows and a sure logit, but for one nucleus."""
    flow = flows_3d(labels, VoxelSize(*EDGES))
    seen = np.where(labels > 0, 8.0, -8.0).astype(np.float32)
    seen[labels == number] = logit if number else -8.0
    flow[:, (labels == number) & (number > 0)] *= length
    return measure_uncertainty(FlowField.of(flow, seen, VoxelSize(*EDGES)), SETTINGS)


def blocks_of(uncertain, count=4, unknown=None):
    return find_blocks(uncertain, SHAPE, VoxelSize(*EDGES), 36.0, count, unknown)


def holds(block, centre) -> bool:
    voxel = [at / edge for at, edge in zip(centre, EDGES, strict=True)]
    return all(part.start <= at < part.stop for part, at in zip(block.box, voxel, strict=True))


@pytest.mark.parametrize(
    ("logit", "length", "why"),
    [
        (0.4, 0.8, "doubtful"),  # dim: half sure, and found
        (0.1, 0.4, "dropped"),  # dimmer: a candidate below the threshold
        (8.0, 0.3, "any"),  # sure of the foreground, but the views contradict each other
    ],
)
def test_the_block_with_the_unsure_nucleus_comes_first(labels, logit, length, why):
    first, *others = blocks_of(measure(labels, 3, logit=logit, length=length))
    assert holds(first, CENTRES[2])
    assert first.uncertainty > 2 * max(each.uncertainty for each in others)
    assert first.doubtful + first.dropped == 1
    if why != "any":
        assert getattr(first, why) == 1
    assert (first.focus[0] * 2, first.focus[1], first.focus[2]) == pytest.approx(CENTRES[2], abs=6)


def test_foreground_without_a_candidate_is_worth_a_nucleus(labels):
    sure = measure(labels)
    assert sure.foreground.sum() == 0
    assert sure.kept.tolist() == [False, True, True, True, True]
    assert sure.nuclei.sum() == pytest.approx(0, abs=0.02)
    lost = measure(labels, 2, length=0.0)
    assert lost.labels.max() == 3
    assert lost.foreground.sum() == pytest.approx(1, rel=0.05)
    assert holds(blocks_of(lost)[0], CENTRES[1])


def test_a_nucleus_at_the_threshold_is_wrong_in_one_of_two_cases(labels):
    uncertain = measure(labels, 1, logit=float(np.log(0.4 / 0.6)))
    assert uncertain.chance_wrong[1:].max() == pytest.approx(0.5, abs=0.05)
    assert uncertain.nuclei.sum() == pytest.approx(uncertain.chance_wrong.sum(), rel=1e-4)


def test_a_nucleus_too_faint_for_the_logit_threshold_is_a_candidate(labels):
    block = blocks_of(measure(labels, 4, logit=-0.7))[0]
    assert holds(block, CENTRES[3])
    assert (block.doubtful, block.dropped) == (0, 1)


def test_blocks_do_not_overlap_and_lie_in_the_image(labels):
    covered = np.zeros(SHAPE, int)
    for block in blocks_of(measure(labels, 1, logit=0.4), count=20):
        assert (part.stop <= n for part, n in zip(block.box, SHAPE, strict=True))
        covered[block.box] += 1
    assert covered.max() == 1


def test_what_is_known_is_not_suggested(labels):
    unknown = np.ones(SHAPE, bool)
    unknown[:, 40:, :40] = False
    uncertain = measure(labels, 3, logit=0.4)
    sums = [block.uncertainty for block in blocks_of(uncertain, unknown=unknown)]
    assert sums[0] < 0.2 * blocks_of(uncertain)[0].uncertainty


def at(embryo: str, frame: int, x: float) -> Place:
    return Place(embryo, frame, 20, (0.0, 0.0, x))


def test_of_equal_blocks_the_second_is_from_elsewhere():
    places = [at("a", 5, 0), at("a", 5, 36), at("a", 6, 0), at("a", 15, 0), at("b", 5, 0)]
    assert choose_blocks([1, 1, 1, 1, 1], places, 3, 36.0) == [0, 4, 3]
    # a little less uncertain, but of another embryo
    assert choose_blocks([1, 1, 1, 1, 0.7], places, 2, 36.0) == [0, 4]
    assert choose_blocks([1, 1, 1, 1, 0.1], places, 2, 36.0) == [0, 3]
    assert choose_blocks([1, 2], places[:2], 9, 36.0) == [1, 0]


def test_a_block_shows_itself_and_nothing_of_another_embryo():
    assert similarity(at("a", 5, 0), at("a", 5, 0), 36.0) == 1
    assert similarity(at("a", 5, 0), at("b", 5, 0), 36.0) == 0
    assert similarity(at("a", 0, 0), at("a", 19, 0), 36.0) == pytest.approx(1 / 3, abs=1e-3)
    assert similarity(at("a", 5, 0), at("a", 5, 500), 36.0) == pytest.approx(2 / 3)
