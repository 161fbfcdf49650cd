from dataclasses import replace

import numpy as np
import pytest
import torch

from nuclei3d.errors import InputError
from nuclei3d.flows import flows_3d
from nuclei3d.grid import IntensityRange
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.planning import plan_architecture
from nuclei3d.networks.unet3d import Architecture, VolumeNetwork, VolumeSpec, new_volume_network
from nuclei3d.scoring.matching import average_precision, overlap_table
from nuclei3d.segmentation import patches as patch_flows
from nuclei3d.segmentation.patches import PatchTiling, directions_from_tanh, predict_patch_flows, volume_grid
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.segmentation.settings import SegmentationSettings
from volumes_fixture import draw_volume

CPU = torch.device("cpu")
TINY = Architecture((4, 8), ((1, 2, 2),), ((1, 3, 3), (3, 3, 3)), 2)
SETTINGS = SegmentationSettings(
    mode="full3d",
    diameter_px=12.0,
    nucleus_diameter_um=12.0,
    intensity_range=IntensityRange(0.0, 1.0),
    precision="float32",
)


class Oracle(VolumeNetwork):
    """Reads labels from the image and answers with exact flows (times 5) and a logit of +-6."""

    def __init__(self, anisotropy: float, patch=(8, 16, 16), targets="heat") -> None:
        super().__init__(VolumeSpec(TINY, anisotropy, patch, targets))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(image.shape[2:]))
        output = np.empty((len(image), 4, *image.shape[2:]), np.float32)
        for one, made in zip(image[:, 0].float().numpy(), output, strict=True):
            labels = np.rint(one).astype(np.int32)
            made[:3] = 5 * flows_3d(labels, VoxelSize(self.spec.anisotropy, 1.0, 1.0))
            made[3] = np.where(labels > 0, 6, -6)
        return torch.from_numpy(output)


def drawn_labels(voxel_size, shape, nuclei=6, seed=0):
    return draw_volume(np.random.default_rng(seed), voxel_size, shape, nuclei)[1]


def ap_of(truth, labels):
    return float(average_precision(overlap_table(truth.astype(np.uint32), labels), (0.75,))[0])


@pytest.mark.parametrize("anisotropy", [1.0, 2.2, 5.75])
def test_exact_flows_give_every_nucleus_back(anisotropy):
    size = VoxelSize(anisotropy, 1.0, 1.0)
    truth = drawn_labels(size, (round(44 / anisotropy), 44, 50))
    result = Segmenter(Oracle(anisotropy), SETTINGS, CPU).segment(truth.astype(np.float32), size)
    assert ap_of(truth, result.labels) == 1.0
    assert len(result.nuclei) == truth.max()
    assert {"network", "views", "masks", "total"} <= set(result.seconds)


def test_patches_are_blended_into_the_same_nuclei(monkeypatch):
    size = VoxelSize(2.0, 1.0, 1.0)
    truth = drawn_labels(size, (40, 70, 66), nuclei=14)
    monkeypatch.setitem(patch_flows.MAX_VOXELS, "cpu", 20 * 40 * 40)
    network = Oracle(2.0, patch=(12, 24, 24))
    result = Segmenter(network, SETTINGS, CPU).segment(truth.astype(np.float32), size)
    assert len(network.shapes) > 4
    assert ap_of(truth, result.labels) == 1.0


def test_many_patches_say_what_one_says(monkeypatch):
    # away from their borders patches of a network of small reach agree, whatever their number
    size = VoxelSize(2.0, 1.0, 1.0)
    image = np.random.default_rng(0).random((24, 64, 64)).astype(np.float32)
    network = new_volume_network(VolumeSpec(TINY, 2.0, (8, 32, 32)), 0)
    settings = replace(SETTINGS, skip_empty=False)
    whole = predict_patch_flows(image, size, network, settings, CPU)
    monkeypatch.setitem(patch_flows.MAX_VOXELS, "cpu", 16 * 48 * 48)
    parts = predict_patch_flows(image, size, network, settings, CPU)
    assert np.median(np.abs(whole.flow - parts.flow)) < 2e-3
    assert np.quantile(np.abs(whole.logit.astype(np.float32) - parts.logit), 0.99) < 0.05


