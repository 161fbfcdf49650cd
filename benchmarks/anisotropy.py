"""Real embryos made as anisotropic as the recipe's: does the prediction hold?

    python benchmarks/anisotropy.py --model models/nuclei_3d --data DIR [--frames Emb11/t501 ...] [--json]

Frames and labels are upsampled in x and y (linear; labels by nearest neighbour), so that a nucleus keeps its
planes while the anisotropy becomes 5.75 and 11.5; the network sees the same diameter in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config.sections import DataParams
from nuclei3d.console import emit_json, say
from nuclei3d.grid import resize_linear, resize_nearest
from nuclei3d.images.embryos import LabelledVolume, find_embryos, read_labelled
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.matching import match, overlap_table
from nuclei3d.segmentation.segmenter import Segmenter
from shared import Labels, new_parser

ANISOTROPIES = (5.75, 11.5)
BAR = 0.02


def upsampled(volume: LabelledVolume, anisotropy: float) -> tuple[NDArray[Any], Labels, VoxelSize]:
    """Upsample x and y until the voxels have this anisotropy."""
    image, voxel_size = volume.image, volume.voxel_size
    factor = anisotropy / voxel_size.anisotropy
    shape = (image.shape[0], *(round(size * factor) for size in image.shape[1:]))
    y, x = (voxel_size.zyx[axis] * image.shape[axis] / shape[axis] for axis in (1, 2))
    return (
        np.rint(resize_linear(image, shape)).astype(image.dtype),
        resize_nearest(volume.labels, shape).astype(np.uint32),
        VoxelSize(voxel_size.z, y, x),
    )


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="embryos, such as those of BBBC050")
    parser.add_argument("--frames", nargs="+", default=["Emb10/t401", "Emb11/t401", "Emb11/t501"])
    arguments = parser.parse_args()
    segmenter = Segmenter(arguments.model)
    frames = {
        f"{frame.embryo}/{frame.frame}": frame
        for embryo in find_embryos(arguments.data)
        for frame in embryo.labelled
    }
    counts: dict[str, NDArray[np.float64]] = {}
    for name in arguments.frames:
        volume = read_labelled(frames[name], DataParams())
        shown = {"native": (volume.image, volume.labels, volume.voxel_size)}
        shown |= {f"{anisotropy:g}": upsampled(volume, anisotropy) for anisotropy in ANISOTROPIES}
        for key, (image, labels, voxel_size) in shown.items():
            table = overlap_table(labels, segmenter.segment(image, voxel_size).labels)
            hits = match(table, 0.5).tp
            counts[key] = counts.get(key, np.zeros(3)) + np.array([hits, table.n_true, table.n_pred])
            say(f"{name} {key}: {hits} of {table.n_true}, {table.n_pred} predicted")
    ap = {key: round(float(hits / (true + pred - hits)), 4) for key, (hits, true, pred) in counts.items()}
    loss = {key: round(ap["native"] - value, 4) for key, value in ap.items()}
    if arguments.json:
        emit_json({"ap_ortho": ap, "loss": loss, "passed": max(loss.values()) <= BAR})


if __name__ == "__main__":
    main()
