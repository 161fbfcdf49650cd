"""How prediction grows: with the volume, the number of frames, Dask workers, and when cut into blocks.

    python benchmarks/scaling.py [--model models/nuclei_3d] [--parts blocks frames sizes] [--json]

Time per voxel is that of volumes filled with nuclei at the network's scale. Peak memory over frames is that
of the whole command ``predict`` in a process of its own. Blocks are run by one and two workers with one
thread each and compared with the volume as a whole.
"""

from __future__ import annotations

import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nuclei3d.console import emit_json, say
from nuclei3d.images.frames import find_frames, read_labels
from nuclei3d.images.tiff import write_image
from nuclei3d.networks.folder import ModelInfo, load_model, save_model
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.segmentation.settings import SegmentationSettings
from nuclei3d.stages.predict_blocks import required_gb
from shared import (
    CUBIC,
    Filters,
    add_network_options,
    ap_of,
    draw_volume,
    measure,
    new_parser,
    run_command,
)

TIME_BAR = 0.15
MEMORY_BAR = 0.05
BLOCKS_BAR = 0.99
PARTS = ("blocks", "frames", "sizes")


def time_per_voxel(
    sizes: list[float], network: torch.nn.Module, diameter: float, repeats: int
) -> dict[str, Any]:
    """Time volumes of these sizes in Mvox; the largest difference from their mean, relative to it."""
    rng = np.random.default_rng(0)
    piece, _ = draw_volume((50, 100, 200), diameter, 1.0, rng)
    settings = SegmentationSettings(diameter_px=diameter, nucleus_diameter_um=diameter)
    device = torch.device("cpu")

    def segment(image: NDArray[Any]) -> int:
        return len(Segmenter(network, settings, device).segment(image, CUBIC).nuclei)

    segment(piece[:20])
    rows = {}
    for size in sizes:
        side = max(1, round((size * 1e6 / piece.size) ** (1 / 3)))
        image = np.tile(piece, (side, side, side))
        timing, _ = measure(partial(segment, image), repeats)
        rows[f"{image.size / 1e6:g}"] = {
            "us_per_voxel": round(1e6 * timing.median / image.size, 4),
            "cpu_us_per_voxel": round(1e6 * timing.cpu_median / image.size, 4),
            **timing.as_json(),
        }
        say(f"{image.size / 1e6:g} Mvox: {1e6 * timing.median / image.size:.3f} us per voxel")
    result: dict[str, Any] = {"by_mvox": rows}
    for key in ("us_per_voxel", "cpu_us_per_voxel"):
        values = np.array([row[key] for row in rows.values()])
        result[f"{key}_spread"] = round(float(np.abs(values / values.mean() - 1).max()), 4)
    return result


