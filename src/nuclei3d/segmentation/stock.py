"""Stock Cellpose's own 3D segmentation with the same weights, for comparison."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation.settings import SegmentationSettings


def segment_with_cellpose(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    network: nn.Module,
    settings: SegmentationSettings,
    device: torch.device,
) -> NDArray[np.uint32]:
    """Segment a volume with ``CellposeModel.eval(do_3D=True)``: uint32 labels (z, y, x), 1..n.

    Diameter, anisotropy, percentiles and the threshold on the logit are those of the settings (Cellpose sums
    three logits where this package takes their mean, so that threshold is multiplied by three); all else
    is Cellpose's default.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a banner
        from cellpose.models import CellposeModel

    state = network.state_dict()
    diameter = float(state["diam_mean"].item())
    model = CellposeModel(
        gpu=device.type == "cuda", pretrained_model=False, device=device, diam_mean=diameter
    )
    model.net.load_state_dict(state)
    model.net.eval()
    # Cellpose sets this only where it loads a file.
    model.net_ortho = None
    masks, _, _ = model.eval(
        image,
        channels=[0, 0],
        z_axis=0,
        do_3D=True,
        diameter=settings.nucleus_diameter_um / voxel_size.x * model.diam_mean / settings.diameter_px,
        anisotropy=voxel_size.anisotropy,
        normalize={"percentile": [settings.lower_percentile, settings.upper_percentile]},
        cellprob_threshold=3 * settings.masks.cellprob_threshold,
        flow3D_smooth=settings.flow3d_smooth,
    )
    return np.asarray(np.asarray(masks).reshape(image.shape), dtype=np.uint32)
