"""View fusion: components go where they belong, the mean is a mean, and other grids are resampled."""

import numpy as np
import pytest

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation.flow_field import LOGIT, FlowField
from nuclei3d.segmentation.fusion import VolumeView, fuse_views
from nuclei3d.views import VIEW_AXES, VIEWS, View


def view_of(name: View, flow: np.ndarray, logit: float) -> tuple[View, np.ndarray]:
    """The exact view of a 3D field: its two components in the planes of one direction, and a logit."""
    return name, np.stack([*flow[list(VIEW_AXES[name])], np.full(flow.shape[1:], logit, np.float32)])


@pytest.fixture
def field() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 20, 6, 7)).astype(np.float32)


@pytest.mark.parametrize("names", [VIEWS, ("xy", "xz"), ("xz", "yz"), ("yz", "xy")])
@pytest.mark.parametrize("method", ["mean", "consensus"])
def test_two_or_three_exact_views_give_back_the_field(field, names, method) -> None:
    flow, logit = fuse_views(dict(view_of(name, field, 1.5) for name in names), method)
    assert np.allclose(flow, field, atol=1e-5)
    assert np.allclose(logit, 1.5)


def test_a_component_that_no_view_shows_is_zero(field) -> None:
    flow, _ = fuse_views(dict([view_of("xy", field, 0)]))
    assert not flow[0].any()
    assert np.array_equal(flow[1:], field[1:])


def test_the_logit_is_the_mean_whatever_the_number_of_views(field) -> None:
    views = dict([view_of("xy", field, 1), view_of("xz", field, 2), view_of("yz", field, 6)])
    assert np.allclose(fuse_views(views)[1], 3)
    assert np.allclose(fuse_views({view: views[view] for view in VIEWS[:2]})[1], 1.5)
    assert np.allclose(fuse_views(views, weights={"yz": 2.0})[1], 3.75)


def test_weights_move_each_component_towards_the_trusted_view() -> None:
    ones = np.ones((3, 4, 5, 6), np.float32)
    views = dict([view_of("xy", ones, 0), view_of("xz", 5 * ones, 0), view_of("yz", 9 * ones, 0)])
    flow, _ = fuse_views(views, weights={"xy": 3.0, "xz": 1.0, "yz": 1.0})
    assert np.allclose(flow[0], 7)
    assert np.allclose(flow[1], (3 * 1 + 9) / 4)
    assert np.allclose(flow[2], (3 * 1 + 5) / 4)


def test_consensus_trusts_the_view_that_is_smooth() -> None:
    rng = np.random.default_rng(1)
    truth = np.ones((3, 40, 12, 12), np.float32)
    noisy = truth + rng.normal(0, 1, truth.shape).astype(np.float32)
    views = dict([view_of("xy", truth, 0), view_of("xz", noisy, 0)])
    mean, _ = fuse_views(views)
    consensus, _ = fuse_views(views, "consensus")
    error_mean = np.abs(mean[2] - 1).mean()
    error_consensus = np.abs(consensus[2] - 1).mean()
    assert error_consensus < 0.3 * error_mean


def test_consensus_is_the_formula_on_the_whole_volume_not_slab_by_slab() -> None:
    from scipy.ndimage import generic_filter

    rng = np.random.default_rng(2)
    field_a, field_b = rng.normal(size=(2, 3, 19, 5, 4)).astype(np.float32)
    fused, _ = fuse_views(dict([view_of("xy", field_a, 0), view_of("yz", field_b, 0)]), "consensus")
    weights = [1 / (generic_filter(f[1], np.var, size=5, mode="nearest") + 0.1) for f in (field_a, field_b)]
    expected = (weights[0] * field_a[1] + weights[1] * field_b[1]) / (weights[0] + weights[1])
    assert np.allclose(fused[1], expected, atol=1e-4)


def test_half_precision_views_are_summed_in_single_precision(field) -> None:
    views = {view: view_of(view, field, 2)[1].astype(np.float16) for view in VIEWS}
    flow, logit = fuse_views(views)
    assert flow.dtype == logit.dtype == np.float32
    assert np.allclose(flow, field, atol=2e-3)


def volume_of(flow: np.ndarray, logit: float, weight: float = 1.0) -> VolumeView:
    """What a 3D network says that lies on the grid of the views already."""
    size = VoxelSize(2, 1, 1)
    field = FlowField.of(flow, np.full(flow.shape[1:], logit, np.float32), size)
    return VolumeView(field, field.shape, weight)


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_a_3d_network_is_one_view_more_of_flows_and_logit(weight) -> None:
    ones = np.ones((3, 20, 6, 7), np.float32)
    views = dict([view_of("xy", 0.1 * ones, 1), view_of("xz", 0.3 * ones, 2), view_of("yz", 0.8 * ones, 6)])
    flow, logit = fuse_views(views, volume=volume_of(0.5 * ones, 10, weight))
    seen = {0: 0.3 + 0.8, 1: 0.1 + 0.8, 2: 0.1 + 0.3}
    for component, total in seen.items():
        assert np.allclose(flow[component], (total + weight * 0.5) / (2 + weight), atol=1e-4)
    assert np.allclose(logit, (9 + weight * 10) / (3 + weight), atol=1e-3)


