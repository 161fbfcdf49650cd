from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracle_network import OracleNetwork, ball_labels
from torch import nn

from nuclei3d.grid import IntensityRange
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import new_network
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.foreground import everywhere, find_occupied, occupied_space
from nuclei3d.segmentation.fusion import ViewPrediction, VolumeLook, fuse_views
from nuclei3d.segmentation.plane_network import (
    MAX_TILE,
    POOLING,
    TILE_OVERLAP,
    PlaneNetwork,
    tile_starts,
)
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.segmentation.settings import SegmentationSettings
from nuclei3d.segmentation.views import VIEW_AXIS, VIEWS, FlowAccumulator, computed_indices, predict_view

CPU = torch.device("cpu")


class Positions(nn.Module):
    """Answers with the coordinates of the pixel in the plane it is given, and the image as the logit."""

    def forward(self, stack: torch.Tensor) -> torch.Tensor:
        _, _, height, width = stack.shape
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grid = torch.stack([y, x]).float().expand(len(stack), 2, height, width)
        return torch.cat([5 * grid, stack[:, :1]], dim=1)


class Local(nn.Module):
    """A network that looks at 3 x 3 pixels only."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 2, 3, 3, generator=generator))

    def forward(self, stack: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(stack, self.weight, padding=1)


@pytest.mark.parametrize("view", VIEWS)
def test_planes_go_in_and_come_out_in_their_own_axes(view):
    image = np.random.default_rng(0).random((6, 20, 24)).astype(np.float32)
    planes = list(
        predict_view(image, view, PlaneNetwork(Positions(), CPU), everywhere(image.shape), stretched_depth=6)
    )
    axis = VIEW_AXIS[view]
    assert [plane.index for plane in planes] == list(range(image.shape[axis]))
    logit = np.stack([plane.output[2] for plane in planes], axis=axis)
    np.testing.assert_allclose(logit, image, rtol=1e-6)
    rows, columns = np.indices(planes[0].output.shape[1:])
    np.testing.assert_allclose(planes[3].output[0], rows, atol=1e-5)
    np.testing.assert_allclose(planes[3].output[1], columns, atol=1e-5)


def test_orthogonal_planes_are_stretched_to_cubic_voxels_and_xy_planes_are_not():
    image = np.zeros((5, 32, 48), np.float32)
    oracle = OracleNetwork(separate=True)
    for view in VIEWS:
        list(
            predict_view(image, view, PlaneNetwork(oracle, CPU), everywhere(image.shape), stretched_depth=29)
        )
    assert {shape[2:] for shape in oracle.shapes} == {(32, 48), (32, 48), (32, 32)}
    assert sum(shape[0] for shape in oracle.shapes) == 5 + 32 + 48


def test_thin_planes_are_padded_to_eight_not_to_a_tile_and_go_in_together():
    image = np.zeros((10, 64, 100), np.float32)
    oracle = OracleNetwork(separate=True)
    list(predict_view(image, "xz", PlaneNetwork(oracle, CPU), everywhere(image.shape), stretched_depth=10))
    assert {shape[2:] for shape in oracle.shapes} == {(16, 104)}
    assert len(oracle.shapes) == 1


@pytest.mark.parametrize("length", [513, 700, 960, 1025, 3000])
def test_tiles_cover_every_pixel_with_weights_that_add_up_to_one(length):
    tiling = tile_starts(length, MAX_TILE["cpu"])
    assert length <= tiling.length < length + POOLING
    total = np.zeros(tiling.length)
    for start in tiling.starts:
        assert start % 8 == 0
        total[start : start + tiling.size] += tiling.weight(start)
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert tiling.size <= MAX_TILE["cpu"]
    assert all(a + tiling.size - b >= TILE_OVERLAP for a, b in pairwise(tiling.starts))


def test_a_plane_in_tiles_is_the_plane_as_a_whole():
    plane = np.random.default_rng(0).random((1, 530, 40)).astype(np.float32)
    tiled = PlaneNetwork(Local(), CPU)(plane)
    with torch.no_grad():
        whole = Local()(torch.from_numpy(np.stack([plane[0], 0 * plane[0]])[None]))[0].numpy()
    whole[:2] /= 5
    np.testing.assert_allclose(tiled[0][:, 2:-2, 2:-2], whole[:, 2:-2, 2:-2], atol=1e-5)


def test_padding_is_cut_off_again():
    plane = np.random.default_rng(0).random((2, 21, 35)).astype(np.float32)
    runner = PlaneNetwork(Local(), CPU)
    assert runner(plane).shape == (2, 3, 21, 35)
    assert runner.pixels == 2 * 24 * 40


def test_flip_average_is_the_mean_over_the_four_flips_of_the_plane():
    network = new_network(17, seed=0)
    plane = np.random.default_rng(0).random((1, 32, 48)).astype(np.float32)
    once = PlaneNetwork(network, CPU)
    expected = np.zeros((1, 3, 32, 48), np.float32)
    for flip_y in (1, -1):
        for flip_x in (1, -1):
            output = once(np.ascontiguousarray(plane[:, ::flip_y, ::flip_x]))[:, :, ::flip_y, ::flip_x]
            expected += output * np.array([flip_y, flip_x, 1], np.float32)[:, None, None] / 4
    averaged = PlaneNetwork(network, CPU, flip_average=True)(plane)
    np.testing.assert_allclose(averaged, expected, atol=1e-5)


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
    planes = list(
        predict_view(
            image, "xz", PlaneNetwork(Positions(), CPU), everywhere(image.shape), stretched_depth=16, step=3
        )
    )
    assert [plane.index for plane in planes] == list(range(13))
    for plane in planes[1:12]:
        np.testing.assert_allclose(plane.output[2], 2 * plane.index, atol=1e-5)


@pytest.mark.parametrize("trust", [None, (3.0, 1.0, 0.5)])
@pytest.mark.parametrize("weight", [None, 1.5])
def test_the_accumulator_is_the_mean_fusion_of_whole_views(trust, weight):
    rng = np.random.default_rng(0)
    image = rng.random((5, 18, 20)).astype(np.float32)
    field = FlowField.zeros(image.shape, VoxelSize(1, 1, 1))
    volume = None
    if weight:
        solid = FlowField.of(rng.random((3, 10, 9, 10)), rng.random((10, 9, 10)), VoxelSize(0.5, 2, 2))
        volume = VolumeLook(solid, field.shape, field.voxel_size, weight)
    accumulator = FlowAccumulator(field, VIEWS, trust, volume)
    whole = []
    for view in VIEWS:
        planes = list(
            predict_view(image, view, PlaneNetwork(Local(), CPU), everywhere(image.shape), stretched_depth=11)
        )
        for plane in planes:
            accumulator.add(view, plane)
        output = np.stack([plane.output for plane in planes], axis=1 + VIEW_AXIS[view])
        whole.append(ViewPrediction(view, output[:2], output[2]))
    flow, logit = fuse_views(whole, "mean", dict(zip(VIEWS, trust, strict=True)) if trust else None, volume)
    np.testing.assert_allclose(field.flow, flow, atol=2e-4)
    np.testing.assert_allclose(field.logit, logit, atol=2e-3)


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
    assert occupied.share < 0.7
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
                box = occupied.box(axis, index, index)
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
    assert find_occupied(block, 2 / 405, (10, 10, 10)).share < 0.6
    assert occupied_space(block, intensity, voxels, voxels, 10.0).share == 1
    assert occupied_space(normalised, intensity, voxels, voxels, 10.0).share < 0.75


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
    monkeypatch.setattr("nuclei3d.segmentation.plane_network._PIXELS_PER_BATCH", {"cpu": 2**22})
    image = (((np.indices((96, 96, 96)) - 47.5) ** 2).sum(0) < 40**2).astype(np.float32)
    occupied = find_occupied(image, 0.0, (8, 8, 8))
    own = 0
    for index in range(96):
        box = occupied.box(VIEW_AXIS[view], index, index)
        # From the lattice of eight pixels, padded to a multiple of eight.
        sides = [-(-(part.stop - part.start // 8 * 8) // 8) * 8 for part in box or ()]
        own += int(np.prod(sides)) if sides else 0
    network = PlaneNetwork(Positions(), CPU)
    planes = list(predict_view(image, view, network, occupied, stretched_depth=96))
    assert [plane.index for plane in planes] == list(range(96))
    assert network.pixels <= 1.1 * own


def test_bfloat16_changes_flows_by_a_percent_at_most():
    image = np.random.default_rng(0).normal(0.3, 0.2, (6, 48, 48)).astype(np.float32)
    network = new_network(12, seed=0)
    common = dict(diameter_px=12, nucleus_diameter_um=12, intensity_range=IntensityRange(0, 1))
    fine = Segmenter(network, SegmentationSettings(precision="float32", **common), CPU).flows(
        image, VoxelSize(2, 1, 1)
    )
    coarse = Segmenter(network, SegmentationSettings(precision="bfloat16", **common), CPU).flows(
        image, VoxelSize(2, 1, 1)
    )
    assert np.abs(fine.flow - coarse.flow).max() < 0.03 * np.abs(fine.flow).max()
