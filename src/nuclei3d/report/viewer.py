"""The volumes of the report's viewer: packed small enough to lie inside one HTML file."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.assessment import Assessment
from nuclei3d.scoring.matching import relabel_sequential

Arrays = tuple[NDArray[Any] | None, NDArray[np.uint32], NDArray[np.uint32]]

# A frame is shown with at most so many voxels; larger ones are thinned in y and x.
_FRAME_VOXELS = 6_000_000
_JPEG_QUALITY = 82
_SPRITE_WIDTH = 4096


@dataclass(frozen=True)
class ShownVolume:
    """What was found in a volume, and how to read its image, truth and prediction."""

    name: str
    voxel_size: VoxelSize
    assessment: Assessment
    read: Callable[[], Arrays]

    @property
    def errors(self) -> int:
        """Missed and false nuclei."""
        return int((~self.assessment.true.matched).sum() + (~self.assessment.pred.matched).sum())


def pack_volumes(volumes: Sequence[ShownVolume], megabytes: float) -> list[dict[str, Any]]:
    """Pack volumes, in order, until the budget is spent (at least one), those with the most errors first."""
    ranking = sorted(range(len(volumes)), key=lambda place: -volumes[place].errors)
    packed: dict[int, dict[str, Any]] = {}
    spent = 0
    for place in ranking:
        item = pack_volume(volumes[place])
        size = sum(len(item[key] or "") for key in ("image", "truth", "pred"))
        if packed and spent + size > megabytes * 1e6:
            break
        packed[place] = item
        spent += size
    return [packed[place] for place in sorted(packed)]


def pack_volume(volume: ShownVolume) -> dict[str, Any]:
    """Pack one volume.

    ``shape`` and ``voxel_um`` are those of what is shown; ``image`` has its planes side by side, `columns` a
    row, as a JPEG in base64 (grey values are square roots between the percentiles 1 and 99.8, so that faint
    nuclei show); ``truth`` and ``pred`` are 16-bit labels 1..n in the order of the nuclei of the assessment,
    little-endian, deflated, in base64; ``found`` and ``right`` tell of each of these whether it is matched.
    """
    image, truth, pred = volume.read()
    step = max(math.ceil(math.sqrt(truth.size / _FRAME_VOXELS)), 1)
    thin = (slice(None), slice(None, None, step), slice(None, None, step))
    shape = truth[thin].shape
    columns = max(1, min(_SPRITE_WIDTH // shape[2], shape[0]))
    return {
        "name": volume.name,
        "shape": list(shape),
        "voxel_um": [volume.voxel_size.z, volume.voxel_size.y * step, volume.voxel_size.x * step],
        "columns": columns,
        "image": None if image is None else _jpeg_of(_shrink(image, step), columns),
        "truth": _deflated(relabel_sequential(truth)[0][thin]),
        "pred": _deflated(relabel_sequential(pred)[0][thin]),
        "found": [int(matched) for matched in volume.assessment.true.matched],
        "right": [int(matched) for matched in volume.assessment.pred.matched],
    }


def _shrink(image: NDArray[Any], step: int) -> NDArray[np.float32]:
    """Average blocks of step x step pixels; what is left over at the far edges is averaged over fewer."""
    if step == 1:
        return image.astype(np.float32)
    rows, columns = (np.arange(0, length, step) for length in image.shape[1:])
    sums = np.add.reduceat(np.add.reduceat(image.astype(np.float32), rows, axis=1), columns, axis=2)
    counts = np.outer(np.diff(np.append(rows, image.shape[1])), np.diff(np.append(columns, image.shape[2])))
    return np.asarray(sums / counts, dtype=np.float32)


def _jpeg_of(image: NDArray[np.float32], columns: int) -> str:
    from imagecodecs import jpeg_encode

    low, high = np.percentile(image, (1, 99.8))
    share = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
    grey = np.round(255 * np.sqrt(share)).astype(np.uint8)
    depth, height, width = grey.shape
    rows = math.ceil(depth / columns)
    sheet = np.zeros((rows * columns, height, width), dtype=np.uint8)
    sheet[:depth] = grey
    sprite = (
        sheet.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)
    )
    packed = jpeg_encode(np.ascontiguousarray(sprite), level=_JPEG_QUALITY)
    return base64.b64encode(packed).decode("ascii")


def _deflated(labels: NDArray[np.uint32]) -> str:
    data = np.ascontiguousarray(np.minimum(labels, 65535), dtype="<u2").tobytes()
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")
