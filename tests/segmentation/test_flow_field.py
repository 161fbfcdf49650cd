import numpy as np
import pytest

from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation.flow_field import FLOW_UNITS, LOGIT_UNITS, FlowField

SIZE = VoxelSize(2, 1, 1)
ALL = (slice(None), slice(None), slice(None))


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_a_field_gives_back_what_was_packed(kind: type) -> None:
    rng = np.random.default_rng(0)
    flow = rng.normal(size=(3, 5, 6, 7))
    flow /= np.maximum(np.sqrt((flow**2).sum(0)), 1)
    logit = rng.normal(scale=8, size=(5, 6, 7))
    field = FlowField.of(flow.astype(kind), logit.astype(kind), SIZE, threads=2)
    assert field.shape == (5, 6, 7)
    np.testing.assert_allclose(field.flow, flow.astype(kind), atol=1.01 / FLOW_UNITS)
    np.testing.assert_allclose(field.logit, logit.astype(kind), atol=0.51 / LOGIT_UNITS)
    box = (slice(1, 3), slice(2, 6), slice(0, 4))
    part_flow, part_logit = field.unpack(box)
    np.testing.assert_array_equal(part_flow, field.flow[:, *box])
    np.testing.assert_array_equal(part_logit, field.logit[box])


def test_long_flows_keep_their_direction_and_nonsense_is_background() -> None:
    flow = np.zeros((3, 1, 1, 4), np.float32)
    flow[:, 0, 0, 0] = (0, 30, 40)
    flow[1, 0, 0, 1] = np.nan
    logit = np.array([[[1e6, 5.0, np.nan, -np.inf]]], np.float32)
    field = FlowField.of(flow, logit, SIZE)
    np.testing.assert_allclose(field.flow[:, 0, 0, 0], (0, 0.9, 1.2), atol=1e-3)
    assert not field.packed[0, 0, 1:, :3].any()
    np.testing.assert_allclose(field.logit[0, 0], (32, -32, -32, -32), atol=1e-3)


def test_shares_of_looks_add_up_and_never_wrap_around() -> None:
    field = FlowField.zeros((1, 1, 3), SIZE)
    shares = np.array([[[0.3, 0.5, 0.5]]], np.float32)
    for share in (shares, 1 - shares):
        field.add(ALL, 0, np.array([[[1.0, 9.0, np.nan]]], np.float32), share)
        field.add(ALL, 3, np.array([[[-4.0, np.inf, np.nan]]], np.float32), share)
    np.testing.assert_allclose(field.flow[0, 0, 0], (1, 2, 0), atol=2e-4)
    np.testing.assert_allclose(field.logit[0, 0], (-4, 32, -32), atol=2e-3)
    assert not field.packed[..., 1:3].any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="do not fit"):
        FlowField.of(np.zeros((3, 2, 2, 2), np.float32), np.zeros((2, 2, 3), np.float32), SIZE)
