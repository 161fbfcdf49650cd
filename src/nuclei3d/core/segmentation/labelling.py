"""From the flow of a volume to labels on the image's grid: followed in 3D, or plane by plane and linked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.label_boxes import available_threads
from nuclei3d.core.segmentation.dynamics import finish_labels, masks_2d_from_flows, masks_from_field
from nuclei3d.core.segmentation.flow_field import FlowField
from nuclei3d.core.segmentation.grids import to_image_grid
from nuclei3d.core.segmentation.settings import SegmentationSettings
from nuclei3d.core.segmentation.stitching import stitch_planes


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
