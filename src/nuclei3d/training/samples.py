"""Labelled images with their flows in compact types: planes of three views, and whole volumes.

Everything is (Z, Y, X); a plane is a volume of depth 1, whose rows are z in the views xz and yz. The sampling
says which samples are drawn, how often, and how much each nucleus counts in the loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nuclei3d.config.sections import LossParams, SamplingParams
from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize

SampleView = Literal["xy", "xz", "yz", "volume"]

FLOW_STEPS = 127
"""A flow component of 1 is stored as this int8; the rounding error of a direction is below half a degree."""

UNKNOWN_FLOW = -128
"""Stored as every component of the flow where nobody looked and labels are 0."""

_FAINT_QUANTILE = 0.2
_ORDER_STREAM = np.uint64(2**63)


@dataclass(frozen=True)
class SampleInfo:
    """Where a sample came from and what is in it (one row of manifest.csv).

    `index` is that of a plane within its view (0 for a volume), `shape` is (Z, Y, X) and (1, rows, columns)
    for a plane, `min_contrast` that of its faintest nucleus or nan; `norm_low` and `norm_high` normalise to 0
    and 1; `voxel_size` is that at which its nuclei measure what those of all embryos do, where embryos with
    unlike nuclei are trained together; `unknown` is the share of the voxels at which nobody looked.
    """

    file: str
    embryo: str
    frame: str
    view: SampleView
    index: int
    shape: tuple[int, int, int]
    voxel_size: VoxelSize
    nuclei: int
    min_contrast: float
    norm_low: float
    norm_high: float
    unknown: float = 0.0

    @property
    def is_plane(self) -> bool:
        """Whether this is a plane."""
        return self.view != "volume"

    @property
    def z_axis(self) -> int:
        """The axis of the arrays along which the embryo's z runs."""
        return 1 if self.view in ("xz", "yz") else 0


class SampleArrays(NamedTuple):
    """The voxels of one sample: intensities as stored, and labels 1..n with 0 for background, (Z, Y, X).

    `flows` are (Z, Y, X, components) times `FLOW_STEPS`: (dy, dx) for planes, (dz, dy, dx) for volumes;
    `UNKNOWN_FLOW` where nobody looked.
    """

    pixels: NDArray[np.uint16]
    labels: NDArray[np.unsignedinteger[Any]]
    flows: NDArray[np.int8]


class SampleNuclei(NamedTuple):
    """The nuclei of one sample, in the order of their labels 1..n; without rows for planes.

    `centres`, float32 (n, 3), are (z, y, x) in voxels (voxel i covers i to i + 1); `volumes_um3` and
    `contrasts`, of which some may be nan, are float32 (n,).
    """

    centres: NDArray[np.float32]
    volumes_um3: NDArray[np.float32]
    contrasts: NDArray[np.float32]


@dataclass(frozen=True)
class SampleSet:
    """Many planes, or many volumes, wherever their voxels lie: float64 arrays with an entry for each.

    intensity = stored * `step` + `offset`, in the units of the image. `flow_power` (samples, 3) is the mean
    square of the flow (z, y, x) inside nuclei, nan for planes and without nuclei. `read` gives the voxels of
    a sample, from memory or from a file; it is called from several threads.
    """

    infos: tuple[SampleInfo, ...]
    step: NDArray[np.float64]
    offset: NDArray[np.float64]
    nuclei: tuple[SampleNuclei, ...]
    flow_power: NDArray[np.float64]
    read: Callable[[int], SampleArrays]

    def __len__(self) -> int:
        return len(self.infos)

    @cached_property
    def gains(self) -> NDArray[np.float32]:
        """float32 (samples, 2): normalised intensity = stored * gains[:, 0] + gains[:, 1]."""
        low = np.array([info.norm_low for info in self.infos])
        span = np.array([info.norm_high for info in self.infos]) - low
        return np.asarray(np.stack([self.step / span, (self.offset - low) / span], axis=1), np.float32)

    def normalised(self, sample: int) -> NDArray[np.float32]:
        """Normalised image (Z, Y, X) of one sample."""
        stored = self.read(sample).pixels.astype(np.float32)
        return np.asarray(stored * self.gains[sample, 0] + self.gains[sample, 1])

    @cached_property
    def faint_contrast(self) -> float:
        """Contrast below which a nucleus is one of the faintest fifth; -inf without known contrasts."""
        known = np.concatenate([table.contrasts for table in self.nuclei] or [np.empty(0, np.float32)])
        known = known[np.isfinite(known)]
        return float(np.quantile(known, _FAINT_QUANTILE)) if len(known) else -np.inf

    @property
    def flow_variances(self) -> tuple[float, float, float]:
        """Mean square of the flow along (z, y, x) over all nuclei; y and x are alike under rotation."""
        counts = np.array([table.volumes_um3.sum() for table in self.nuclei], dtype=np.float64)
        known = np.isfinite(self.flow_power).all(axis=1) & (counts > 0)
        if not known.any():
            return 1 / 3, 1 / 3, 1 / 3
        z, y, x = (float(v) for v in np.average(self.flow_power[known], axis=0, weights=counts[known]))
        return max(z, 1e-3), max((y + x) / 2, 1e-3), max((y + x) / 2, 1e-3)


def quantise_image(image: NDArray[np.generic]) -> tuple[NDArray[np.uint16], float, float]:
    """Store an image as uint16; exact for unsigned integers of up to 16 bits, else to 1/65535 of its range.

    Gives (stored, step, offset): ``image = stored * step + offset``.
    """
    if image.dtype in (np.uint8, np.uint16, np.bool_):
        return image.astype(np.uint16, copy=False), 1.0, 0.0
    values = image.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    step = (high - low) / 65535 or 1.0
    return np.rint((values - low) / step).astype(np.uint16), step, low


def quantise_flows(flows: NDArray[np.floating[Any]]) -> NDArray[np.int8]:
    """Store flows (component, ...) from -1 to 1 as int8 (..., component), times `FLOW_STEPS`."""
    stored = np.asarray(np.rint(np.clip(flows, -1, 1) * FLOW_STEPS), np.int8)
    return np.ascontiguousarray(np.moveaxis(stored, 0, -1))


def measure_flow_power(
    flows: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]
) -> tuple[float, ...]:
    """Mean square of the flow along (z, y, x) inside nuclei; nan for planes and without nuclei."""
    inside = labels > 0
    if len(flows) < 3 or not inside.any():
        return (float("nan"),) * 3
    return tuple(float(np.square(part[inside], dtype=np.float64).mean()) for part in flows)


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
