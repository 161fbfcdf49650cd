"""A 2D network on planes and a 3D network together: no nucleus is lost, and each sees what it knows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle_network import OracleNetwork, ball_labels
from torch import nn

from nuclei3d.errors import InputError
from nuclei3d.flows import flows_3d
from nuclei3d.grid import IntensityRange
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.unet3d import Architecture, VolumeNetwork, VolumeSpec
from nuclei3d.scoring.matching import average_precision, overlap_table
from nuclei3d.segmentation.network_pass import Networks
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.segmentation.settings import SegmentationSettings
from solid_oracle import SPEC, SolidOracle
from volumes_fixture import draw_volume

CPU = torch.device("cpu")
TINY = Architecture((4, 8), ((1, 2, 2),), ((1, 3, 3), (3, 3, 3)), 2)
SOLID = SegmentationSettings(
    mode="full3d",
    diameter_px=12.0,
    nucleus_diameter_um=12.0,
    intensity_range=IntensityRange(0.0, 1.0),
    precision="float32",
)
MIXED = replace(SOLID, mode="mixed", volume=SOLID)


class LabelReader(VolumeNetwork):
    """Reads labels from the image and answers with exact flows (times 5) and a logit of +-6."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        output = np.empty((len(image), 4, *image.shape[2:]), np.float32)
        for one, made in zip(image[:, 0].float().numpy(), output, strict=True):
            labels = np.rint(one).astype(np.int32)
            made[:3] = 5 * flows_3d(labels, VoxelSize(self.spec.anisotropy, 1.0, 1.0))
            made[3] = np.where(labels > 0, 6, -6)
        return torch.from_numpy(output)


def ap_of(truth: np.ndarray, labels: np.ndarray, iou: float = 0.75) -> float:
    return float(average_precision(overlap_table(truth.astype(np.uint32), labels), (iou,))[0])


@pytest.mark.parametrize("fusion", ["mean", "consensus"])
@pytest.mark.parametrize("anisotropy", [1.0, 2.2, 5.75])
def test_exact_flows_of_both_give_every_touching_nucleus_back(anisotropy, fusion):
    size = VoxelSize(anisotropy, 1.0, 1.0)
    truth = draw_volume(np.random.default_rng(0), size, (round(44 / anisotropy), 44, 50), 6)[1]
    result = Segmenter(
        Networks(
            OracleNetwork(separate=False), volume=LabelReader(VolumeSpec(TINY, anisotropy, (8, 16, 16)))
        ),
        replace(MIXED, fusion=fusion),
        CPU,
    ).segment(truth.astype(np.float32), size)
    assert ap_of(truth, result.labels) == 1.0
    assert len(result.nuclei) == truth.max()
    assert {"network", "views", "masks", "total"} <= set(result.seconds)


def separate_balls(edges: tuple[float, float, float]) -> np.ndarray:
    shape = (int(60 / edges[0]), 60, 64)
    centres = np.array([(30, 15, 15), (30, 15, 45), (28, 44, 20), (33, 44, 48)], float)
    return ball_labels(shape, centres, np.array([11, 10, 12, 11.5]), edges)


@pytest.mark.parametrize(("anisotropy", "scale"), [(2.0, 1.3), (2.0, 0.7), (5.0, 1.0), (1.0, 0.8)])
def test_networks_of_other_scale_and_other_planes_meet_on_the_grid_of_the_views(anisotropy, scale):
    """The 3D network was trained at anisotropy 2: planes farther apart or closer are resampled for it."""
    size = VoxelSize(anisotropy, 1.0, 1.0)
    truth = separate_balls(size.zyx)
    settings = replace(MIXED, diameter_px=22.0, nucleus_diameter_um=22.0)
    solid = replace(SOLID, diameter_px=22.0 * scale, nucleus_diameter_um=22.0)
    image = (truth > 0).astype(np.float32)
    networks = (OracleNetwork(separate=True), SolidOracle(SPEC))
    settings = replace(settings, volume=solid)
    flows = Segmenter(Networks(networks[0], volume=networks[1]), settings, CPU).flows(image, size)
    alone = Segmenter(networks[0], replace(settings, mode="ortho", volume=None), CPU).flows(image, size)
    assert flows.shape == alone.shape
    assert flows.voxel_size == alone.voxel_size
    result = Segmenter(Networks(networks[0], volume=networks[1]), settings, CPU).segment(image, size)
    assert ap_of(truth, result.labels) == 1.0


def test_the_3d_network_gives_the_way_in_z_that_xy_planes_do_not_show():
    size = VoxelSize(2.0, 1.0, 1.0)
    truth = draw_volume(np.random.default_rng(1), size, (22, 44, 44), 6)[1]
    image, settings = truth.astype(np.float32), replace(MIXED, views=("xy",))
    flat, solid = OracleNetwork(separate=False), LabelReader(VolumeSpec(TINY, 2.0, (8, 16, 16)))
    flow = Segmenter(Networks(flat, volume=solid), settings, CPU).flows(image, size).flow
    alone = Segmenter(flat, replace(settings, mode="ortho", volume=None), CPU).flows(image, size).flow
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
    settings = replace(MIXED, volume=replace(SOLID, intensity_range=IntensityRange(0.0, 4.0)))
    flat, solid = Brightest().train(), BrightestVolume(SPEC).train()
    seen: list[float] = []
    Segmenter(Networks(flat, volume=solid), settings, CPU).flows(image, VoxelSize(2, 1, 1), seen.append)
    assert (flat.seen, solid.seen) == pytest.approx((2.0, 0.5))
    assert flat.training
    assert solid.training
    assert seen == sorted(seen)
    assert max(seen) < 1


@pytest.mark.parametrize(
    ("network", "volume", "settings", "message"),
    [
        (OracleNetwork(separate=True), None, MIXED, "needs a 3D network beside"),
        (OracleNetwork(separate=True), OracleNetwork(separate=True), MIXED, "needs a 3D network beside"),
        (OracleNetwork(separate=True), SolidOracle(SPEC), replace(MIXED, volume=None), "needs a 3D network"),
        (SolidOracle(SPEC), SolidOracle(SPEC), MIXED, "needs a 2D network"),
    ],
)
def test_what_does_not_mix_is_refused_in_one_line(network, volume, settings, message):
    with pytest.raises(InputError, match=message) as raised:
        Segmenter(Networks(network, volume=volume), settings, CPU).segment(
            np.zeros((8, 32, 32)), VoxelSize(2, 1, 1)
        )
    assert "\n" not in str(raised.value)
