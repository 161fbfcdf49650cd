"""Real embryos made as anisotropic as the recipe's: does the prediction hold?

    python benchmarks/anisotropy.py --model models/bbbc050 --data DIR [--frames Emb11/t501 ...] [--stock]

Frames and labels are upsampled in x and y (linear; labels by nearest neighbour), so that a nucleus keeps its
planes while the anisotropy becomes 5.75 and 11.5; the network sees the same diameter in pixels. Keys
``ap_ortho``, ``ap_stock`` by anisotropy. With ``--movie`` a time-lapse is also predicted from a folder and
from OME-Zarr, in the modes ortho and stitch, and the results compared voxel by voxel.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nuclei3d.config import load_params
from nuclei3d.config.sections import PredictParams
from nuclei3d.console import emit_json, say
from nuclei3d.grid import resize_linear, resize_nearest
from nuclei3d.images.frames import find_frames, read_labels
from nuclei3d.images.ome_zarr import create_zarr
from nuclei3d.images.tiff import write_image
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.folder import Model, load_model
from nuclei3d.scoring.matching import match, overlap_table
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.segmentation.settings import segmentation_settings
from nuclei3d.stages.predict import predict
from shared import new_parser

ANISOTROPIES = (5.75, 11.5)
BAR = 0.02


def upsampled(
    image: np.ndarray, labels: np.ndarray, voxel_size: VoxelSize, anisotropy: float
) -> tuple[np.ndarray, np.ndarray, VoxelSize]:
    """Upsample x and y until the voxels have this anisotropy."""
    factor = anisotropy / voxel_size.anisotropy
    shape = (image.shape[0], *(round(size * factor) for size in image.shape[1:]))
    y, x = (voxel_size.zyx[axis] * image.shape[axis] / shape[axis] for axis in (1, 2))
    return (
        np.rint(resize_linear(image, shape)).astype(image.dtype),
        resize_nearest(labels, shape).astype(np.uint32),
        VoxelSize(voxel_size.z, y, x),
    )


def compare(model: Model, frames: list[Path], modes: list[str]) -> dict[str, dict[str, float]]:
    """AP at .5, pooled over the frames, by mode and anisotropy."""
    counts: dict[tuple[str, str], np.ndarray] = {}
    for path in frames:
        (frame,) = find_frames(path)
        truth = read_labels(path.parent.parent / "labels" / path.name)
        native = (frame.read(), truth, frame.require_voxel_size())
        for anisotropy in (None, *ANISOTROPIES):
            image, labels, voxel_size = native if anisotropy is None else upsampled(*native, anisotropy)
            for mode in modes:
                settings = replace(segmentation_settings(model.info, PredictParams()), mode=mode)
                result = Segmenter(model.network, settings, "auto").segment(image, voxel_size)
                table = overlap_table(labels, result.labels)
                hits = match(table, 0.5).tp
                key = (mode, "native" if anisotropy is None else f"{anisotropy:g}")
                counts[key] = counts.get(key, np.zeros(3)) + np.array([hits, table.n_true, table.n_pred])
                say(f"{path.parts[-3]}/{path.stem} {key}: {hits} of {table.n_true}, {table.n_pred} predicted")
    report: dict[str, dict[str, float]] = {}
    for (mode, name), (hits, true, pred) in counts.items():
        report.setdefault(mode, {})[name] = round(float(hits / (true + pred - hits)), 4)
    return report


def compare_movies(model: Path, movie: Path) -> dict[str, bool]:
    """Predict a time-lapse from a folder and from OME-Zarr."""
    import zarr

    equal = {}
    frames = find_frames(movie)
    shape = tuple(min(frame.shape[axis] for frame in frames) for axis in range(3))
    voxel_size = frames[0].require_voxel_size()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = [frame.read()[: shape[0], : shape[1], : shape[2]] for frame in frames]
        store = folder / "movie.ome.zarr"
        create_zarr(store, shape, images[0].dtype, voxel_size, shape)
        group = zarr.open_group(str(store), mode="r+")
        ome = dict(group.attrs["ome"])
        ome["multiscales"][0]["axes"].insert(0, {"name": "t", "type": "time"})
        scale = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]
        scale["scale"] = [1.0, *scale["scale"]]
        group.attrs["ome"] = ome
        del group["0"]
        array = group.create_array("0", shape=(len(images), *shape), dtype=images[0].dtype)
        array[:] = np.stack(images)
        for t, image in enumerate(images):
            write_image(folder / "movie" / f"t{t:03d}.ome.tif", image, voxel_size)
        for mode in ("ortho", "stitch"):
            params = load_params(None, [f"predict.mode={mode}"])
            one = predict(params, [folder / "movie"], str(model), folder / f"a_{mode}")
            other = predict(params, [store], str(model), folder / f"b_{mode}")
            equal[mode] = all(
                np.array_equal(read_labels(a.masks), read_labels(b.masks))
                and a.table.read_text() == b.table.read_text()
                for a, b in zip(one.frames, other.frames, strict=True)
            )
            say(f"{mode}: folder and OME-Zarr {'equal' if equal[mode] else 'DIFFER'}")
    return equal


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the embryos (BBBC050)")
    parser.add_argument("--frames", nargs="+", default=["Emb10/t401", "Emb11/t401", "Emb11/t501"])
    parser.add_argument("--stock", action="store_true", help="stock Cellpose beside it (slow)")
    parser.add_argument("--movie", help="embryo whose time-lapse is predicted from folder and OME-Zarr")
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    paths = [
        arguments.data / embryo / "images" / f"{frame}.tif"
        for embryo, frame in (name.split("/") for name in arguments.frames)
    ]
    ap = compare(model, paths, ["ortho", *(["cellpose"] if arguments.stock else [])])
    report: dict[str, Any] = {"ap_ortho": ap["ortho"]}
    if arguments.stock:
        report["ap_stock"] = ap["cellpose"]
    report["loss"] = {name: round(ap["ortho"]["native"] - value, 4) for name, value in ap["ortho"].items()}
    report["passed"] = max(report["loss"].values()) <= BAR
    if arguments.movie:
        report["equal"] = compare_movies(arguments.model, arguments.data / arguments.movie / "images")
        report["passed"] = report["passed"] and all(report["equal"].values())
    if arguments.json:
        emit_json(report)


if __name__ == "__main__":
    main()
