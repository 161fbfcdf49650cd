"""From the flow of a volume to labels on the image's grid: followed in 3D, or plane by plane and linked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.label_boxes import available_threads
from nuclei3d.core.segmentation.dynamics import finish_labels, masks_2d_from_flows, masks_from_flows
from nuclei3d.core.segmentation.grids import to_image_grid
from nuclei3d.core.segmentation.settings import SegmentationSettings
from nuclei3d.core.segmentation.stitching import stitch_planes
from nuclei3d.volumes.voxel_size import VoxelSize


@dataclass(frozen=True)
class FlowField:
    """What the network says about a volume, on the view grid.

    Attributes
    ----------
    flow
        float16 or float32 (3, z, y, x), components (z, y, x), about unit vectors in physical space.
    logit
        float16 or float32 (z, y, x), mean over the views.
    voxel_size
        Of the view grid.
    """

    flow: NDArray[np.floating[Any]]
    logit: NDArray[np.floating[Any]]
    voxel_size: VoxelSize


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
    labels, scores = masks_from_flows(
        flows.flow, flows.logit, flows.voxel_size, settings.nucleus_diameter_um, settings.masks
    )
    return to_image_grid(labels, scores, shape)


def stitch_flows(
    flows: FlowField, shape: tuple[int, ...], settings: SegmentationSettings
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Segment each xy plane on its own and link the planes; parameters and results as `label_flows`."""
    diameter_px = settings.nucleus_diameter_um / flows.voxel_size.x
    planes = np.zeros(flows.logit.shape, np.uint32)

    def segment(z: int) -> None:
        planes[z] = masks_2d_from_flows(flows.flow[1:, z], flows.logit[z], diameter_px, settings.masks)

    with ThreadPoolExecutor(available_threads()) as pool:
        list(pool.map(segment, range(len(planes))))
    labels = stitch_planes(planes, settings.stitch_min_iou, settings.stitch_max_gap)
    bounds_um3 = settings.masks.bounds_um3(settings.nucleus_diameter_um)
    threshold = settings.masks.score_threshold
    scores = finish_labels(labels, flows.flow, flows.logit, flows.voxel_size, bounds_um3, threshold)
    return to_image_grid(labels, scores, shape)