def test_what_no_view_shows_is_what_the_3d_network_says() -> None:
    ones = np.ones((3, 4, 5, 6), np.float32)
    flow, _ = fuse_views(dict([view_of("xy", 0.2 * ones, 0)]), volume=volume_of(0.6 * ones, 0))
    assert np.allclose(flow[0], 0.6, atol=1e-4)
    assert np.allclose(flow[1:], 0.4, atol=1e-4)


@pytest.mark.parametrize("wrong", ["volume", "views"])
def test_consensus_is_nearer_the_truth_where_one_view_is_noise(wrong) -> None:
    rng = np.random.default_rng(3)
    truth = 0.5 * np.ones((3, 40, 12, 12), np.float32)
    noise = rng.normal(0, 0.6, truth.shape).astype(np.float32)
    solid, flat = (noise, truth) if wrong == "volume" else (truth, noise)
    views = dict(view_of(name, flat, 0) for name in VIEWS)
    mean, consensus = (
        np.abs(fuse_views(views, method, volume=volume_of(solid, 0))[0] - 0.5).mean()
        for method in ("mean", "consensus")
    )
    assert consensus < (0.5 if wrong == "volume" else 0.75) * mean


def test_consensus_of_three_views_is_the_formula() -> None:
    from scipy.ndimage import generic_filter

    rng = np.random.default_rng(4)
    shown = rng.uniform(-0.8, 0.8, size=(3, 3, 19, 5, 4)).astype(np.float32)
    shown[1] *= 0.2
    volume = volume_of(shown[2], 0, 1.5)
    fused, _ = fuse_views(
        dict([view_of("xy", shown[0], 0), view_of("yz", shown[1], 0)]), "consensus", volume=volume
    )
    variances = [generic_filter(each[1], np.var, size=5, mode="nearest") for each in shown]
    weights = [trust / (variance + 0.1) for trust, variance in zip((1.0, 1.0, 1.5), variances, strict=True)]
    expected = sum(w * each[1] for w, each in zip(weights, shown, strict=True)) / sum(weights)
    assert np.allclose(fused[1], expected, atol=5e-4)


BOX_UM = (24.0, 20.0, 30.0)


def grid_of(shape: tuple[int, int, int]) -> VoxelSize:
    return VoxelSize.of([edge / size for edge, size in zip(BOX_UM, shape, strict=True)])


def ramps(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Flow and logit that grow steadily along all axes: what linear resampling keeps."""
    z, y, x = np.meshgrid(
        *((np.arange(n) + 0.5) * e for n, e in zip(shape, grid_of(shape).zyx, strict=True)), indexing="ij"
    )
    flow = np.stack([0.02 * z + 0.01 * y, -0.02 * y + 0.01 * x, 0.01 * x - 0.01 * z])
    return flow.astype(np.float32), (0.2 * x - 0.1 * z).astype(np.float32)


def view_on(own: tuple[int, int, int], shape: tuple[int, int, int]) -> VolumeView:
    return VolumeView(FlowField.of(*ramps(own), grid_of(own)), shape)


@pytest.mark.parametrize(
    ("own", "shape"),
    [((12, 20, 30), (12, 20, 30)), ((12, 20, 30), (40, 50, 60)), ((36, 40, 90), (12, 20, 30))],
)
def test_a_steady_field_is_the_same_on_any_grid(own, shape):
    view = view_on(own, shape)
    flow, logit = ramps(shape)
    inner = tuple(
        slice(int(np.ceil(n / o)) + 1, -int(np.ceil(n / o)) - 1) for n, o in zip(shape, own, strict=True)
    )
    whole = slice(0, shape[0])
    for component in range(3):
        read = view.planes(component, whole)
        assert read.shape == shape
        np.testing.assert_allclose(read[inner], flow[component][inner], atol=3e-4)
    np.testing.assert_allclose(view.planes(LOGIT, whole)[inner], logit[inner], atol=3e-3)


def test_slabs_are_parts_of_the_whole():
    view = view_on((13, 22, 31), (37, 20, 40))
    whole = view.planes(1, slice(0, 37))
    parts = [view.planes(1, planes) for planes in (slice(0, 16), slice(16, 31), slice(31, 37))]
    assert len(parts) > 1
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)
