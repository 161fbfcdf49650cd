"""How far labels lie off the image as a whole, as labels drawn on another grid or with an offset do."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfftn, next_fast_len, rfftn
from scipy.ndimage import distance_transform_edt

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import measure_range
from nuclei3d.scoring.matching import Floats, Labels

#: Offsets are looked for up to so far, in um.
FARTHEST_UM = 3.0
_SHELL_UM = 2.0


def label_offset_um(
    image: NDArray[np.number[Any]], labels: Labels, voxel_size: VoxelSize, farthest_um: float = FARTHEST_UM
) -> Floats | None:
    """Measure where labels lie, less where the nuclei of the image do: (z, y, x) in um.

    The labels are moved by whole voxels, up to `farthest_um` along each axis, until the mean intensity inside
    stands out most from that of a shell of unlabelled voxels around; a parabola through the neighbours gives
    the fraction. None where there is nothing to measure, or the best place is the farthest.
    """
    inside = labels > 0
    if not inside.any() or inside.all():
        return None
    distance = distance_transform_edt(~inside, sampling=voxel_size.zyx)
    shell = ~inside & (distance <= max(_SHELL_UM, *voxel_size.zyx))
    intensity = measure_range(image)
    cleaned, outside = intensity.clean(image)
    # a bright nucleus does not decide alone, and what is darker than the background says nothing
    values = np.clip(intensity.apply(cleaned), 0.0, 1.0)
    if outside is not None:
        values[outside] = 0.0
    template = inside / np.count_nonzero(inside) - shell / np.count_nonzero(shell)
    reach = [
        min(max(1, round(farthest_um / edge)), n - 2)
        for edge, n in zip(voxel_size.zyx, image.shape, strict=True)
    ]
    if min(reach) < 1:
        return None
    padded = [next_fast_len(n + r + 1, real=True) for n, r in zip(image.shape, reach, strict=True)]
    product = rfftn(values, padded) * np.conj(rfftn(template.astype(np.float32), padded))
    moved = irfftn(product, padded)
    window = moved[np.ix_(*(np.arange(-r - 1, r + 2) for r in reach))]
    best = np.unravel_index(int(window.argmax()), window.shape)
    if any(at in (0, size - 1) for at, size in zip(best, window.shape, strict=True)):
        return None
    offset = np.empty(3)
    for axis, (at, r, edge) in enumerate(zip(best, reach, voxel_size.zyx, strict=True)):
        before, here, after = (float(window[(*best[:axis], at + d, *best[axis + 1 :])]) for d in (-1, 0, 1))
        fraction = (before - after) / (2 * (before - 2 * here + after))
        offset[axis] = -(at - r - 1 + fraction) * edge
    return offset
