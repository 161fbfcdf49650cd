from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import IntensityRange
from nuclei3d.networks.cpnet import new_network
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.foreground import everywhere, find_occupied, occupied_space
from nuclei3d.segmentation.fusion import VolumeView, add_views, fuse_views
from nuclei3d.segmentation.network_pass import (
    Networks,
    compute_view,
    computed_indices,
    predict_flows,
    whole_planes,
)
from nuclei3d.segmentation.network_runner import NetworkRunner
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.segmentation.settings import SegmentationSettings
from nuclei3d.views import VIEW_AXIS, VIEWS
from oracle_network import LocalNetwork, OracleNetwork, PositionNetwork, ball_labels

CPU = torch.device("cpu")


def planes_of(image, view, runner, *, depth, step=1, occupied=None):
    """All planes of a view: number, and flow and logit."""
    occupied = occupied or everywhere(image.shape)
    groups = compute_view(torch.from_numpy(image), view, runner, occupied, depth, step)
    return list(whole_planes(groups, view, image.shape))


@pytest.mark.parametrize("view", VIEWS)
def test_planes_go_in_and_come_out_in_their_own_axes(view):
    image = np.random.default_rng(0).random((6, 20, 24)).astype(np.float32)
    planes = planes_of(image, view, NetworkRunner(PositionNetwork(), CPU), depth=6)
    axis = VIEW_AXIS[view]
    assert [index for index, _ in planes] == list(range(image.shape[axis]))
    logit = np.stack([output[2] for _, output in planes], axis=axis)
    np.testing.assert_allclose(logit, image, rtol=1e-6)
    rows, columns = np.indices(planes[0][1].shape[1:])
    np.testing.assert_allclose(planes[3][1][0], rows, atol=1e-5)
    np.testing.assert_allclose(planes[3][1][1], columns, atol=1e-5)


def test_orthogonal_planes_are_stretched_to_cubic_voxels_and_xy_planes_are_not():
    image = np.zeros((5, 32, 48), np.float32)
    oracle = OracleNetwork(separate=True)
    for view in VIEWS:
        planes_of(image, view, NetworkRunner(oracle, CPU), depth=29)
    assert {shape[2:] for shape in oracle.shapes} == {(32, 48), (32, 48), (32, 32)}
    assert sum(shape[0] for shape in oracle.shapes) == 5 + 32 + 48


def test_thin_planes_are_padded_to_eight_not_to_a_tile_and_go_in_together():
    image = np.zeros((10, 64, 100), np.float32)
    oracle = OracleNetwork(separate=True)
    planes_of(image, "xz", NetworkRunner(oracle, CPU), depth=10)
    assert {shape[2:] for shape in oracle.shapes} == {(16, 104)}
    assert len(oracle.shapes) == 1


@pytest.mark.parametrize(("count", "step"), [(10, 1), (10, 3), (11, 4), (5, 9), (1, 2), (2, 2)])
def test_computed_planes_leave_no_gap_wider_than_the_step(count, step):
    chosen = computed_indices(count, step)
    assert chosen == sorted(set(chosen))
    assert chosen[0] <= step // 2
    assert count - 1 - chosen[-1] <= step // 2
    assert all(b - a <= step for a, b in pairwise(chosen))


def test_planes_between_computed_ones_are_interpolated_linearly():
    z, y, x = np.indices((16, 13, 16)).astype(np.float32)
    image = 2 * y + 0 * z + 0 * x
    planes = planes_of(image, "xz", NetworkRunner(PositionNetwork(), CPU), depth=16, step=3)
    assert [index for index, _ in planes] == list(range(13))
    for index, output in planes[1:12]:
        np.testing.assert_allclose(output[2], 2 * index, atol=1e-5)


@pytest.mark.parametrize("trust", [None, (3.0, 1.0, 0.5)])
@pytest.mark.parametrize("weight", [None, 1.5])
def test_the_sum_plane_by_plane_is_the_mean_fusion_of_whole_views(trust, weight):
    rng = np.random.default_rng(0)
    image = rng.random((5, 18, 20)).astype(np.float32)
    field = FlowField.zeros(image.shape, VoxelSize(1, 1, 1))
    volume = None
    if weight:
        solid = FlowField.of(rng.random((3, 10, 9, 10)), rng.random((10, 9, 10)), VoxelSize(0.5, 2, 2))
        volume = VolumeView(solid, field.shape, weight)
    runner = NetworkRunner(LocalNetwork(), CPU)
    planes = {view: planes_of(image, view, runner, depth=11) for view in VIEWS}
    weights = dict(zip(VIEWS, trust or (1.0, 1.0, 1.0), strict=True))
    add_views(field, planes.__getitem__, weights, volume)
    whole = {}
    for view in VIEWS:
        whole[view] = np.stack([output for _, output in planes[view]], axis=1 + VIEW_AXIS[view])
    flow, logit = fuse_views(whole, "mean", weights if trust else None, volume)
    np.testing.assert_allclose(field.flow, flow, atol=2e-4)
    np.testing.assert_allclose(field.logit, logit, atol=2e-3)