@pytest.mark.parametrize("lengths", [(5, 9, 30), (51, 124, 127), (7, 300, 40)])
def test_weights_add_up_to_one_all_over_the_box(lengths):
    spec = VolumeSpec(plan_architecture(2.2), 2.2, (8, 32, 32))
    box = tuple(slice(3, 3 + length) for length in lengths)
    tiling = PatchTiling(box, spec, (5.0, 10.0, 10.0), 16 * 48 * 48)
    total = np.zeros([part.stop for part in box], np.float32)
    for place in tiling.places:
        total[place] += tiling.weight(place)
    np.testing.assert_allclose(total[box], 1, atol=1e-5)
    assert total.sum() == pytest.approx(np.prod(lengths), rel=1e-4)
    assert all(size % m == 0 for size, m in zip(tiling.size, spec.architecture.multiple, strict=True))


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
    result = Segmenter(Oracle(2.0), settings, CPU).segment(truth.astype(np.float32), size)
    assert ap_of(truth, result.labels) == 1.0


def test_empty_space_is_not_computed():
    size = VoxelSize(2.0, 1.0, 1.0)
    image = np.zeros((30, 120, 120), np.float32)
    image[4:8, 10:22, 10:22] = 1
    network = Oracle(2.0)
    flows = predict_patch_flows(image, size, network, SETTINGS, CPU)
    assert np.prod(network.shapes[0]) < image.size / 4
    assert flows.logit[29, 110, 110] == patch_flows.EMPTY_LOGIT
    dark = predict_patch_flows(image * 0, size, network, SETTINGS, CPU)
    assert (dark.logit == patch_flows.EMPTY_LOGIT).all()


def test_flips_average_to_a_network_that_does_not_care_about_sides():
    size = VoxelSize(2.0, 1.0, 1.0)
    image = np.random.default_rng(0).random((8, 16, 16)).astype(np.float32)
    network = new_volume_network(VolumeSpec(TINY, 2.0, (8, 16, 16)), 0)
    settings = replace(SETTINGS, flip_average=True, skip_empty=False)
    plain = predict_patch_flows(image, size, network, settings, CPU)
    for axis in range(3):
        turned = predict_patch_flows(np.flip(image, axis).copy(), size, network, settings, CPU)
        back = np.flip(turned.flow, axis + 1).copy()
        back[axis] *= -1
        np.testing.assert_allclose(back, plain.flow, atol=2e-3)
        np.testing.assert_allclose(np.flip(turned.logit, axis), plain.logit, atol=5e-3)
    alone = predict_patch_flows(image, size, network, replace(settings, flip_average=False), CPU)
    assert not np.allclose(alone.flow, plain.flow, atol=2e-3)


def test_training_mode_is_left_as_it_was():
    network = new_volume_network(VolumeSpec(TINY, 2.0, (8, 16, 16)), 0).train()
    predict_patch_flows(np.ones((8, 16, 16)), VoxelSize(2.0, 1.0, 1.0), network, SETTINGS, CPU)
    assert network.training


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


@pytest.mark.parametrize(
    ("network", "mode", "message"),
    [
        (lambda: new_network(12.0, 0), "full3d", "3D network.*use ortho or stitch"),
        (lambda: Oracle(2.0), "ortho", "2D network.*use full3d"),
        (lambda: Oracle(2.0), "stitch", "2D network.*use full3d"),
    ],
)
def test_a_mode_for_another_kind_of_network_is_refused_in_one_line(network, mode, message):
    with pytest.raises(InputError, match=message) as raised:
        Segmenter(network(), replace(SETTINGS, mode=mode), CPU).segment(
            np.zeros((8, 32, 32)), VoxelSize(2, 1, 1)
        )
    assert "\n" not in str(raised.value)


def test_the_engine_for_planes_is_refused():
    with pytest.raises(InputError, match="openvino"):
        Segmenter(Oracle(2.0), replace(SETTINGS, engine="openvino"), CPU).segment(
            np.zeros((8, 32, 32)), VoxelSize(2, 1, 1)
        )
