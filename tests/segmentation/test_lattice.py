import numpy as np
import pytest
import torch

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import new_network
from nuclei3d.segmentation.blocks import plan_blocks
from nuclei3d.segmentation.plane_network import PlaneNetwork, grow_to_lattice


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
    runner = PlaneNetwork(network, torch.device("cpu"), engine="torch")
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
