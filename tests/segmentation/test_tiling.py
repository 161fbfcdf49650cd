from itertools import pairwise

import numpy as np
import pytest

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.planning import plan_architecture
from nuclei3d.segmentation.blocks import plan_blocks
from nuclei3d.segmentation.network_runner import MAX_TILE
from nuclei3d.segmentation.tiling import POOLING, TILE_OVERLAP, grow_to_lattice, tile_plane, tile_volume


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
