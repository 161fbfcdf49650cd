"""The sums that a GPU keeps are those of the host; what follows runs on the CPU as well."""

import numpy as np
import pytest
import torch
from torch import nn

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.foreground import OccupiedSpace, everywhere
from nuclei3d.segmentation.plane_flows import fits_on, sum_views
from nuclei3d.segmentation.plane_network import PlaneNetwork
from nuclei3d.segmentation.views import VIEWS, FlowAccumulator, predict_view

SIZE = VoxelSize(2, 1, 1)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


class Local(nn.Module):
    """A network that looks at 3 x 3 pixels only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, stack: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(stack, self.weight, padding=1)


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
    space = occupied(image.shape)
    network = PlaneNetwork(Local(), torch.device(device), engine="torch")
    expected = FlowField.zeros(image.shape, SIZE)
    accumulator = FlowAccumulator(expected, VIEWS, trust)
    counted = dict.fromkeys(VIEWS, 0.0)
    for view in VIEWS:
        every = 1 if view == "xy" else step
        for plane in predict_view(image, view, network, space, stretched_depth=18, step=every):
            accumulator.add(view, plane)

    def count(view):
        def add(planes):
            counted[view] += planes

        return add

    found = sum_views(
        image,
        SIZE,
        VIEWS,
        dict.fromkeys(VIEWS, network),
        space,
        stretched_depth=18,
        step=step,
        trust=trust,
        progress=count,
    )
    assert found.voxel_size == SIZE
    # each look is rounded to a unit on the host, and a GPU multiplies in ten bits
    tolerance = 3 if device == "cpu" else 200
    assert np.abs(found.packed.astype(int) - expected.packed.astype(int)).max() <= tolerance
    assert counted == {"xy": 9, "xz": 40, "yz": 37}


def test_nothing_fits_on_a_device_that_is_no_gpu():
    assert not fits_on(torch.device("cpu"), (1, 1, 1))
