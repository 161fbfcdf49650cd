"""The sums that a GPU keeps are those of the host; what follows runs on the CPU as well."""

import numpy as np
import pytest
import torch

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import IntensityRange
from nuclei3d.segmentation import network_pass
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.foreground import OccupiedSpace, everywhere
from nuclei3d.segmentation.fusion import add_views
from nuclei3d.segmentation.network_pass import compute_view, fits_on, sum_on_device, whole_planes
from nuclei3d.segmentation.network_runner import NetworkRunner
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.segmentation.settings import SegmentationSettings
from nuclei3d.views import VIEWS
from oracle_network import LocalNetwork, OracleNetwork, VolumeOracle, separate_balls

SIZE = VoxelSize(2, 1, 1)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def two_corners(shape: tuple[int, int, int]) -> OccupiedSpace:
    """Something in two opposite corners, nothing in the planes between them."""
    blocks = np.zeros((3, 3, 3), bool)
    blocks[0, 0, 0] = blocks[2, 2, 2] = True
    z, y, x = (np.linspace(0, size, 4).round().astype(np.intp) for size in shape)
    return OccupiedSpace(blocks, (z, y, x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("trust", [None, (3.0, 1.0, 0.5)])
@pytest.mark.parametrize("occupied", [everywhere, two_corners])
def test_the_sum_on_a_device_is_that_of_the_host(device, step, trust, occupied):
    image = np.random.default_rng(0).random((9, 40, 37)).astype(np.float32)
    image[3, 5, 6] = np.nan
    space, on = occupied(image.shape), torch.device(device)
    runner = NetworkRunner(LocalNetwork(), on, engine="torch")
    weights = dict(zip(VIEWS, trust or (1.0, 1.0, 1.0), strict=True))
    steps = {"xy": 1, "xz": step, "yz": step}
    done = {view: [] for view in VIEWS}

    def computed(view, where=on):
        shown = torch.from_numpy(image).to(where)
        return compute_view(shown, view, runner, space, 18, steps[view], done[view].append)

    expected = FlowField.zeros(image.shape, SIZE)
    host = torch.device("cpu")
    add_views(expected, lambda view: whole_planes(computed(view, host), view, image.shape), weights)
    for shares in done.values():
        assert shares == sorted(shares)
        assert shares[-1] == 1
    found = sum_on_device(computed, weights, steps, image.shape, SIZE, on).fetch()
    assert found.voxel_size == SIZE
    # each view is rounded to a unit on the host, and a GPU multiplies in ten bits
    tolerance = 3 if device == "cpu" else 200
    assert np.abs(found.packed.astype(int) - expected.packed.astype(int)).max() <= tolerance


@pytest.mark.parametrize("mode", ["ortho", "stitch", "full3d"])
def test_what_is_computed_on_a_device_alone_gives_the_nuclei_of_the_host(mode, monkeypatch):
    edges = (4.0, 1.0, 1.0)
    image = 1000 * (separate_balls(edges) > 0).astype(np.float32)
    image[:, :, :4] = np.nan
    network = VolumeOracle() if mode == "full3d" else OracleNetwork(separate=True)
    settings = SegmentationSettings(
        mode=mode, nucleus_diameter_um=22, diameter_px=12, intensity_range=IntensityRange(0, 1000)
    )
    segmenter = Segmenter(network, settings, torch.device("cpu"))
    expected = segmenter.segment(image, edges)
    monkeypatch.setattr(network_pass, "fits_on", lambda *_: True)
    found = segmenter.segment(image, edges)
    assert expected.labels.max() == 4
    assert (found.labels != expected.labels).mean() < 1e-3
    np.testing.assert_allclose(found.scores, expected.scores, atol=5e-3)
    assert set(found.seconds) == {"network", "views", "masks", "total"}
    assert isinstance(segmenter.flows(image, edges), FlowField)


def test_nothing_fits_on_a_device_that_is_no_gpu():
    assert not fits_on(torch.device("cpu"), (1, 1, 1))
