"""No nucleus is lost after the network: exact flows give back the labels that they were made from."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from stardist.matching import matching

from nuclei3d.errors import InputError
from nuclei3d.flows import flows_2d, flows_3d
from nuclei3d.grid import find_boxes, isotropic_shape, resize_linear, resize_nearest
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation.dynamics import masks_2d_from_flows, masks_from_field
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.fusion import fuse_views
from nuclei3d.segmentation.masks import score_labels
from nuclei3d.segmentation.settings import MaskSettings
from nuclei3d.views import VIEW_AXIS, VIEWS, View

DIAMETER = 22.0
ANISOTROPIES = [1.0, 2.2, 5.75, 11.5]
CUBIC = VoxelSize(1, 1, 1)


def touching_balls(anisotropy: float, side: int = 64, seed: int = 1) -> NDArray[np.uint32]:
    """Some fifteen touching balls of unequal size, cut where they meet; voxels anisotropy x 1 x 1."""
    rng = np.random.default_rng(seed)
    shape = (round(side / anisotropy), side, side)
    edges = np.array([anisotropy, 1, 1])
    at = [(np.arange(n) + 0.5) * edge for n, edge in zip(shape, edges, strict=True)]
    grid = np.meshgrid(*at, indexing="ij")
    labels = np.zeros(shape, np.uint32)
    nearest = np.zeros(shape)
    centres: list[tuple[NDArray[np.float64], float]] = []
    for centre in rng.uniform(7, side - 7, (400, 3)):
        radius = DIAMETER / 2 * rng.uniform(0.75, 1.25)
        if any(np.linalg.norm(centre - other) < 0.92 * (radius + r) for other, r in centres):
            continue
        centres.append((centre, radius))
        power = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) - radius**2
        closer = power < nearest
        labels[closer] = len(centres)
        nearest[closer] = power[closer]
    return labels


def logit_of(labels: NDArray[np.uint32]) -> NDArray[np.float32]:
    return np.where(labels > 0, 5, -5).astype(np.float32)


def masks_from_flows(
    flow: NDArray[np.float32],
    logit: NDArray[np.float32],
    voxel_size: VoxelSize = CUBIC,
    diameter_um: float = DIAMETER,
    settings: MaskSettings = MaskSettings(),
    threads: int | None = None,
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    field = FlowField.of(flow, logit, voxel_size, threads)
    return masks_from_field(field, diameter_um, settings, threads=threads)


def exact_views(labels: NDArray[np.uint32], names: Sequence[View] = VIEWS) -> dict[View, NDArray[np.float32]]:
    """What a perfect 2D network would say about all planes of an isotropic volume."""
    views = {}
    for name in names:
        axis = VIEW_AXIS[name]
        planes = [flows_2d(plane) for plane in np.moveaxis(labels, axis, 0)]
        views[name] = np.stack([*np.stack(planes, axis + 1), logit_of(labels)])
    return views


def ap(truth: NDArray[np.uint32], labels: NDArray[np.uint32], threshold: float) -> float:
    return float(matching(truth.astype(np.int32), labels.astype(np.int32), thresh=threshold).accuracy)


def assert_nothing_is_lost(truth: NDArray[np.uint32], labels: NDArray[np.uint32]) -> None:
    assert ap(truth, labels, 0.5) == 1
    assert ap(truth, labels, 0.75) == 1
    assert ap(truth, labels, 0.9) >= 0.98


@pytest.mark.parametrize("grid", ["isotropic", "native"])
@pytest.mark.parametrize("anisotropy", ANISOTROPIES)
def test_exact_flows_of_three_views_give_back_all_touching_nuclei(anisotropy: float, grid: str) -> None:
    truth = touching_balls(anisotropy)
    voxel_size = VoxelSize(anisotropy, 1, 1)
    isotropic = resize_nearest(truth, isotropic_shape(truth.shape, voxel_size, 1.0)).astype(np.uint32)
    assert truth.max() >= 12
    flow, logit = fuse_views(exact_views(isotropic))
    if grid == "native":
        flow = np.stack([resize_linear(part, truth.shape) for part in flow])
        labels, _ = masks_from_flows(flow, resize_linear(logit, truth.shape), voxel_size)
    else:
        labels = resize_nearest(masks_from_flows(flow, logit)[0], truth.shape).astype(np.uint32)
    assert_nothing_is_lost(truth, labels)


@pytest.mark.parametrize("names", [("xy", "xz"), ("xy", "yz"), ("xz", "yz")])
def test_two_exact_views_are_enough(names: tuple[View, View]) -> None:
    truth = touching_balls(1.0, seed=2)
    flow, logit = fuse_views(exact_views(truth, names))
    labels, _ = masks_from_flows(flow, logit)
    assert_nothing_is_lost(truth, labels)


@pytest.mark.parametrize("anisotropy", ANISOTROPIES)
def test_labels_to_targets_to_dynamics_is_a_round_trip(anisotropy: float) -> None:
    truth = touching_balls(anisotropy, seed=3)
    voxel_size = VoxelSize(anisotropy * 0.3, 0.3, 0.3)
    labels, scores = masks_from_flows(
        flows_3d(truth, voxel_size), logit_of(truth), voxel_size, DIAMETER * 0.3
    )
    assert_nothing_is_lost(truth, labels)
    assert len(scores) == labels.max() + 1
    assert scores[1:].min() > 0.95


def test_a_mirrored_volume_gives_the_mirrored_nuclei() -> None:
    truth = touching_balls(2.2, side=48, seed=4)[3:-2, 5:-8, 7:-4]
    voxel_size = VoxelSize(2.2, 1, 1)
    flow, logit = flows_3d(truth, voxel_size), logit_of(truth)
    labels, _ = masks_from_flows(flow, logit, voxel_size)
    for axis in range(3):
        mirrored = np.flip(flow, axis + 1).copy()
        mirrored[axis] *= -1
        other, _ = masks_from_flows(mirrored, np.flip(logit, axis), voxel_size)
        assert ap(labels, np.flip(other, axis), 0.95) == 1


def test_the_unit_of_length_does_not_matter() -> None:
    truth = touching_balls(5.75, side=48, seed=5)
    flow, logit = flows_3d(truth, VoxelSize(5.75, 1, 1)), logit_of(truth)
    one, _ = masks_from_flows(flow, logit, VoxelSize(5.75, 1, 1))
    quarter, _ = masks_from_flows(flow, logit, VoxelSize(5.75 / 4, 0.25, 0.25), DIAMETER / 4)
    assert np.array_equal(one, quarter)


def test_the_number_of_threads_does_not_matter() -> None:
    truth = touching_balls(2.2, side=48, seed=6)
    voxel_size = VoxelSize(2.2, 1, 1)
    flow = flows_3d(truth, voxel_size) + np.random.default_rng(0).normal(0, 0.3, (3, *truth.shape))
    flow = flow.astype(np.float32)
    results = [masks_from_flows(flow, logit_of(truth), voxel_size, threads=threads) for threads in (1, 3)]
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])


def test_noisy_short_flows_lose_no_nucleus_and_stay_whole() -> None:
    truth = touching_balls(2.2, seed=7)
    voxel_size = VoxelSize(2.2, 1, 1)
    rng = np.random.default_rng(1)
    # What a trained network does: flows blurred, hence short near centres and borders, and noisy.
    flow = np.stack([ndimage.gaussian_filter(part, (0.7, 1.5, 1.5)) for part in flows_3d(truth, voxel_size)])
    flow = (flow + rng.normal(0, 0.15, flow.shape)).astype(np.float32)
    labels, _ = masks_from_flows(flow, logit_of(truth), voxel_size)
    assert ap(truth, labels, 0.5) == 1
    for number in range(1, int(labels.max()) + 1):
        nucleus = labels == number
        assert ndimage.label(nucleus)[1] == 1
        holes = ndimage.binary_fill_holes(nucleus) & (labels == 0)
        assert not holes.any()


def ball(radius: float = 9.0) -> tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.float32]]:
    """A lone ball with its exact flow and logit."""
    grid = np.indices((25, 25, 25)) - 12
    labels = ((grid**2).sum(0) < radius**2).astype(np.uint32)
    return labels, flows_3d(labels, CUBIC), logit_of(labels)


def test_holes_in_the_foreground_are_filled() -> None:
    truth, flow, logit = ball()
    logit[10:13, 15:18, 12:14] = -5
    labels, _ = masks_from_flows(flow, logit, CUBIC, 18)
    assert np.array_equal(labels, truth)


def test_size_limits_are_in_um3_and_numbers_stay_without_gaps() -> None:
    truth = touching_balls(1.0, seed=8)
    size = VoxelSize(0.5, 0.5, 0.5)
    volumes = np.bincount(truth.ravel())[1:] * size.volume_um3
    lower, upper = np.sort(volumes)[2] * 0.999, np.sort(volumes)[-3] * 1.001
    settings = MaskSettings(min_volume_um3=lower, max_volume_um3=upper)
    labels, scores = masks_from_flows(flows_3d(truth, size), logit_of(truth), size, DIAMETER / 2, settings)
    assert labels.max() == len(volumes) - 4 == len(scores) - 1
    assert set(np.unique(labels)) == set(range(len(volumes) - 3))


def test_the_score_is_probability_times_consistency() -> None:
    _, flow, _ = ball()
    inside = (flow**2).sum(0) > 0.5
    logit = np.where(inside, 1.5, -5).astype(np.float32)
    _, scores = masks_from_flows(flow, logit, CUBIC, 18)
    assert scores[1] == pytest.approx(1 / (1 + np.exp(-1.5)), rel=0.02)
    _, scores = masks_from_flows(0.5 * flow, logit, CUBIC, 18)
    assert scores[1] == pytest.approx(0.75 / (1 + np.exp(-1.5)), rel=0.02)


def test_the_score_leaves_out_a_component_that_no_view_shows() -> None:
    truth, _, logit = ball()
    flow = np.zeros((3, *truth.shape), np.float32)
    flow[1:] = np.stack([flows_2d(plane) for plane in truth], axis=1)
    scores = score_labels(truth, find_boxes(truth), FlowField.of(flow, logit, CUBIC))
    assert scores[1] > 0.9
    scores = score_labels(truth, find_boxes(truth), FlowField.of(0 * flow, logit, CUBIC))
    assert scores[1] == 0


def test_the_score_filter_drops_blobs_with_a_poor_flow() -> None:
    truth, flow, logit = ball()
    both = np.concatenate([logit, logit])
    noise = np.random.default_rng(2).normal(0, 0.15, flow.shape)
    noise += 0.6 * flow + np.array([0.4, 0, 0]).reshape(3, 1, 1, 1)
    flows = np.concatenate([flow, noise.astype(np.float32)], axis=1)
    unfiltered, scores = masks_from_flows(flows, both, CUBIC, 18)
    assert unfiltered[25:].any()
    assert scores[1] > 0.9 > 0.8 > scores[2:].max()
    labels, kept = masks_from_flows(flows, both, CUBIC, 18, MaskSettings(score_threshold=0.8))
    assert np.array_equal(labels[:25], truth)
    assert not labels[25:].any()
    assert len(kept) == 2


def test_the_threshold_acts_on_the_logit() -> None:
    truth, flow, _ = ball()
    depth = ndimage.distance_transform_edt(truth)
    labels, _ = masks_from_flows(
        flow, depth.astype(np.float32), CUBIC, 18, MaskSettings(cellprob_threshold=2.5)
    )
    assert np.array_equal(labels > 0, depth > 2.5)


@pytest.mark.parametrize("shape", [(1, 40, 40), (6, 1, 9), (1, 1, 1), (30, 30, 30)])
@pytest.mark.parametrize("kind", ["empty", "saturated", "nan"])
def test_volumes_without_nuclei_give_a_valid_result(shape: tuple[int, int, int], kind: str) -> None:
    flow = np.zeros((3, *shape), np.float32)
    logit = np.full(shape, {"empty": -9.0, "saturated": 9.0, "nan": np.nan}[kind], np.float32)
    if kind == "nan":
        flow[:] = np.nan
    labels, scores = masks_from_flows(flow, logit, VoxelSize(2, 1, 1), 12)
    assert labels.shape == shape
    assert labels.dtype == np.uint32
    assert not labels.any()
    assert scores.tolist() == [0]


def test_planes_are_segmented_by_the_same_dynamics() -> None:
    volume = touching_balls(1.0, seed=9)
    plane = volume[30]
    labels = masks_2d_from_flows(flows_2d(plane), logit_of(plane), 18, MaskSettings())
    pixels = np.bincount(plane.ravel())
    whole = np.where(pixels[plane] > 20, plane, 0)
    assert len(np.unique(whole)) > 4
    assert ap(whole, labels, 0.9) == 1


def test_shapes_and_diameters_that_make_no_sense_are_refused() -> None:
    flow, logit = np.zeros((3, 4, 5, 6), np.float32), np.zeros((4, 5, 6), np.float32)
    with pytest.raises(InputError, match="do not fit"):
        masks_from_flows(flow, logit[:2], CUBIC, 5)
    with pytest.raises(InputError, match="diameter"):
        masks_from_flows(flow, logit, CUBIC, 0)


def fading_balls(voxel_size: VoxelSize, shape: tuple[int, int, int]) -> tuple[FlowField, NDArray[np.float64]]:
    """Two balls side by side; the logit falls by 1 a um from 0 at a radius of 8 um, which is given too."""
    at = [(np.arange(n) + 0.5) * edge for n, edge in zip(shape, voxel_size.zyx, strict=True)]
    grid = np.stack(np.meshgrid(*at, indexing="ij"))
    middle = np.array(shape) * voxel_size.zyx / 2
    apart = np.array([0, 0, 11])
    centres = [middle - apart, middle + apart]
    away = np.stack([centre[:, None, None, None] - grid for centre in centres])
    radius = np.linalg.norm(away, axis=1)
    nearest = radius.argmin(0)[None]
    flow = np.take_along_axis(away, nearest[:, None], 0)[0]
    closest = np.take_along_axis(radius, nearest, 0)[0]
    flow /= np.maximum(closest, 0.5)
    return FlowField.of(flow.astype(np.float32), (8 - closest).astype(np.float32), voxel_size), closest


@pytest.mark.parametrize("voxel_size", [CUBIC, VoxelSize(2, 1, 1)])
def test_an_outline_threshold_lets_nuclei_grow_but_finds_no_others(voxel_size: VoxelSize) -> None:
    field, radius = fading_balls(voxel_size, (round(40 / voxel_size.z), 40, 64))
    plain = MaskSettings(score_threshold=0.5)
    found, scores = masks_from_field(field, 16.0, plain)
    same, _ = masks_from_field(field, 16.0, replace(plain, outline_threshold=0.0))
    assert (same == found).all()
    grown, grown_scores = masks_from_field(field, 16.0, replace(plain, outline_threshold=-2.0))
    assert found.max() == grown.max() == 2
    assert grown_scores.tolist() == scores.tolist()
    assert (grown[found > 0] == found[found > 0]).all()
    assert ((grown > 0) == (radius < 10)).mean() > 0.999
    # what the outline alone admits is no nucleus of its own
    nothing, _ = masks_from_field(field, 16.0, replace(plain, cellprob_threshold=9.0, outline_threshold=-2.0))
    assert nothing.max() == 0


def test_nuclei_can_grow_along_z_alone() -> None:
    field, _ = fading_balls(CUBIC, (40, 40, 64))
    found, _ = masks_from_field(field, 16.0, MaskSettings())
    grown, _ = masks_from_field(field, 16.0, MaskSettings(outline_threshold_z=-2.0))

    def extents(labels: NDArray[np.uint32]) -> list[int]:
        return [len(np.unique(axis)) for axis in np.nonzero(labels == 1)]

    (z, y, x), (grown_z, grown_y, grown_x) = extents(found), extents(grown)
    assert (grown_y, grown_x) == (y, x)
    assert grown_z == z + 4