def box_of_plane(occupied, axis, index):
    """The box in a plane of what is occupied in it."""
    box = occupied.bounds(
        [
            slice(index, index + 1) if along == axis else slice(0, cuts[-1])
            for along, cuts in enumerate(occupied.edges)
        ]
    )
    return box and tuple(part for along, part in enumerate(box) if along != axis)


def share_of(occupied):
    """The part of a volume that is occupied."""
    z, y, x = (np.diff(cuts) for cuts in occupied.edges)
    sizes = z[:, None, None] * y[:, None] * x
    return (sizes * occupied.blocks).sum() / sizes.sum()


def noisy_embryo(contrast: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two clusters of nuclei, far apart in a large dark volume with noise and an uneven background."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(15, 35, (12, 3))
    centres[6:] += np.array([30, 70, 75])
    truth = ball_labels((80, 120, 130), centres, np.full(12, 5.0), (1, 1, 1))
    haze = np.linspace(0, 10, 130)
    return truth, (truth > 0) * contrast + haze + rng.normal(100, 5, truth.shape)


@pytest.mark.parametrize("contrast", [30, 300])
def test_every_nucleus_lies_in_occupied_space_with_a_margin_and_most_space_is_left_out(contrast):
    truth, image = noisy_embryo(contrast)
    high = max(100 + contrast, 150)
    intensity = IntensityRange(88, high, 5)
    occupied = find_occupied(intensity.apply(image), 5 / (high - 88), (10, 10, 10))
    assert share_of(occupied) < 0.7
    grown = np.zeros(truth.shape, bool)
    z, y, x = np.nonzero(truth)
    for dz, dy, dx in np.array(
        [[0, 0, 0], *(s * np.eye(3, dtype=int)[a] for a in range(3) for s in (-8, 8))]
    ):
        grown[np.clip(z + dz, 0, 79), np.clip(y + dy, 0, 119), np.clip(x + dx, 0, 129)] = True
    for axis in range(3):
        for index in range(truth.shape[axis]):
            plane = grown.take(index, axis=axis)
            if plane.any():
                box = box_of_plane(occupied, axis, index)
                assert box is not None
                assert plane[box].sum() == plane.sum()


def test_occupied_space_reaches_a_diameter_in_all_directions_and_no_further_at_corners():
    image = np.zeros((60, 60, 60), np.float32)
    image[30, 30, 30] = 100
    occupied = find_occupied(image, 0.0, (12, 12, 12))
    blocks = occupied.blocks
    where = [np.searchsorted(cuts, np.arange(60), side="right") - 1 for cuts in occupied.edges]
    kept = blocks[np.ix_(*where)]
    distance = np.sqrt(((np.indices(image.shape) - 30) ** 2).sum(0))
    assert kept[distance <= 12].all()
    # A block is 3 voxels wide; a box around the margin would reach to 1.7 times 18.
    assert not kept[distance > 12 + 3 * 3].any()


def test_a_block_from_the_midst_of_an_embryo_is_occupied_throughout():
    """Where one bright nucleus stands out from tissue that fills the block, the tissue is not empty space."""
    rng = np.random.default_rng(0)
    image = rng.normal(100, 2, (40, 80, 160))
    image[:, :, 60:] += 100
    image[10:20, 10:20, 140:150] += 300
    intensity = IntensityRange(95.3, 500, 2)
    voxels = VoxelSize(1, 1, 1)
    normalised = intensity.apply(image)
    block = normalised[:, :, 80:]
    # By the block alone the tissue would be its background.
    assert share_of(find_occupied(block, 2 / 405, (10, 10, 10))) < 0.6
    assert share_of(occupied_space(block, intensity, voxels, voxels, 10.0)) == 1
    assert share_of(occupied_space(normalised, intensity, voxels, voxels, 10.0)) < 0.75


def test_nothing_is_lost_by_leaving_empty_space_out():
    """The same volume with and without skipping: the same nuclei, far fewer pixels through the network."""
    truth, _ = noisy_embryo(0)
    settings = SegmentationSettings(
        diameter_px=10, nucleus_diameter_um=10, intensity_range=IntensityRange(0, 1), precision="float32"
    )
    results, pixels = [], []
    for skip in (True, False):
        oracle = OracleNetwork(separate=False)
        result = Segmenter(oracle, replace(settings, skip_empty=skip), CPU).segment(
            truth.astype(np.float32), VoxelSize(1, 1, 1)
        )
        results.append(result.labels)
        pixels.append(sum(shape[0] * shape[2] * shape[3] for shape in oracle.shapes))
    np.testing.assert_array_equal(results[0] > 0, results[1] > 0)
    assert results[0].max() == results[1].max() == 12
    assert pixels[0] < 0.75 * pixels[1]


@pytest.mark.parametrize("view", VIEWS)
def test_small_planes_are_not_computed_in_the_box_of_large_ones(view, monkeypatch):
    """A ball in a large volume: as many pixels as planes in boxes of their own need, or a tenth more."""
    # As on a GPU, where all planes would fit at once.
    monkeypatch.setattr("nuclei3d.segmentation.network_runner.PIXELS_PER_BATCH", {"cpu": 2**22})
    image = (((np.indices((96, 96, 96)) - 47.5) ** 2).sum(0) < 40**2).astype(np.float32)
    occupied = find_occupied(image, 0.0, (8, 8, 8))
    own = 0
    for index in range(96):
        box = box_of_plane(occupied, VIEW_AXIS[view], index)
        # From the lattice of eight pixels, padded to a multiple of eight.
        sides = [-(-(part.stop - part.start // 8 * 8) // 8) * 8 for part in box or ()]
        own += int(np.prod(sides)) if sides else 0
    runner = NetworkRunner(PositionNetwork(), CPU)
    planes = planes_of(image, view, runner, depth=96, occupied=occupied)
    assert [index for index, _ in planes] == list(range(96))
    assert runner.pixels <= 1.1 * own


def test_bfloat16_changes_flows_by_a_percent_at_most():
    image = np.random.default_rng(0).normal(0.3, 0.2, (6, 48, 48)).astype(np.float32)
    networks = Networks(new_network(12, seed=0))
    common = dict(diameter_px=12, nucleus_diameter_um=12, intensity_range=IntensityRange(0, 1))
    fine, coarse = (
        predict_flows(
            image, VoxelSize(2, 1, 1), networks, SegmentationSettings(precision=precision, **common), CPU
        )[0]
        for precision in ("float32", "bfloat16")
    )
    assert np.abs(fine.flow - coarse.flow).max() < 0.03 * np.abs(fine.flow).max()


def noisy_spots() -> np.ndarray:
    rng = np.random.default_rng(4)
    image = rng.normal(100, 5, (10, 40, 36))
    image[3:7, 12:20, 10:18] += 120
    return image.astype(np.float32)


@pytest.mark.parametrize("fill", [0.0, np.nan])
def test_fill_changes_nothing_of_the_image_and_holds_no_nucleus(fill):
    """PositionNetwork gives the normalised image as logit."""
    settings = SegmentationSettings(
        diameter_px=8.0, nucleus_diameter_um=8.0, skip_empty=False, precision="float32"
    )
    image = noisy_spots()
    padded = np.pad(image, ((0, 0), (8, 8), (8, 8)), constant_values=fill)
    size = VoxelSize(1, 1, 1)
    alone, _ = predict_flows(image, size, Networks(PositionNetwork()), settings, CPU)
    inside = (slice(None), slice(8, -8), slice(8, -8))
    found, _ = predict_flows(padded, size, Networks(PositionNetwork()), settings, CPU)
    np.testing.assert_allclose(found.logit[inside], alone.logit, atol=0.02)
    outside = np.ones(padded.shape, bool)
    outside[inside] = False
    assert (found.logit[outside] < -30).all()


def test_a_black_plane_is_seen_through():
    settings = SegmentationSettings(
        diameter_px=8.0, nucleus_diameter_um=8.0, skip_empty=False, precision="float32"
    )
    image = noisy_spots()
    image[5] = 0
    found, _ = predict_flows(image, VoxelSize(1, 1, 1), Networks(PositionNetwork()), settings, CPU)
    assert (found.logit[5, 14:18, 12:16] > 0.5).all()
    assert (found.logit > -30).all()
