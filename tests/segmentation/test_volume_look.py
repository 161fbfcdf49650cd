"""A 3D network's field on the grid of the views: the same field, read where the views lie."""

import numpy as np
import pytest

from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.fusion import LOGIT, VolumeLook

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


def look_of(own: tuple[int, int, int], shape: tuple[int, int, int]) -> VolumeLook:
    return VolumeLook(FlowField.of(*ramps(own), grid_of(own)), shape, grid_of(shape))


@pytest.mark.parametrize(
    ("own", "shape"),
    [((12, 20, 30), (12, 20, 30)), ((12, 20, 30), (40, 50, 60)), ((36, 40, 90), (12, 20, 30))],
)
def test_a_steady_field_is_the_same_on_any_grid(own, shape):
    look = look_of(own, shape)
    flow, logit = ramps(shape)
    inner = tuple(
        slice(int(np.ceil(n / o)) + 1, -int(np.ceil(n / o)) - 1) for n, o in zip(shape, own, strict=True)
    )
    whole = slice(0, shape[0])
    for component in range(3):
        read = look.planes(component, whole)
        assert read.shape == shape
        np.testing.assert_allclose(read[inner], flow[component][inner], atol=3e-4)
    np.testing.assert_allclose(look.planes(LOGIT, whole)[inner], logit[inner], atol=3e-3)


def test_slabs_are_parts_of_the_whole():
    look = look_of((13, 22, 31), (37, 20, 40))
    whole = look.planes(1, slice(0, 37))
    parts = [look.planes(1, planes) for planes in look.slabs()]
    assert len(parts) > 1
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)


@pytest.mark.parametrize(
    ("edges", "weight", "message"),
    [((2.0, 1.0, 1.0), 1.0, "must look at the same volume"), (grid_of((12, 20, 30)).zyx, 0.0, "positive")],
)
def test_another_box_and_no_trust_are_refused(edges, weight, message):
    field = FlowField.zeros((10, 20, 30), VoxelSize.of([2.4, 1.0, 1.0]))
    with pytest.raises(InputError, match=message):
        VolumeLook(field, (9, 20, 30) if weight else (12, 20, 30), VoxelSize.of(edges), weight)
