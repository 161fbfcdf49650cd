"""Flow targets against Cellpose's own targets, closed forms and a direct sparse solver."""

import numpy as np
import pytest
from numpy.typing import NDArray

from nuclei3d.errors import InputError
from nuclei3d.flows import flows_2d, flows_3d
from nuclei3d.images.voxel_size import VoxelSize


def ellipse(shape: tuple[int, ...], centre: tuple[float, ...], radii: tuple[float, ...]) -> NDArray[np.bool_]:
    """Voxels of an ellipsoid (any number of axes); centre and radii in voxels."""
    grids = np.indices(shape)
    parts = zip(grids, centre, radii, strict=True)
    return np.asarray(sum(((grid - c) / r) ** 2 for grid, c, r in parts) < 1)


def test_flows_2d_equal_cellpose_targets_inside_separate_nuclei() -> None:
    from cellpose.dynamics import masks_to_flows

    rng = np.random.default_rng(3)
    labels = np.zeros((120, 160), np.int64)
    for row in range(3):
        for column in range(4):
            centre = (20 + 40 * row + rng.uniform(-2, 2), 20 + 40 * column + rng.uniform(-2, 2))
            labels[ellipse(labels.shape, centre, tuple(rng.uniform(6, 16, 2)))] = row * 4 + column + 1
    flows = flows_2d(labels)
    cosine = (flows * masks_to_flows(labels)).sum(0)[labels > 0]
    # The centre of a symmetric nucleus has no direction: both give 0 there.
    assert cosine.mean() > 0.99
    assert np.mean(cosine < 0.99) < 0.002


def test_flows_2d_of_a_disc_point_to_its_centre() -> None:
    labels = ellipse((41, 41), (20, 20), (17.2, 17.2)).astype(np.uint16)
    flows = flows_2d(labels)
    dy, dx = 20 - np.indices(labels.shape)
    away = (labels > 0) & (np.hypot(dy, dx) > 3)
    cosine = ((flows[0] * dy + flows[1] * dx) / np.maximum(np.hypot(dy, dx), 1e-9))[away]
    # Single pixels that stick out of the rasterised rim turn along it.
    assert cosine.min() > 0.9
    assert cosine.mean() > 0.99
    assert np.allclose(np.hypot(*flows)[away], 1, atol=1e-5)
    assert not flows[:, labels == 0].any()


def test_flows_2d_of_touching_nuclei_do_not_feel_each_other() -> None:
    both = np.zeros((30, 40), np.int32)
    both[5:25, 4:20] = 7
    both[5:25, 20:33] = 900
    alone = np.where(both == 7, 1, 0)
    assert np.array_equal(flows_2d(both)[:, both == 7], flows_2d(alone)[:, both == 7])


def test_flows_2d_of_a_split_label_lead_each_piece_to_its_own_centre() -> None:
    labels = np.zeros((20, 50), np.int32)
    labels[4:15, 4:15] = 5
    labels[4:15, 30:41] = 5
    flows = flows_2d(labels)
    assert np.allclose(flows[1, 4:15, 4:9], flows[1, 4:15, 30:35])
    assert flows[1, 9, 5] > 0.99
    assert flows[1, 9, 39] < -0.99


def test_flows_2d_of_one_pixel_and_of_nothing_are_zero() -> None:
    labels = np.zeros((5, 6), np.uint32)
    assert not flows_2d(labels).any()
    labels[0, 5] = 4_000_000_000
    assert not flows_2d(labels).any()
    assert flows_2d(labels).shape == (2, 5, 6)


def test_flows_2d_reach_the_ends_of_a_long_thin_nucleus() -> None:
    labels = np.zeros((7, 200), np.int32)
    labels[2:5, 3:197] = 1
    flows = flows_2d(labels)
    assert np.allclose(np.hypot(*flows)[3, 3:99], 1, atol=1e-4)
    assert (flows[1, 3, 4:99] > 0.99).all()
    assert (flows[1, 3, 102:196] < -0.99).all()


@pytest.mark.parametrize("labels", [np.zeros((4, 4, 4), np.int32), np.zeros((4, 4), np.float32)])
def test_flows_2d_refuse_what_is_no_labelled_plane(labels: NDArray[np.generic]) -> None:
    with pytest.raises(InputError, match="flow targets"):
        flows_2d(labels)  # type: ignore[arg-type]


