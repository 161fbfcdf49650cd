"""How much a nucleus stands out from its surroundings, and the bins of recall by contrast.

Contrast is c = (median inside - median of the shell) / (1.4826 MAD of the shell): the signal of a nucleus
in units of the noise around it. *Inside* is the mask without its outer rim; the *shell* is made of
unlabelled voxels at 1 to 2 um from the mask. Both distances are physical, so contrast does not depend on
the anisotropy of the voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, find_objects

from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import measure_range
from nuclei3d.scoring.matching import Floats, Integers, Labels

#: Depth of the rim that is left out of the inside, in um.
RIM_UM = 1.0
#: Nearest and farthest distance of the shell from the mask, in um.
SHELL_UM = (1.0, 2.0)

# A shell of fewer voxels gives no useful MAD; it is then widened, by this factor at a time.
_FEWEST_SHELL_VOXELS = 30
_WIDENING = 1.5
_WIDENINGS = 5


def nucleus_contrast(
    image: NDArray[np.number[Any]],
    labels: Labels,
    voxel_size: VoxelSize,
    unknown: NDArray[np.bool_] | None = None,
) -> Floats:
    """Measure the contrast of every labelled nucleus of a volume; what is `unknown` is no surroundings.

    Gives (labels.max() + 1,), indexed by label: nan for the background, for labels that are absent, and for
    nuclei so crowded that no unlabelled voxel lies near. A nucleus with nothing deeper than the rim counts
    with its deepest voxels. The MAD is never taken below the quantisation noise of the image, so flat
    synthetic backgrounds give large finite values.
    """
    if image.shape != labels.shape:
        raise InputError(f"image and labels differ in shape: {image.shape} and {labels.shape}")
    largest = int(labels.max()) if labels.size else 0
    contrast = np.full(largest + 1, np.nan)
    quantum = _quantisation_noise(image)
    fill = measure_range(image).fill_mask(image)
    if unknown is not None:
        fill = unknown if fill is None else fill | unknown
    reach_um = SHELL_UM[1] * _WIDENING**_WIDENINGS
    for label, box in enumerate(find_objects(labels), start=1):
        if box is None:
            continue
        for margin_um in (SHELL_UM[1], reach_um):
            around = _grow(box, margin_um, voxel_size, labels.shape)
            free = labels[around] == 0 if fill is None else (labels[around] == 0) & ~fill[around]
            shell = _shell(labels[around] == label, free, voxel_size, margin_um)
            if np.count_nonzero(shell) >= _FEWEST_SHELL_VOXELS:
                break
        if not shell.any():
            continue
        background = image[around][shell].astype(np.float64)
        middle = np.median(background)
        spread = max(1.4826 * float(np.median(np.abs(background - middle))), quantum)
        inside = image[box][_inside(labels[box] == label, voxel_size)]
        inside = inside[np.isfinite(inside)]
        contrast[label] = (np.median(inside.astype(np.float64)) - middle) / spread
    return contrast


def contrast_edges(contrast: Floats, bins: int = 5) -> Floats:
    """Give the inner edges, shape (bins - 1,), that cut the finite contrasts into equally full bins."""
    finite = contrast[np.isfinite(contrast)]
    if not len(finite):
        raise InputError("no nucleus has a measurable contrast, so no contrast bins can be made")
    return np.asarray(np.quantile(finite, np.linspace(0, 1, bins + 1)[1:-1]), dtype=np.float64)


def contrast_bin(contrast: Floats, edges: Sequence[float]) -> Integers:
    """Give the bin of each contrast, 0 the faintest, -1 where the contrast is nan."""
    bins = np.searchsorted(np.asarray(edges, dtype=np.float64), contrast, side="right")
    return np.where(np.isnan(contrast), -1, bins).astype(np.int64)


def _quantisation_noise(image: NDArray[np.number[Any]]) -> float:
    if np.issubdtype(image.dtype, np.integer):
        return 12**-0.5
    extent = float(image.max()) - float(image.min()) if image.size else 0.0
    return max(extent * 1e-6, float(np.finfo(np.float32).tiny))


def _grow(
    box: tuple[slice, ...], margin_um: float, voxel_size: VoxelSize, shape: tuple[int, ...]
) -> tuple[slice, ...]:
    grown = []
    for side, edge_um, length in zip(box, voxel_size.zyx, shape, strict=True):
        margin = int(np.ceil(margin_um / edge_um)) + 1
        grown.append(slice(max(side.start - margin, 0), min(side.stop + margin, length)))
    return tuple(grown)


def _shell(
    nucleus: NDArray[np.bool_], free: NDArray[np.bool_], voxel_size: VoxelSize, farthest_um: float
) -> NDArray[np.bool_]:
    distance = distance_transform_edt(~nucleus, sampling=voxel_size.zyx)
    free = free & (distance >= SHELL_UM[0])
    outer = SHELL_UM[1]
    # Rounding must not decide whether a plane at exactly 2 um belongs to the shell.
    shell: NDArray[np.bool_] = free & (distance <= outer + 1e-6)
    while np.count_nonzero(shell) < _FEWEST_SHELL_VOXELS and outer < farthest_um:
        outer *= _WIDENING
        shell = free & (distance <= outer + 1e-6)
    return shell


def _inside(mask: NDArray[np.bool_], voxel_size: VoxelSize) -> NDArray[np.bool_]:
    # Padding makes the border of the box count as outside; the border of the volume does too, which is right
    # for nuclei that it cuts: their visible rim is blurred like any other.
    depth = distance_transform_edt(np.pad(mask, 1), sampling=voxel_size.zyx)[1:-1, 1:-1, 1:-1]
    deep: NDArray[np.bool_] = depth > RIM_UM
    return deep if deep.any() else mask & (depth >= depth.max())
