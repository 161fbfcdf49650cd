"""Segmenting a volume in 3D: normalise, run the network, follow the flow, bring the labels back.

Three steps that can be used on their own: `predict_flows` (the network pass), `labelling.label_flows`
(everything after it) and `segment_volume` (both, and measuring the nuclei).

From the flow of a volume to labels on the image's grid: followed in 3D, or plane by plane and linked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nuclei3d.grid import available_threads
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.unet3d import VolumeNetwork
from nuclei3d.segmentation.dynamics import finish_labels, masks_2d_from_flows, masks_from_field
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.network_pass import Networks, predict_flows
from nuclei3d.segmentation.nuclei import Nucleus, measure_nuclei
from nuclei3d.segmentation.settings import SegmentationSettings, check_scale, to_image_grid
from nuclei3d.segmentation.stitching import stitch_planes
from nuclei3d.segmentation.stock import segment_with_cellpose


def label_flows(
    flows: FlowField, shape: tuple[int, ...], settings: SegmentationSettings
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Follow the flow and bring the labels to the image's grid.

    Parameters
    ----------
    flows
        From `predict_flows`.
    shape
        Shape (z, y, x) of the image.

    Returns
    -------
    labels : uint32 array of that shape
        1..n without gaps.
    scores : float32 array (n + 1,)
        Score of each nucleus.
    """
    labels, scores = masks_from_field(flows, settings.nucleus_diameter_um, settings.masks)
    return to_image_grid(labels, scores, shape)


def stitch_flows(
    flows: FlowField, shape: tuple[int, ...], settings: SegmentationSettings
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Segment each xy plane on its own and link the planes; parameters and results as `label_flows`."""
    diameter_px = settings.nucleus_diameter_um / flows.voxel_size.x
    planes = np.zeros(flows.shape, np.uint32)

    def segment(z: int) -> None:
        flow, logit = flows.unpack((slice(z, z + 1), slice(None), slice(None)))
        planes[z] = masks_2d_from_flows(flow[1:, 0], logit[0], diameter_px, settings.masks)

    with ThreadPoolExecutor(available_threads()) as pool:
        list(pool.map(segment, range(len(planes))))
    labels = stitch_planes(planes, settings.stitch_min_iou, settings.stitch_max_gap)
    bounds_um3 = settings.masks.bounds_um3(settings.nucleus_diameter_um)
    scores = finish_labels(labels, flows, bounds_um3, settings.masks.score_threshold)
    return to_image_grid(labels, scores, shape)


@dataclass(frozen=True)
class Segmentation:
    """A segmented volume.

    Attributes
    ----------
    labels
        uint32 (z, y, x) on the input's grid, 0 for background, 1..n without gaps.
    nuclei
        One entry per label, in order.
    seconds
        Time by step: ``network`` (inside the forward pass), ``views`` (the rest of the network pass),
        ``masks``, ``total``.
    """

    labels: NDArray[np.uint32]
    nuclei: list[Nucleus]
    seconds: dict[str, float]


def segment_volume(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    network: nn.Module,
    settings: SegmentationSettings,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
    *,
    orthogonal_network: nn.Module | None = None,
    volume_network: nn.Module | None = None,
) -> Segmentation:
    """Segment the nuclei of a volume.

    Parameters
    ----------
    image
        (z, y, x), any real dtype, finite.
    voxel_size
        Of the image.
    network
        A 2D network such as CPnet, in mode ``full3d`` a `VolumeNetwork`; it is moved to `device`, its
        training mode is left as it was.
    settings
        What to do.
    device
        Where the network runs.
    progress
        Called with the share done, 0 to 1.
    orthogonal_network
        Another network for the xz and yz planes.
    volume_network
        The `VolumeNetwork` of mode ``mixed``.

    Raises
    ------
    InputError
        If image, voxel size and diameter do not fit together, or the mode is not one for these networks.
    """
    started = time.perf_counter()
    labels, scores, seconds = label_volume(
        image,
        voxel_size,
        network,
        settings,
        device,
        progress,
        orthogonal_network=orthogonal_network,
        volume_network=volume_network,
    )
    nuclei = measure_nuclei(labels, image, voxel_size, scores)
    if progress is not None:
        progress(1.0)
    return Segmentation(labels, nuclei, {**seconds, "total": time.perf_counter() - started})


def label_volume(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    network: nn.Module,
    settings: SegmentationSettings,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
    *,
    orthogonal_network: nn.Module | None = None,
    volume_network: nn.Module | None = None,
) -> tuple[NDArray[np.uint32], NDArray[np.float32], dict[str, float]]:
    """Segment the nuclei of a volume without measuring them; parameters and errors as `segment_volume`.

    Returns
    -------
    labels : uint32 array (z, y, x)
        On the input's grid, 1..n without gaps.
    scores : float32 array (n + 1,)
        Score of each nucleus; nan in mode ``cellpose``, which has none.
    seconds : dict
        Time by step.
    """
    check_scale(image.shape, voxel_size, settings)
    if settings.mode == "cellpose":
        labels = segment_with_cellpose(image, voxel_size, network, settings, device)
        return labels, np.full(int(labels.max(initial=0)) + 1, np.nan, np.float32), {}
    solid = volume_network if isinstance(volume_network, VolumeNetwork) else None
    networks = Networks(network, orthogonal_network, solid)
    flows, seconds = predict_flows(image, voxel_size, networks, settings, device, progress)
    started = time.perf_counter()
    label = stitch_flows if settings.mode == "stitch" else label_flows
    labels, scores = label(flows, image.shape, settings)
    seconds["masks"] = time.perf_counter() - started
    return labels, scores, seconds