def memory_by_frames(
    counts: list[int], model: Path, diameter: float, folder: Path, shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Peak memory of a prediction of so many frames."""
    image, _ = draw_volume(shape, diameter, 1.0, np.random.default_rng(0))
    rows = {}
    for count in counts:
        movie = folder / f"movie_{count}"
        for t in range(count):
            write_image(movie / f"t{t:03d}.ome.tif", np.roll(image, 3 * t, axis=2), CUBIC)
        run = run_command("predict", str(movie), "--model", str(model), "--out", str(folder / f"out_{count}"))
        rows[str(count)] = round(run.peak_mb, 1)
        say(f"{count} frames: peak {run.peak_mb:.0f} MB, {run.cpu_seconds:.0f} s of processor time")
    values = np.array(list(rows.values()))
    return {"peak_mb": rows, "spread": round(float(np.abs(values / values.mean() - 1).max()), 4)}


def blocks_against_whole(
    model: Path, diameter: float, folder: Path, shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Cut a volume into blocks, run them with one and two workers, compare with the whole."""
    image, truth = draw_volume(shape, diameter, 1.0, np.random.default_rng(2))
    write_image(folder / "embryo.ome.tif", image, CUBIC)
    (frame,) = find_frames(folder / "embryo.ome.tif")
    settings = SegmentationSettings(diameter_px=diameter, nucleus_diameter_um=diameter)
    # The stage reckons with 1 GB for the process; blocks get room for half of the voxels, margins included.
    memory_gb = 1.0 + 0.5 * (required_gb(frame, settings) - 1.0)
    common = ["predict", str(folder / "embryo.ome.tif"), "--model", str(model)]
    run = run_command(*common, "--out", str(folder / "whole"), threads=1)
    whole = read_labels(folder / "whole" / "embryo_masks.ome.tif")
    result: dict[str, Any] = {
        "whole_s": round(run.seconds, 1),
        "whole_cpu_s": round(run.cpu_seconds, 1),
        "nuclei": int(whole.max()),
    }
    result["ap_truth"] = {"whole": ap_of(truth, whole, 0.5)[0]}
    for workers in (1, 2):
        out = folder / f"blocks_{workers}"
        wishes = [f"predict.memory_gb={memory_gb * workers}", f"predict.workers={workers}"]
        options = [text for wish in wishes for text in ("--set", wish)]
        run = run_command(*common, "--out", str(out), *options, threads=1)
        blocks = re.search(r"(\d+) blocks", run.messages)
        if blocks is None:
            raise RuntimeError(f"{memory_gb} GB were enough for the volume as a whole")
        labels = read_labels(out / "embryo_masks.ome.zarr")
        against_whole = ap_of(whole, labels, 0.9)[0]
        result[f"workers_{workers}"] = {
            "blocks": int(blocks[1]),
            "seconds": round(run.seconds, 1),
            "cpu_seconds": round(run.cpu_seconds, 1),
            "ap_90_against_whole": round(against_whole, 4),
        }
        result["ap_truth"][f"workers_{workers}"] = ap_of(truth, labels, 0.5)[0]
        say(
            f"{workers} workers, {blocks[0]}: {run.seconds:.0f} s ({run.cpu_seconds:.0f} s by processor), "
            f"AP .9 against the whole {against_whole:.4f}"
        )
    return result


def main() -> None:
    parser = new_parser(__doc__)
    add_network_options(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 8, 64], help="in Mvox")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--frame-shape", type=int, nargs=3, default=[32, 160, 160], help="of a frame")
    parser.add_argument("--block-shape", type=int, nargs=3, default=[64, 256, 256], help="volume that is cut")
    parser.add_argument(
        "--filters", action="store_true", help="time volumes with three filters in place of the network"
    )
    arguments = parser.parse_args()
    diameter, network = arguments.diameter, load_model(arguments.model).network
    report: dict[str, Any] = {"network": "filters" if arguments.filters else "cpnet"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        info = ModelInfo(name="bench", diameter_px=diameter, nucleus_diameter_um=diameter)
        save_model(model, network, info, "made by benchmarks/scaling.py")
        passed = []
        if "blocks" in arguments.parts:
            blocks = blocks_against_whole(model, diameter, folder, tuple(arguments.block_shape))
            report["blocks"] = blocks
            passed += [blocks[f"workers_{n}"]["ap_90_against_whole"] >= BLOCKS_BAR for n in (1, 2)]
        if "frames" in arguments.parts:
            shape = tuple(arguments.frame_shape)
            report["frames"] = memory_by_frames(arguments.frames, model, diameter, folder, shape)
            passed.append(report["frames"]["spread"] <= MEMORY_BAR)
    if "sizes" in arguments.parts:
        timed = Filters(diameter) if arguments.filters else network
        report["sizes"] = time_per_voxel(arguments.sizes, timed, diameter, arguments.repeats)
        passed.append(report["sizes"]["us_per_voxel_spread"] <= TIME_BAR)
    report["passed"] = all(passed)
    if arguments.json:
        emit_json(report)


if __name__ == "__main__":
    main()
