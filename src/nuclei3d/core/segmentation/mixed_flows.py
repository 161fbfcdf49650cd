"""The flow of a volume from a 2D network on planes and a 3D network together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from nuclei3d.core.segmentation.flow_field import FlowField
from nuclei3d.core.segmentation.patch_flows import predict_patch_flows
from nuclei3d.core.segmentation.plane_flows import predict_plane_flows
from nuclei3d.core.segmentation.settings import SegmentationSettings
from nuclei3d.core.volume_network import VolumeNetwork
from nuclei3d.volumes.voxel_size import VoxelSize


def predict_mixed_flows(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    network: nn.Module,
    volume_network: VolumeNetwork,
    settings: SegmentationSettings,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
    *,
    orthogonal_network: nn.Module | None = None,
    seconds: dict[str, float] | None = None,
) -> FlowField:
    """Run a 3D network over a volume and a 2D network over its planes, and fuse all looks.

    Parameters as `nuclei3d.core.segmentation.prediction.segment_volume` (`settings.volume` is needed), and:

    Parameters
    ----------
    seconds
        Gets ``network`` (inside the forward passes) and ``views`` (the rest) added.

    Returns
    -------
    FlowField
        On the view grid (`nuclei3d.core.segmentation.grids.view_grid`).

    Notes
    -----
    The 3D network comes first: its packed field, 8 bytes a voxel, is all that is kept of it while the views,
    which need more room, are computed and summed up.
    """
    assert settings.volume is not None
    # Each look counts alike in the progress; how long one takes depends on the two networks.
    share = 1 / (1 + len(settings.seen_views))
    spent_solid: dict[str, float] = {}
    spent_views: dict[str, float] = {}
    field = predict_patch_flows(
        image,
        voxel_size,
        volume_network,
        settings.volume,
        device,
        _part_of(progress, 0.0, share),
        seconds=spent_solid,
    )
    fused = predict_plane_flows(
        image,
        voxel_size,
        network,
        settings,
        device,
        _part_of(progress, share, 1.0),
        orthogonal_network=orthogonal_network,
        volume_field=field,
        seconds=spent_views,
    )
    if seconds is not None:
        seconds.update({step: spent_solid[step] + spent_views[step] for step in spent_solid})
    return fused


def _part_of(
    progress: Callable[[float], None] | None, start: float, stop: float
) -> Callable[[float], None] | None:
    """Report the share done of a part as that of the whole."""
    if progress is None:
        return None
    report = progress
    return lambda done: report(start + (stop - start) * done)