def direct_flows(mask: NDArray[np.bool_], voxel_size: VoxelSize) -> NDArray[np.float64]:
    """Flows of one piece from a direct sparse solution of the same heat equation."""
    from scipy import sparse
    from scipy.sparse.linalg import spsolve

    edges = np.array(voxel_size.zyx)
    voxels = np.argwhere(mask)
    number = np.full(np.array(mask.shape) + 2, -1)
    number[tuple(voxels.T + 1)] = np.arange(len(voxels))
    laplacian = sparse.identity(len(voxels)) * (2 / edges**2).sum()
    for axis, step in [(axis, step) for axis in range(3) for step in (-1, 1)]:
        beside = voxels + 1
        beside[:, axis] += step
        other = number[tuple(beside.T)]
        rows = np.flatnonzero(other >= 0)
        weights = np.full(len(rows), -1 / edges[axis] ** 2)
        laplacian = laplacian + sparse.coo_matrix((weights, (rows, other[rows])), laplacian.shape)
    source = np.zeros(len(voxels))
    source[np.argmin((((voxels - voxels.mean(0)) * edges) ** 2).sum(1))] = 1
    heat = np.zeros(number.shape)
    heat[tuple(voxels.T + 1)] = spsolve(laplacian.tocsc(), source)
    inner = (slice(1, -1),) * 3
    parts = [(np.roll(heat, -1, a) - np.roll(heat, 1, a))[inner] / edges[a] for a in range(3)]
    gradient = np.stack(parts) * mask
    return gradient / np.maximum(np.linalg.norm(gradient, axis=0), 1e-300)


@pytest.mark.parametrize(
    ("shape", "radii", "voxel_size"),
    [
        ((19, 19, 19), (8, 8, 8), VoxelSize(1, 1, 1)),
        ((9, 25, 29), (3.6, 11, 13), VoxelSize(2.2, 1, 1)),
        ((6, 31, 37), (2.4, 14, 17), VoxelSize(1.0, 0.174, 0.174)),
        ((9, 11, 61), (3, 4, 29), VoxelSize(1, 1, 1)),
        ((7, 40, 9), (2.6, 19, 3), VoxelSize(2, 1, 0.5)),
    ],
)
def test_flows_3d_equal_the_direct_solution_of_the_heat_equation(shape, radii, voxel_size):
    centre = tuple((length - 1) / 2 + 0.2 for length in shape)
    mask = ellipse(shape, centre, radii)
    cosine = (flows_3d(mask.astype(np.uint16), voxel_size) * direct_flows(mask, voxel_size)).sum(0)[mask]
    assert cosine.min() > 0.999


@pytest.mark.parametrize("anisotropy", [1.0, 2.2, 5.75, 11.5])
def test_flows_3d_of_a_sphere_are_radial_whatever_the_anisotropy(anisotropy: float) -> None:
    radius = 17.5
    shape = (int(2 * radius / anisotropy) + 5, 41, 41)
    centre = (shape[0] // 2, 20, 20)
    labels = ellipse(shape, centre, (radius / anisotropy, radius, radius)).astype(np.int64)
    flows = flows_3d(labels, VoxelSize(anisotropy, 1, 1))
    inward = np.array([anisotropy, 1, 1]).reshape(3, 1, 1, 1) * (
        np.array(centre).reshape(3, 1, 1, 1) - np.indices(shape)
    )
    length = np.linalg.norm(inward, axis=0)
    inside = (labels > 0) & (length > 3)
    cosine = (flows * inward / np.maximum(length, 1e-9)).sum(0)[inside]
    assert cosine.mean() > (0.97 if anisotropy < 10 else 0.9)
    assert np.allclose(np.linalg.norm(flows, axis=0)[inside], 1, atol=1e-5)


def test_the_z_component_keeps_its_power_at_anisotropy_5_75() -> None:
    labels = ellipse((9, 45, 45), (4, 22, 22), (20 / 5.75, 20, 20)).astype(np.uint16)
    power = (flows_3d(labels, VoxelSize(5.75, 1, 1))[:, labels > 0] ** 2).mean(1)
    # Targets counted in voxels, not in um, keep a tenth of it.
    assert 0.75 < power[0] / power[2] < 1.15


def test_flows_3d_do_not_read_heat_across_touching_labels() -> None:
    labels = np.zeros((14, 16, 30), np.uint32)
    labels[2:12, 2:14, 2:15] = 3
    labels[2:12, 2:14, 15:28] = 70_000
    voxel_size = VoxelSize(2, 1, 1)
    together = flows_3d(labels, voxel_size)
    for label in (3, 70_000):
        alone = flows_3d(np.where(labels == label, 1, 0), voxel_size)
        assert np.array_equal(together[:, labels == label], alone[:, labels == label])


def test_flows_3d_take_gaps_pieces_single_voxels_and_nothing() -> None:
    voxel_size = VoxelSize(1, 1, 1)
    labels = np.zeros((10, 12, 40), np.int64)
    assert not flows_3d(labels, voxel_size).any()
    labels[2:8, 2:9, 2:11] = 2**40
    labels[2:8, 2:9, 25:34] = 2**40
    labels[0, 0, 0] = 12
    labels[5, 11, 20] = -3
    flows = flows_3d(labels, voxel_size)
    assert np.allclose(flows[:, 2:8, 2:9, 2:11], flows[:, 2:8, 2:9, 25:34])
    assert not flows[:, 0, 0, 0].any()
    assert not flows[:, 5, 11, 20].any()
    assert np.isfinite(flows).all()


def test_flows_3d_are_the_same_with_any_number_of_threads() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.repeat(rng.integers(0, 9, (4, 5, 6)), 3, 1), 3, 2)
    voxel_size = VoxelSize(2, 1, 1)
    assert np.array_equal(flows_3d(labels, voxel_size, threads=1), flows_3d(labels, voxel_size, threads=3))
