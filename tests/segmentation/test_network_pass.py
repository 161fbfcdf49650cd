"""The network pass with a 3D network: alone, and together with a 2D network on planes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from nuclei3d.errors import InputError
from nuclei3d.flows import flows_3d
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import IntensityRange
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.unet3d import VolumeNetwork, VolumeSpec, new_volume_network
from nuclei3d.scoring.matching import average_precision, overlap_table
from nuclei3d.segmentation.network_pass import (
    EMPTY_LOGIT,
    Networks,
    directions_from_tanh,
    predict_flows,
    volume_grid,
)
from nuclei3d.segmentation.network_runner import MAX_VOXELS
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.segmentation.settings import SegmentationSettings
from oracle_network import SPEC, TINY, OracleNetwork, VolumeOracle, separate_balls
from volumes_fixture import draw_volume

CPU = torch.device("cpu")
SETTINGS = SegmentationSettings(
    mode="full3d",
    diameter_px=12.0,
    nucleus_diameter_um=12.0,
    intensity_range=IntensityRange(0.0, 1.0),
    precision="float32",
)
MIXED = replace(SETTINGS, mode="mixed", volume=SETTINGS)


def flows_of(image, size, network, settings, volume=None):
    return predict_flows(image, size, Networks(network, volume=volume), settings, CPU)[0]


def exact_network(anisotropy, patch=(8, 16, 16)):
    return VolumeOracle(VolumeSpec(TINY, anisotropy, patch), separate=False)


def drawn_labels(voxel_size, shape, nuclei=6, seed=0):
    return draw_volume(np.random.default_rng(seed), voxel_size, shape, nuclei)[1]


def ap_of(truth, labels):
    return float(average_precision(overlap_table(truth.astype(np.uint32), labels), (0.75,))[0])


@pytest.mark.parametrize("anisotropy", [1.0, 2.2, 5.75])
def test_exact_flows_give_every_nucleus_back(anisotropy):
    size = VoxelSize(anisotropy, 1.0, 1.0)
    truth = drawn_labels(size, (round(44 / anisotropy), 44, 50))
    result = Segmenter(exact_network(anisotropy), SETTINGS, CPU).segment(truth.astype(np.float32), size)
    assert ap_of(truth, result.labels) == 1.0
    assert len(result.nuclei) == truth.max()
    assert {"network", "views", "masks", "total"} <= set(result.seconds)


def test_patches_are_blended_into_the_same_nuclei(monkeypatch):
    size = VoxelSize(2.0, 1.0, 1.0)
    truth = drawn_labels(size, (40, 70, 66), nuclei=14)
    monkeypatch.setitem(MAX_VOXELS, "cpu", 20 * 40 * 40)
    network = exact_network(2.0, patch=(12, 24, 24))
    result = Segmenter(network, SETTINGS, CPU).segment(truth.astype(np.float32), size)
    assert len(network.shapes) > 4
    assert ap_of(truth, result.labels) == 1.0


def test_many_patches_say_what_one_says(monkeypatch):
    # away from their borders patches of a network of small reach agree, whatever their number
    size = VoxelSize(2.0, 1.0, 1.0)
    image = np.random.default_rng(0).random((24, 64, 64)).astype(np.float32)
    network = new_volume_network(VolumeSpec(TINY, 2.0, (8, 32, 32)), 0)
    settings = replace(SETTINGS, skip_empty=False)
    whole = flows_of(image, size, network, settings)
    monkeypatch.setitem(MAX_VOXELS, "cpu", 16 * 48 * 48)
    parts = flows_of(image, size, network, settings)
    assert np.median(np.abs(whole.flow - parts.flow)) < 2e-3
    assert np.quantile(np.abs(whole.logit.astype(np.float32) - parts.logit), 0.99) < 0.05


def test_the_grid_has_the_images_own_planes_or_those_of_the_training():
    settings = SETTINGS
    grid, size = volume_grid((10, 80, 80), VoxelSize(2.01, 0.5, 0.5), settings, 2.0)
    assert grid == (10, 40, 40)
    # twice as far apart as in training: planes are put between
    grid, size = volume_grid((10, 80, 80), VoxelSize(4.0, 0.5, 0.5), settings, 2.0)
    assert grid == (20, 40, 40)
    assert size.anisotropy == pytest.approx(2.0)


def test_planes_closer_than_in_training_are_found_all_the_same():
    size = VoxelSize(1.0, 1.0, 1.0)
    truth = drawn_labels(size, (44, 44, 44))
    settings = replace(SETTINGS, intensity_range=IntensityRange(0.0, 1.0))
    # one nucleus value for all, so that averaging planes invents no labels
    truth[truth > 1] = 0
    result = Segmenter(exact_network(2.0), settings, CPU).segment(truth.astype(np.float32), size)
    assert ap_of(truth, result.labels) == 1.0


def test_empty_space_is_not_computed():
    size = VoxelSize(2.0, 1.0, 1.0)
    image = np.zeros((30, 120, 120), np.float32)
    image[4:8, 10:22, 10:22] = 1
    network = exact_network(2.0)
    flows = flows_of(image, size, network, SETTINGS)
    assert np.prod(network.shapes[0]) < image.size / 4
    assert flows.logit[29, 110, 110] == EMPTY_LOGIT
    dark = flows_of(image * 0, size, network, SETTINGS)
    assert (dark.logit == EMPTY_LOGIT).all()


def test_flips_average_to_a_network_that_does_not_care_about_sides():
    size = VoxelSize(2.0, 1.0, 1.0)
    image = np.random.default_rng(0).random((8, 16, 16)).astype(np.float32)
    network = new_volume_network(VolumeSpec(TINY, 2.0, (8, 16, 16)), 0)
    settings = replace(SETTINGS, flip_average=True, skip_empty=False)
    plain = flows_of(image, size, network, settings)
    for axis in (1, 2):
        turned = flows_of(np.flip(image, axis).copy(), size, network, settings)
        back = np.flip(turned.flow, axis + 1).copy()
        back[axis] *= -1
        np.testing.assert_allclose(back, plain.flow, atol=2e-3)
        np.testing.assert_allclose(np.flip(turned.logit, axis), plain.logit, atol=5e-3)
    alone = flows_of(image, size, network, replace(settings, flip_average=False))
    assert not np.allclose(alone.flow, plain.flow, atol=2e-3)


def test_tanh_of_the_distance_leads_to_the_centre():
    size = VoxelSize(3.0, 1.0, 1.0)
    at = np.stack(np.indices((7, 21, 21))).astype(np.float32)
    centre = np.array([3, 10, 10], np.float32).reshape(3, 1, 1, 1)
    flow = directions_from_tanh(np.tanh((centre - at) / 5), size).astype(np.float32)
    way = (centre - at) * np.array(size.zyx, np.float32).reshape(3, 1, 1, 1)
    length = np.sqrt((way**2).sum(0))
    far = length > 2
    cosine = (flow * way).sum(0)[far] / (length * np.linalg.norm(flow, axis=0))[far]
    assert cosine.min() > 0.999
    assert np.linalg.norm(flow, axis=0)[far] == pytest.approx(1, abs=2e-3)
    assert not flow[:, 3, 10, 10].any()


@pytest.mark.parametrize("fusion", ["mean", "consensus"])
@pytest.mark.parametrize("anisotropy", [1.0, 2.2, 5.75])
def test_exact_flows_of_both_give_every_touching_nucleus_back(anisotropy, fusion):
    size = VoxelSize(anisotropy, 1.0, 1.0)
    truth = drawn_labels(size, (round(44 / anisotropy), 44, 50))
    result = Segmenter(
        Networks(OracleNetwork(separate=False), volume=exact_network(anisotropy)),
        replace(MIXED, fusion=fusion),
        CPU,
    ).segment(truth.astype(np.float32), size)
    assert ap_of(truth, result.labels) == 1.0
    assert len(result.nuclei) == truth.max()
    assert {"network", "views", "masks", "total"} <= set(result.seconds)


@pytest.mark.parametrize(("anisotropy", "scale"), [(2.0, 1.3), (2.0, 0.7), (5.0, 1.0), (1.0, 0.8)])
def test_networks_of_other_scale_and_other_planes_meet_on_the_grid_of_the_views(anisotropy, scale):
    """The 3D network was trained at anisotropy 2: planes farther apart or closer are resampled for it."""
    size = VoxelSize(anisotropy, 1.0, 1.0)
    truth = separate_balls(size.zyx)
    settings = replace(MIXED, diameter_px=22.0, nucleus_diameter_um=22.0)
    solid = replace(SETTINGS, diameter_px=22.0 * scale, nucleus_diameter_um=22.0)
    image = (truth > 0).astype(np.float32)
    networks = (OracleNetwork(separate=True), VolumeOracle())
    settings = replace(settings, volume=solid)
    flows = flows_of(image, size, networks[0], settings, networks[1])
    alone = flows_of(image, size, networks[0], replace(settings, mode="ortho", volume=None))
    assert flows.shape == alone.shape
    assert flows.voxel_size == alone.voxel_size
    result = Segmenter(Networks(networks[0], volume=networks[1]), settings, CPU).segment(image, size)
    assert ap_of(truth, result.labels) == 1.0


def test_the_3d_network_gives_the_way_in_z_that_xy_planes_do_not_show():
    size = VoxelSize(2.0, 1.0, 1.0)
    truth = drawn_labels(size, (22, 44, 44), seed=1)
    image, settings = truth.astype(np.float32), replace(MIXED, views=("xy",))
    flat, solid = OracleNetwork(separate=False), exact_network(2.0)
    flow = flows_of(image, size, flat, settings, solid).flow
    alone = flows_of(image, size, flat, replace(settings, mode="ortho", volume=None)).flow
    exact = flows_3d(truth.astype(np.int32), size)
    assert not alone[0].any()
    np.testing.assert_allclose(flow[0], exact[0], atol=1e-3)
    np.testing.assert_allclose(flow[1:], (exact[1:] + alone[1:]) / 2, atol=1e-3)


class Brightest(nn.Module):
    """Says nothing, and remembers the brightest it was shown."""

    seen = -np.inf

    def forward(self, stack: torch.Tensor) -> torch.Tensor:
        self.seen = max(self.seen, float(stack.max()))
        return torch.zeros(len(stack), 3, *stack.shape[2:])


class BrightestVolume(VolumeNetwork):
    seen = -np.inf

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.seen = max(self.seen, float(image.max()))
        return torch.zeros(len(image), 4, *image.shape[2:])


def test_each_network_sees_the_image_normalised_as_in_its_own_training():
    image = np.zeros((10, 30, 30), np.float32)
    image[3:7, 8:20, 8:20] = 2.0
    settings = replace(MIXED, volume=replace(SETTINGS, intensity_range=IntensityRange(0.0, 4.0)))
    flat, solid = Brightest().train(), BrightestVolume(SPEC).train()
    seen: list[float] = []
    predict_flows(image, VoxelSize(2, 1, 1), Networks(flat, volume=solid), settings, CPU, seen.append)
    assert (flat.seen, solid.seen) == pytest.approx((2.0, 0.5))
    assert flat.training
    assert solid.training
    assert seen == sorted(seen)
    assert max(seen) < 1


@pytest.mark.parametrize(
    ("network", "volume", "settings", "message"),
    [
        (new_network(12.0, 0), None, SETTINGS, "3D network.*use ortho or stitch"),
        (VolumeOracle(), None, replace(SETTINGS, mode="ortho"), "2D network.*use full3d"),
        (VolumeOracle(), None, replace(SETTINGS, mode="stitch"), "2D network.*use full3d"),
        (VolumeOracle(), None, replace(SETTINGS, engine="openvino"), "openvino"),
        (OracleNetwork(separate=True), None, MIXED, "needs a 3D network beside"),
        (OracleNetwork(separate=True), OracleNetwork(separate=True), MIXED, "needs a 3D network beside"),
        (OracleNetwork(separate=True), VolumeOracle(), replace(MIXED, volume=None), "needs a 3D network"),
        (VolumeOracle(), VolumeOracle(), MIXED, "needs a 2D network"),
    ],
)
def test_networks_and_modes_that_do_not_go_together_are_refused(network, volume, settings, message):
    segmenter = Segmenter(Networks(network, volume=volume), settings, CPU)
    with pytest.raises(InputError, match=message) as raised:
        segmenter.segment(np.zeros((8, 32, 32)), VoxelSize(2, 1, 1))
    assert "\n" not in str(raised.value)
