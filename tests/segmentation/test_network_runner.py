from itertools import pairwise

import numpy as np
import pytest
import torch

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.planning import plan_architecture
from nuclei3d.segmentation.blocks import plan_blocks
from nuclei3d.segmentation.network_runner import (
    MAX_TILE,
    POOLING,
    TILE_OVERLAP,
    NetworkRunner,
    grow_to_lattice,
    tile_plane,
    tile_volume,
)
from oracle_network import LocalNetwork

CPU = torch.device("cpu")


@pytest.mark.parametrize("length", [520, 704, 960, 1032, 3000])
def test_tiles_of_a_plane_cover_every_pixel_with_weights_that_add_up_to_one(length):
    tiling = tile_plane((24, length), MAX_TILE["cpu"])
    assert all(rows == slice(0, 24) for rows, _ in tiling.boxes)
    parts = [columns for _, columns in tiling.boxes]
    assert all(part.start % POOLING == 0 and part.stop - part.start == tiling.size[1] for part in parts)
    assert (parts[0].start, parts[-1].stop) == (0, length)
    total = np.zeros((24, length))
    for box in tiling.boxes:
        total[box] += tiling.weight(box)
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert tiling.size[1] <= MAX_TILE["cpu"]
    assert all(a.stop - b.start >= TILE_OVERLAP for a, b in pairwise(parts))


@pytest.mark.parametrize("lengths", [(5, 9, 30), (51, 124, 127), (7, 300, 40)])
def test_patches_cover_a_box_of_a_volume_with_weights_that_add_up_to_one(lengths):
    multiple = plan_architecture(2.2).multiple
    box = tuple(slice(3, 3 + length) for length in lengths)
    tiling = tile_volume(box, multiple, (8, 32, 32), (5.0, 10.0, 10.0), 16 * 48 * 48)
    total = np.zeros([part.stop for part in box], np.float32)
    for place in tiling.boxes:
        total[place] += tiling.weight(place)
    np.testing.assert_allclose(total[box], 1, atol=1e-5)
    assert total.sum() == pytest.approx(np.prod(lengths), rel=1e-4)
    assert all(size % factor == 0 for size, factor in zip(tiling.size, multiple, strict=True))


@pytest.mark.parametrize("shape", [(530, 40), (41, 601), (517, 523)])
def test_a_plane_in_tiles_is_the_plane_as_a_whole(shape):
    plane = np.random.default_rng(0).random((1, *shape)).astype(np.float32)
    tiled = NetworkRunner(LocalNetwork(), CPU)(plane)
    with torch.no_grad():
        whole = LocalNetwork()(torch.from_numpy(np.stack([plane[0], 0 * plane[0]])[None]))[0].numpy()
    whole[:2] /= 5
    np.testing.assert_allclose(tiled[0][:, 2:-2, 2:-2], whole[:, 2:-2, 2:-2], atol=1e-5)


def test_a_long_thin_plane_of_any_height_fits_the_network():
    plane = np.zeros((1, 41, 521), np.float32)
    assert NetworkRunner(new_network(17, 0), CPU, engine="torch")(plane).shape == (1, 3, 41, 521)


def test_padding_is_cut_off_again():
    plane = np.random.default_rng(0).random((2, 21, 35)).astype(np.float32)
    runner = NetworkRunner(LocalNetwork(), CPU)
    assert runner(plane).shape == (2, 3, 21, 35)
    assert runner.pixels == 2 * 24 * 40


def test_flip_average_is_the_mean_over_the_four_flips_of_the_plane():
    network = new_network(17, seed=0)
    plane = np.random.default_rng(0).random((1, 32, 48)).astype(np.float32)
    once = NetworkRunner(network, CPU)
    expected = np.zeros((1, 3, 32, 48), np.float32)
    for flip_y in (1, -1):
        for flip_x in (1, -1):
            output = once(np.ascontiguousarray(plane[:, ::flip_y, ::flip_x]))[:, :, ::flip_y, ::flip_x]
            expected += output * np.array([flip_y, flip_x, 1], np.float32)[:, None, None] / 4
    averaged = NetworkRunner(network, CPU, flip_average=True)(plane)
    np.testing.assert_allclose(averaged, expected, atol=1e-5)


@pytest.mark.parametrize("pixels", [1.0, 0.5, 2.0, 17 / 20.7, 5.75])
def test_parts_start_on_the_lattice_and_hold_what_they_held(pixels: float) -> None:
    for start, stop in [(0, 50), (3, 60), (37, 90), (61, 200), (64, 199)]:
        grown = grow_to_lattice(slice(start, stop), 200, pixels)
        assert grown.start <= start <= stop <= grown.stop <= 200
        assert start - grown.start <= max(4, np.ceil(16 / pixels))
        off = grown.start * pixels / 8
        assert abs(off - round(off)) * 8 < 0.45 * max(1, pixels)
        length = (grown.stop - grown.start) * pixels
        assert grown.stop == 200 or abs(length - round(length)) < 0.2
    assert grow_to_lattice(slice(24, 61), 200) == slice(24, 61)


def test_a_part_for_two_networks_starts_as_near_to_both_lattices_as_it_can() -> None:
    grown = grow_to_lattice(slice(47, 90), 200, (1.0, 0.5))
    assert grown == slice(32, 90)
    both = grow_to_lattice(slice(61, 120), 200, (17 / 20.7, 1.0))
    worst = [max(abs(s * p / 8 - round(s * p / 8)) for p in (17 / 20.7, 1.0)) for s in range(61, 41, -1)]
    assert worst[61 - both.start] == min(worst)
    assert both.start <= 61 < 120 <= both.stop


def test_a_part_on_the_lattice_is_predicted_as_in_the_whole() -> None:
    network = new_network(17.0, seed=0)
    network.style_on = False
    runner = NetworkRunner(network, CPU, engine="torch")
    rng = np.random.default_rng(0)
    plane = np.cumsum(rng.normal(size=(1, 48, 240)), axis=2).astype(np.float32)
    plane = (plane - plane.mean()) / plane.std()
    whole = runner(plane)[0, :, :, 160:200]
    part = grow_to_lattice(slice(75, 240), 240)
    on = runner(plane[:, :, part])[0, :, :, 160 - part.start : 200 - part.start]
    off = runner(plane[:, :, 75:])[0, :, :, 160 - 75 : 200 - 75]
    assert part == slice(72, 240)
    assert np.abs(on - whole).max() < 0.02 * np.abs(off - whole).max()


def test_blocks_on_the_lattice_fit_into_memory_too() -> None:
    size, pixels = VoxelSize(2, 1, 1), (1.64, 0.82, 0.82)
    blocks = plan_blocks((40, 200, 300), size, 20.0, 400_000, pixels)
    assert len(blocks) > 2
    assert max(block.voxels for block in blocks) <= 400_000
    for block in blocks:
        for outer, core, ratio in zip(block.outer, block.core, pixels, strict=True):
            assert outer.start <= core.start < core.stop <= outer.stop
            off = outer.start * ratio / 8
            assert abs(off - round(off)) * 8 < 0.45 * max(1, ratio)
