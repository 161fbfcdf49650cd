"""Validation on fixed crops: the loss by view, and how much of each nucleus is found by contrast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nuclei3d.core.training.batches import Batch
from nuclei3d.core.training.losses import losses_of_crops
from nuclei3d.core.training.sampling import plane_contrasts
from nuclei3d.core.training.state import EpochReport

_QUINTILES = ("found_faintest", "found_faint", "found_middle", "found_bright", "found_brightest")
_SMALLEST_PX = 12


def measure_contrasts(batches: Sequence[Batch]) -> list[list[NDArray[np.float64]]]:
    """Measure the contrast of all nuclei: per batch, per crop, float64 (largest label + 1,)."""
    return [
        [
            plane_contrasts(image[0].numpy(), labels.astype(np.uint16))
            for image, labels in zip(batch.images, batch.labels, strict=True)
        ]
        for batch in batches
    ]


@torch.no_grad()
def validate(
    network: nn.Module,
    batches: Sequence[Batch],
    report: EpochReport,
    *,
    views: Sequence[str],
    contrasts: Sequence[Sequence[NDArray[np.float64]]],
    device: torch.device,
    precision: torch.dtype,
    layout: torch.memory_format,
) -> EpochReport:
    """Fill in the validation figures of a report; the network is left in training mode if it was.

    Parameters
    ----------
    network
        What to judge.
    batches
        Fixed crops on the CPU; without any the report stays as it is.
    report
        Of the epoch.
    views
        View of every plane of the validation set.
    contrasts
        From `measure_contrasts`.
    device, precision, layout
        How the network computes.
    """
    if not batches:
        return report
    was_training = network.training
    network.eval()
    losses: list[tuple[str, float, float]] = []
    found: list[tuple[float, float]] = []
    for batch, batch_contrasts in zip(batches, contrasts, strict=True):
        moved = batch.to(device)
        images = moved.images.contiguous(memory_format=layout)
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            output = network(images)[0].float()
        parts = losses_of_crops(output, moved.flows, moved.foreground).cpu().tolist()
        losses.extend((views[plane], *part) for plane, part in zip(batch.planes, parts, strict=True))
        inside = (output[:, 2] > 0).cpu().numpy()
        for crop, values in enumerate(batch_contrasts):
            found.extend(found_shares(inside[crop], batch.labels[crop], values))
    network.train(was_training)
    flow = float(np.mean([loss[1] for loss in losses]))
    probability = float(np.mean([loss[2] for loss in losses]))
    by_view = {
        f"validation_loss_{view}": float(np.mean([a + b for name, a, b in losses if name == view]))
        for view in {loss[0] for loss in losses}
    }
    measured: dict[str, Any] = {
        "validation_loss": flow + probability,
        "validation_flow_loss": flow,
        "validation_probability_loss": probability,
        **by_view,
        **found_by_quintile(found),
    }
    return replace(report, **measured)


def found_shares(
    inside: NDArray[np.bool_], labels: NDArray[np.int32], contrasts: NDArray[np.float64]
) -> list[tuple[float, float]]:
    """Give contrast and share of the pixels called foreground of each nucleus of a crop that is no sliver."""
    areas = np.bincount(labels.ravel(), minlength=len(contrasts))
    hits = np.bincount(labels.ravel(), weights=inside.ravel(), minlength=len(contrasts))
    # slivers at the edge of a crop say nothing
    counted = (areas >= _SMALLEST_PX) & np.isfinite(contrasts)
    counted[0] = False
    return [(float(contrasts[label]), hits[label] / areas[label]) for label in np.flatnonzero(counted)]


def found_by_quintile(found: list[tuple[float, float]]) -> dict[str, float]:
    """Average the shares over five equally full bins of contrast (all nan with fewer than five nuclei)."""
    if len(found) < len(_QUINTILES):
        return dict.fromkeys(_QUINTILES, math.nan)
    shares = np.array([share for _, share in sorted(found)])
    return {
        name: float(np.mean(part))
        for name, part in zip(_QUINTILES, np.array_split(shares, len(_QUINTILES)), strict=True)
    }
