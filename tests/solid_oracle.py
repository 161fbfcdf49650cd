"""A 3D network that knows the truth where nuclei do not touch: exact flows computed from what it sees."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from nuclei3d.config import Params
from nuclei3d.flows import flows_3d
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.folder import Model, ModelInfo, save_model
from nuclei3d.networks.planning import plan_architecture
from nuclei3d.networks.unet3d import VolumeNetwork, VolumeSpec, new_volume_network

SPEC = VolumeSpec(plan_architecture(2.0, "small"), 2.0, (16, 24, 24))
INFO = ModelInfo(name="oracle", kind="full3d", full3d=SPEC, diameter_px=12, nucleus_diameter_um=12)


class SolidOracle(VolumeNetwork):
    """Takes what is brighter than half the range for nuclei."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        output = np.empty((len(image), 4, *image.shape[2:]), np.float32)
        for one, made in zip(image[:, 0].float().numpy(), output, strict=True):
            labels = ndimage.label(one > 0.5)[0]
            made[:3] = 5 * flows_3d(labels, VoxelSize(2.0, 1.0, 1.0))
            made[3] = np.where(labels > 0, 6, -6)
        return torch.from_numpy(output)


def save_oracle(folder: Path) -> Path:
    """Write a model folder with the oracle's model.json; its weights are any."""
    save_model(folder, new_volume_network(SPEC, 0), INFO, "oracle")
    return folder


def serve_oracle(model: str, params: Params) -> Any:
    """Open such a folder in a worker of a service."""
    from nuclei3d.experiment import registry, serving_model

    serving_model.load_model = load_oracle
    return registry.load_served_model(model, params)


def load_oracle(path: Path) -> Model:
    """Load such a folder as the oracle."""
    return Model(SolidOracle(SPEC), INFO, path if path.is_file() else path / "oracle")
