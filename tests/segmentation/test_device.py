"""Labels made in a device's memory are those of the host; torch's CPU device runs the same code."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from nuclei3d.flows import flows_3d
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation import masks
from nuclei3d.segmentation.dynamics import label_flows, masks_from_field
from nuclei3d.segmentation.flow_field import DeviceField, FlowField
from nuclei3d.segmentation.settings import MaskSettings, SegmentationSettings
from oracle_network import ball_labels

CUBIC = VoxelSize(1, 1, 1)
DIAMETER = 14.0


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


def touching_balls(voxel_size: VoxelSize) -> FlowField:
    """Exact flows of balls that touch, some cut by the border, with a logit that fades and is noisy."""
    rng = np.random.default_rng(0)
    edges = np.array(voxel_size.zyx)
    shape = tuple(np.round((36, 40, 44) / edges).astype(int))
    labels = ball_labels(shape, rng.uniform(0, (36, 40, 44), (24, 3)), rng.uniform(5, 9, 24), voxel_size.zyx)
    logit = 4 * ndimage.gaussian_filter(np.where(labels > 0, 2.0, -2.0), 1 / edges)
    logit += rng.normal(0, 1.5, shape)
    return FlowField.of(flows_3d(labels, voxel_size), logit.astype(np.float32), voxel_size)


def noise(voxel_size: VoxelSize) -> FlowField:
    """A smooth random flow: sinks, pieces and holes of all shapes."""
    rng = np.random.default_rng(1)
    flow = np.stack([ndimage.gaussian_filter(rng.normal(size=(20, 36, 33)), 2.5) for _ in range(3)])
    flow /= np.sqrt((flow**2).sum(0)).max()
    logit = rng.normal(1, 2, flow.shape[1:])
    return FlowField.of(flow.astype(np.float32), logit.astype(np.float32), voxel_size)


@pytest.mark.parametrize("masks", [{}, {"outline_threshold": -2.0}, {"outline_threshold_z": -3.0}])
@pytest.mark.parametrize("voxel_size", [CUBIC, VoxelSize(2.5, 1, 1)])
@pytest.mark.parametrize("make", [touching_balls, noise])
def test_labels_and_scores_are_those_of_the_host(make, voxel_size, masks, device):
    field, settings = make(voxel_size), MaskSettings(score_threshold=0.0, **masks)
    labels, scores = masks_from_field(field, DIAMETER, settings)
    found, own = masks_from_field(field.to(device), DIAMETER, settings)
    assert labels.max() >= 5
    assert found.dtype == labels.dtype
    # trajectories that pass between two sinks end in either
    assert (found != labels).mean() < (1e-3 if device.type == "cuda" else 1e-4)
    np.testing.assert_allclose(own, scores, atol=2e-3)


@pytest.mark.parametrize("shape", [(31, 60, 57), (20, 50, 30)])
def test_labels_on_the_image_s_grid_are_those_of_the_host(shape, device):
    field = touching_balls(CUBIC)
    settings = SegmentationSettings(nucleus_diameter_um=DIAMETER, diameter_px=DIAMETER)
    labels, scores = label_flows(field, shape, settings)
    found, own = label_flows(field.to(device), shape, settings)
    assert found.shape == shape
    assert (found != labels).mean() < 1e-4
    np.testing.assert_allclose(own, scores, atol=2e-3)
    planes, _ = label_flows(field.to(device), shape, replace(settings, mode="stitch"))
    assert (planes == label_flows(field, shape, replace(settings, mode="stitch"))[0]).all()


def test_any_labels_are_cleaned_as_on_the_host(device):
    rng = np.random.default_rng(2)
    # blocks in which many labels are in pieces, and have holes, open ones, and ones shared with others
    labels = np.kron(rng.integers(0, 4, (6, 7, 8)), np.ones((2, 2, 3), int)).astype(np.uint32)
    labels[rng.random(labels.shape) < 0.2] = 0
    labels[3:10, 4:11, 5:14] = 5
    labels[5:8, 6:9, 7:12] = 0
    labels[6, 7, 8] = 2
    there = torch.from_numpy(labels.astype(np.int32)).to(device)
    expected = masks.clean_labels(labels, 12, 300)
    found = masks.clean_labels(there, 12, 300)
    np.testing.assert_array_equal(there.cpu().numpy(), labels)
    np.testing.assert_array_equal(found.voxels, expected.voxels)
    np.testing.assert_array_equal(found.boxes[1:], expected.boxes[1:])
    assert len(found.voxels) > 2


@pytest.mark.parametrize("shape", [(4, 5, 6), (1, 5, 6), (3, 1, 1)])
@pytest.mark.parametrize("logit", [-5.0, 5.0])
def test_fields_without_nuclei_give_no_labels(shape, logit, device):
    field = FlowField.of(np.zeros((3, *shape), np.float32), np.full(shape, logit, np.float32), CUBIC)
    labels, scores = masks_from_field(field.to(device), DIAMETER, MaskSettings())
    assert not labels.any()
    assert scores.tolist() == [0]


def test_a_field_comes_back_from_the_device_as_it_was(device):
    field, outside = touching_balls(CUBIC), np.zeros((18, 20, 22), bool)
    outside[3:9, 5:] = True
    there = field.to(device)
    assert isinstance(there, DeviceField)
    for each in (field, there):
        each.exclude(outside)
    np.testing.assert_array_equal(there.fetch().packed, field.packed)
