"""The torch solution of the flow targets is that of the compiled one."""

import numpy as np
import pytest
import torch

from nuclei3d.core.targets.flow_targets import flows_3d
from nuclei3d.core.targets.heat_torch import flows_3d_torch
from nuclei3d.errors import InputError
from nuclei3d.volumes.voxel_size import VoxelSize


def labels_with_everything() -> np.ndarray:
    """Touching, split, single-voxel and far-numbered labels of uneven shape."""
    rng = np.random.default_rng(0)
    grid = np.indices((12, 40, 44))
    labels = np.zeros(grid.shape[1:], np.int64)
    for number in (1, 5, 6, 9, 70_000):
        centre = rng.uniform((3, 8, 8), (9, 32, 36)).reshape(3, 1, 1, 1)
        radii = rng.uniform((2, 5, 5), (5, 12, 12)).reshape(3, 1, 1, 1)
        labels[(((grid - centre) / radii) ** 2).sum(0) < 1] = number
    labels[0, 0, :3] = [80, -4, 5]
    return labels


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("anisotropy", [1.0, 5.75])
def test_torch_and_compiled_flows_are_the_same(anisotropy: float, device: str) -> None:
    labels = labels_with_everything()
    voxel_size = VoxelSize(anisotropy * 0.2, 0.2, 0.2)
    compiled = flows_3d(labels, voxel_size, tolerance=1e-6)
    flows = flows_3d_torch(labels, voxel_size, torch.device(device), tolerance=1e-6).cpu().numpy()
    moving = np.linalg.norm(compiled, axis=0) > 0.5
    assert moving.sum() > 3000
    assert (flows * compiled).sum(0)[moving].min() > 0.9999
    assert not flows[:, labels <= 0].any()
    assert not flows[:, 0, 0, 0].any()


def test_an_empty_volume_has_no_flow_and_a_plane_is_refused() -> None:
    cpu = torch.device("cpu")
    assert not flows_3d_torch(np.zeros((3, 4, 5), np.uint8), VoxelSize(1, 1, 1), cpu).any()
    with pytest.raises(InputError, match="3 axes"):
        flows_3d_torch(np.zeros((4, 5), np.uint8), VoxelSize(1, 1, 1), cpu)
