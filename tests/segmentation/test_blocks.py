import itertools
from dataclasses import replace

import numpy as np
import pytest

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.matching import overlap_table
from nuclei3d.segmentation.blocks import (
    Block,
    assemble_core,
    choose_owners,
    locate_nuclei,
    match_shared,
    meet,
    merge_nuclei,
    plan_blocks,
    within,
)
from nuclei3d.segmentation.masks import measure_nuclei
from oracle_network import ball_labels

VOXELS = VoxelSize(2.0, 1.0, 1.0)


def join(blocks: list[Block], labels: list[np.ndarray]) -> np.ndarray:
    """Join blocks as the stage does, in memory."""
    nuclei = [locate_nuclei(block, part, VOXELS) for block, part in zip(blocks, labels, strict=True)]
    matches = {}
    for a, b in itertools.combinations(range(len(blocks)), 2):
        shared = meet(blocks[a].outer, blocks[b].outer)
        if shared is not None:
            parts = [labels[i][within(shared, blocks[i].outer)] for i in (a, b)]
            matches[a, b] = match_shared(nuclei[a], nuclei[b], *parts, shared)
    final = choose_owners(nuclei, matches)
    result = np.zeros(blocks[0].shape, np.uint32)
    for block in blocks:
        order = [block.index, *(b.index for b in blocks if b.index != block.index)]
        result[block.core] = assemble_core(block, [(blocks[i], labels[i], final[i]) for i in order])
    return result


def renumbered(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels 1..n in random order, as a block that knows nothing of the others numbers them."""
    present = np.unique(labels[labels > 0])
    table = np.zeros(int(labels.max(initial=0)) + 1, np.uint32)
    table[present] = rng.permutation(len(present)) + 1
    return table[labels]


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.arange(8, n, 13) for n in (60, 90, 100)), indexing="ij"), -1)
    centres = grid.reshape(-1, 3) + rng.uniform(-2, 2, (grid.size // 3, 3))
    labels = ball_labels((30, 90, 100), centres, rng.uniform(5, 7.5, len(centres)), VOXELS.zyx)
    # Of balls nearly hidden by others only slivers are left.
    labels[np.bincount(labels.ravel())[labels] < 60] = 0
    return labels


@pytest.mark.parametrize("max_voxels", [30 * 90 * 100, 150_000, 60_000])
def test_blocks_partition_the_volume_and_fit_into_memory(max_voxels):
    blocks = plan_blocks((30, 90, 100), VOXELS, 10.0, max_voxels)
    covered = np.zeros((30, 90, 100), int)
    for block in blocks:
        covered[block.core] += 1
        assert np.prod([part.stop - part.start for part in block.outer]) <= max_voxels
        for core, outer, size, margin in zip(block.core, block.outer, block.shape, (5, 10, 10), strict=True):
            assert outer.start == max(0, core.start - margin)
            assert outer.stop == min(size, core.stop + margin)
    assert (covered == 1).all()
    assert (len(blocks) == 1) == (max_voxels == 30 * 90 * 100)


def test_blocks_give_back_the_whole(truth):
    """Every block labels its part on its own; joined, nothing is cut, lost, doubled or renumbered twice."""
    rng = np.random.default_rng(1)
    blocks = plan_blocks(truth.shape, VOXELS, 20.0, 150_000)
    assert len(blocks) > 3
    joined = join(blocks, [renumbered(truth[block.outer], rng) for block in blocks])
    np.testing.assert_array_equal(joined > 0, truth > 0)
    pairs = np.unique(np.stack([truth.ravel(), joined.ravel()]), axis=1)
    assert pairs.shape[1] == len(np.unique(truth))
    assert sorted(np.unique(joined)) == list(range(len(np.unique(truth))))


def test_blocks_that_disagree_about_borders_still_give_each_nucleus_once(truth):
    """As with a real network, each block's masks differ a little from the others'."""
    from scipy.ndimage import binary_erosion

    rng = np.random.default_rng(2)
    blocks = plan_blocks(truth.shape, VOXELS, 20.0, 150_000)
    labels = []
    for block in blocks:
        part = truth[block.outer].copy()
        if block.index % 2:
            part[~binary_erosion(part > 0, np.ones((1, 3, 3)), border_value=1)] = 0
        labels.append(renumbered(part, rng))
    joined = join(blocks, labels)
    table = overlap_table(truth, joined)
    assert table.n_pred == table.n_true
    assert (table.best_true_iou > 0.3).all()


def test_a_fragment_at_a_cut_face_is_dropped_and_a_whole_nucleus_is_kept():
    blocks = plan_blocks((10, 40, 120), VOXELS, 10.0, 35_000)
    assert len(blocks) == 2
    truth = np.zeros((10, 40, 120), np.uint32)
    truth[3:7, 10:20, 62:76] = 1
    labels = [(truth[block.outer] > 0).astype(np.uint32) for block in blocks]
    assert labels[0].any()
    np.testing.assert_array_equal(join(blocks, labels), truth)


def test_a_nucleus_seen_by_one_block_only_is_kept_by_its_core_alone():
    blocks = plan_blocks((10, 40, 120), VOXELS, 15.0, 36_000)
    assert len(blocks) == 2
    at = np.zeros((10, 40, 120), np.uint32)
    at[3:7, 10:20, 52:60] = 1
    empty = [np.zeros([s.stop - s.start for s in block.outer], np.uint32) for block in blocks]
    seen_by_owner = [at[blocks[0].outer], empty[1]]
    seen_by_neighbour = [empty[0], at[blocks[1].outer]]
    np.testing.assert_array_equal(join(blocks, seen_by_owner), at)
    assert not join(blocks, seen_by_neighbour).any()


def test_nuclei_measured_core_by_core_equal_those_measured_at_once(truth):
    rng = np.random.default_rng(3)
    image = rng.integers(0, 1000, truth.shape).astype(np.uint16)
    scores = rng.random(int(truth.max()) + 1).astype(np.float32)
    parts = []
    for block in plan_blocks(truth.shape, VOXELS, 20.0, 150_000):
        measured = measure_nuclei(truth[block.core], image[block.core], VOXELS, scores)
        z, y, x = (part.start * edge for part, edge in zip(block.core, VOXELS.zyx, strict=True))
        parts.append([replace(n, z_um=n.z_um + z, y_um=n.y_um + y, x_um=n.x_um + x) for n in measured])
    merged = merge_nuclei(parts, {i: float(s) for i, s in enumerate(scores)})
    expected = measure_nuclei(truth, image, VOXELS, scores)
    for ours, theirs in zip(merged, expected, strict=True):
        np.testing.assert_allclose(list(vars(ours).values()), list(vars(theirs).values()), rtol=1e-6)
