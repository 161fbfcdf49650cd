"""What the networks say of a volume: one field of flows on the view grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.unet3d import VolumeNetwork
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.patches import predict_mixed_flows, predict_patch_flows
from nuclei3d.segmentation.plane_flows import predict_plane_flows
from nuclei3d.segmentation.settings import SegmentationSettings, check_scale


@dataclass(frozen=True)
class Networks:
    """What looks at a volume.

    Attributes
    ----------
    main
        The 2D network, or the 3D one of mode full3d.
    orthogonal
        Another 2D network for xz and yz.
    volume
        The 3D network of mode mixed.
    """

    main: nn.Module
    orthogonal: nn.Module | None = None
    volume: VolumeNetwork | None = None


def predict_flows(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    networks: Networks,
    settings: SegmentationSettings,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
) -> tuple[FlowField, dict[str, float]]:
    """Run the networks over a volume; give the field and the seconds in the network and in the rest."""
    for each in settings.passes:
        check_scale(image.shape, voxel_size, each)
    _check_networks(networks, settings)
    seconds: dict[str, float] = {}
    common = (settings, device, progress)
    if isinstance(networks.main, VolumeNetwork):
        field = predict_patch_flows(image, voxel_size, networks.main, *common, seconds=seconds)
    elif settings.volume is not None and networks.volume is not None:
        field = predict_mixed_flows(
            image,
            voxel_size,
            networks.main,
            networks.volume,
            *common,
            orthogonal_network=networks.orthogonal,
            seconds=seconds,
        )
    else:
        field = predict_plane_flows(
            image,
            voxel_size,
            networks.main,
            *common,
            orthogonal_network=networks.orthogonal,
            seconds=seconds,
        )
    return field, seconds


def _check_networks(networks: Networks, settings: SegmentationSettings) -> None:
    solid = isinstance(networks.main, VolumeNetwork)
    if settings.is_3d and not solid:
        raise InputError("mode 'full3d' needs a 3D network; this model has a 2D network: use ortho or stitch")
    if solid and not settings.is_3d:
        raise InputError(
            f"mode '{settings.mode}' needs a 2D network; this model has a 3D network: use full3d"
        )
    if settings.mode == "mixed" and (
        settings.volume is None or not isinstance(networks.volume, VolumeNetwork)
    ):
        raise InputError("mode 'mixed' needs a 3D network beside the 2D one: give it, or use ortho")
