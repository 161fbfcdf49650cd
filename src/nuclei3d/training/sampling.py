"""Which samples are drawn, how often, and how much each nucleus counts in the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nuclei3d.config.sections import LossParams, SamplingParams
from nuclei3d.errors import InputError
from nuclei3d.training.samples import SampleInfo, SampleSet

_ORDER_STREAM = np.uint64(2**63)


def sample_weights(
    infos: Sequence[SampleInfo], params: SamplingParams, min_nuclei: int
) -> NDArray[np.float64]:
    """Compute how often each sample is drawn: float64 (samples,), sum 1.

    A crop of a volume is to show every nucleus alike often, so the weight of a volume is the number of nuclei
    (at least 1), times the weights of `params` that are not about planes.
    """
    planes = np.array([info.is_plane for info in infos], dtype=bool)
    nuclei = np.array([info.nuclei for info in infos], dtype=np.float64)
    by_view = {"xy": params.xy, "xz": params.xz, "yz": params.yz, "volume": 1.0}
    weights = np.array([by_view[info.view] for info in infos], dtype=np.float64)
    weights *= np.maximum(nuclei, 1) ** (params.nuclei_power if planes.all() else 1 + params.nuclei_power)
    weights[planes & (nuclei < min_nuclei)] *= params.sparse
    if params.contrast_power:
        contrast = np.array([info.min_contrast for info in infos], dtype=np.float64)
        known = np.isfinite(contrast) & (contrast > 0)
        if known.any():
            ratio = np.ones(len(infos))
            ratio[known] = contrast[known] / np.median(contrast[known])
            weights *= np.clip(ratio**-params.contrast_power, 0.25, 4.0)
    if params.balance != "none":
        groups = [
            info.embryo if params.balance == "embryos" else f"{info.embryo}/{info.frame}" for info in infos
        ]
        totals: Counter[str] = Counter()
        for group, weight in zip(groups, weights, strict=True):
            totals[group] += weight
        weights /= np.array([totals[group] or 1.0 for group in groups])
    if not weights.sum() > 0:
        raise InputError(
            "nothing is left to draw: all training planes have a sampling weight of 0; lower "
            "train.min_train_masks or raise the weights of train.sampling"
        )
    return np.asarray(weights / weights.sum())


def epoch_order(weights: NDArray[np.float64], crops: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Draw the samples of one epoch in their order: int64 (crops,).

    Samples of equal weight are drawn in turns, each once before any comes again, as stock Cellpose does;
    otherwise each one's number of draws is its expectation, rounded at random (systematic sampling), so that
    rare kinds of planes come in every epoch.
    """
    rng = np.random.Generator(
        np.random.Philox(
            key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, _ORDER_STREAM], np.uint64)
        )
    )
    order = rng.permutation(len(weights))
    ends = np.cumsum(weights[order])
    points = (rng.random() + np.arange(crops)) / crops * ends[-1]
    chosen = order[np.minimum(np.searchsorted(ends, points, side="right"), len(weights) - 1)]
    return np.asarray(rng.permutation(chosen), dtype=np.int64)


def plane_contrasts(image: NDArray[np.float32], labels: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Measure the contrast of each nucleus in a plane (Y, X): float64 (largest label + 1,).

    The median inside, less the median of the unlabelled pixels around, over 1.4826 times the MAD of these;
    nan for the background, missing labels and nuclei without unlabelled pixels around.
    """
    contrasts = np.full(int(labels.max(initial=0)) + 1, np.nan)
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        wide = tuple(slice(max(side.start - 4, 0), side.stop + 4) for side in box)
        mask = labels[wide] == label
        shell = ndimage.binary_dilation(mask, iterations=4) & (labels[wide] == 0)
        if np.count_nonzero(shell) < 8:
            continue
        around = image[wide][shell]
        middle = float(np.median(around))
        spread = 1.4826 * float(np.median(np.abs(around - middle)))
        contrasts[label] = (float(np.median(image[wide][mask])) - middle) / max(spread, 1e-3)
    return contrasts


def nucleus_weights(samples: SampleSet, params: LossParams) -> list[NDArray[np.float32]] | None:
    """Compute the weight of every nucleus in the loss, by contrast or size; None if all are 1.

    Gives float32 (largest label + 1,) of each sample, whose entry 0 (background) is 1.
    """
    if params.weight_by == "none" or params.power == 0 or not len(samples):
        return None
    values = [_nucleus_values(samples, number, params.weight_by) for number in range(len(samples))]
    finite = np.concatenate(values)
    finite = finite[np.isfinite(finite) & (finite > 0)]
    if not len(finite):
        return None
    middle = float(np.median(finite))
    weights = []
    for sample_values in values:
        ratio = np.maximum(np.nan_to_num(sample_values, nan=middle), 1e-3 * middle) / middle
        weight = np.clip(ratio**-params.power, 1 / params.max_weight, params.max_weight)
        weight[0] = 1.0
        weights.append(weight.astype(np.float32))
    return weights


def _nucleus_values(samples: SampleSet, number: int, weight_by: str) -> NDArray[np.float64]:
    """Give contrast or size by label; nan for the background."""
    if not samples.infos[number].is_plane:
        table = samples.nuclei[number]
        known = table.volumes_um3 if weight_by == "size" else table.contrasts
        return np.append(np.nan, known).astype(np.float64)
    labels = samples.read(number).labels[0]
    if weight_by == "contrast":
        return plane_contrasts(samples.normalised(number)[0], labels)
    areas = np.bincount(labels.ravel()).astype(np.float64)
    areas[(areas == 0) | (np.arange(len(areas)) == 0)] = np.nan
    return areas
