import numpy as np
import pytest
import torch

from nuclei3d.networks.cpnet import new_network
from nuclei3d.segmentation.network_runner import NetworkRunner
from nuclei3d.segmentation.tiling import grow_to_lattice
from oracle_network import LocalNetwork

CPU = torch.device("cpu")


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


def test_where_rows_are_z_planes_are_not_turned_over():
    network = new_network(17, seed=0)
    plane = torch.from_numpy(np.random.default_rng(0).random((1, 32, 48)).astype(np.float32))
    once = NetworkRunner(network, CPU)
    turned = once.run(plane.flip(2)).flip(3) * torch.tensor([1, -1, 1])[:, None, None]
    averaged = NetworkRunner(network, CPU, flip_average=True).run(plane, upright=True)
    torch.testing.assert_close(averaged, (once.run(plane) + turned) / 2, atol=1e-5, rtol=0)


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
