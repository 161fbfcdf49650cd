"""Peak memory of a training on many planes: 8000 of 256 x 256 pixels must fit into 6 GB.

    python benchmarks/training_memory.py [--planes N] [--edge PX] [--steps N] [--json]

Some dozens of planes are drawn and stand in, under many names, for as many different ones. A few steps are
trained on them three times, each in a process of its own whose peak (resident memory) is taken:

peak_gb_disk     from the packed copy, larger than train.memory_limit_gb: read plane by plane
peak_gb_memory   from the packed copy, kept in memory
peak_gb_tiffs    from the TIFF files, as slices without a packed copy are
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from nuclei3d.config import load_params
from nuclei3d.console import say
from nuclei3d.flows import flows_2d
from nuclei3d.stages.train import train
from nuclei3d.stages.training_data import PACK_FOLDER, pack_planes

_DRAWN = 48
_VIEWS = ("xy", "xz", "yz")


def write_slices(folder: Path, planes: int, edge: int) -> None:
    """Write a slice data set whose planes are links to a few."""
    rng = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number in range(planes):
        view = _VIEWS[number % len(_VIEWS)]
        stem = f"e_t{number // 768:03d}_{view}_{number:05d}"
        if number < _DRAWN:
            drawn, nuclei = draw_plane(rng, edge)
            for suffix, array in drawn.items():
                tifffile.imwrite(
                    folder / "train" / f"{stem}{suffix}.tif",
                    array,
                    compression="zlib",
                    photometric="minisblack",
                    metadata=None,
                )
        else:
            first = rows[number % _DRAWN]
            source = Path(first["file"]).name.removesuffix("_img.tif")
            nuclei = first["nuclei"]
            for suffix in ("_img", "_lbl", "_img_flows"):
                os.link(folder / "train" / f"{source}{suffix}.tif", folder / "train" / f"{stem}{suffix}.tif")
        rows.append(
            {
                "part": "train",
                "file": f"train/{stem}_img.tif",
                "embryo": "e",
                "frame": stem[2:6],
                "view": view,
                "index": number,
                "nuclei": nuclei,
                "min_contrast": 3.0,
                "norm_low": 50.0,
                "norm_high": 450.0,
                "height": edge,
                "width": edge,
                "md5": hashlib.md5(stem.encode(), usedforsecurity=False).hexdigest(),
            }
        )
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    summary = {"data": "absent", "nucleus_diameter_um": 12.0, "voxel_um": 0.35, "diameter_px": 34.0}
    (folder / "summary.json").write_text(json.dumps(summary))


def draw_plane(rng: np.random.Generator, edge: int) -> tuple[dict[str, Any], int]:
    """Draw noisy discs, some touching; give image, labels and targets by the suffix of their file."""
    y, x = np.mgrid[:edge, :edge]
    labels = np.zeros((edge, edge), np.uint16)
    for _ in range(12):
        cy, cx, radius = *rng.uniform(0, edge, 2), rng.uniform(14, 20)
        disc = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
        labels[disc & (labels == 0)] = labels.max() + 1
    labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.uint16)
    nuclei = int(labels.max())
    brightness = np.concatenate([[0], rng.uniform(100, 400, nuclei)])
    image = rng.poisson(50 + brightness[labels]).astype(np.uint16)
    targets = np.stack([labels, labels > 0, *flows_2d(labels)]).astype(np.float32)
    return {"_img": image, "_lbl": labels, "_img_flows": targets}, nuclei


def measure(slices: Path, out: Path, steps: int, limit_gb: float) -> dict[str, float]:
    """Train in a process of its own; give its peak memory in GB and its seconds."""
    before = time.perf_counter()
    words = [sys.executable, __file__, "--train", str(slices), str(out), str(steps), str(limit_gb)]
    with subprocess.Popen(words) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the training ended with {process.returncode}")
    return {"peak_gb": usage.ru_maxrss * 1024 / 1e9, "seconds": time.perf_counter() - before}


def train_briefly(slices: Path, out: Path, steps: int, limit_gb: float) -> None:
    """Train so many steps of 8 crops with the recipe's network."""
    settings = {
        "train.epochs": 1,
        "train.batch_size": 8,
        "train.crops_per_epoch": 8 * steps,
        "train.memory_limit_gb": limit_gb,
        "calibrate.volumes": 0,
        "tracking.enabled": False,
    }
    train(load_params(None, [f"{name}={value}" for name, value in settings.items()]), slices, out)


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        slices, out, steps, limit_gb = sys.argv[2:]
        train_briefly(Path(slices), Path(out), int(steps), float(limit_gb))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--planes", type=int, default=8000)
    parser.add_argument("--edge", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = parser.parse_args()
    result: dict[str, Any] = {"planes": options.planes, "edge_px": options.edge, "steps": options.steps}
    with tempfile.TemporaryDirectory() as place:
        slices = Path(place) / "slices"
        write_slices(slices, options.planes, options.edge)
        pack_planes(slices)
        for name, limit_gb in (("disk", 0.01), ("memory", 100.0), ("tiffs", 100.0)):
            if name == "tiffs":
                shutil.rmtree(slices / PACK_FOLDER)
            measured = measure(slices, Path(place) / name, options.steps, limit_gb)
            say(f"{name}: {measured['peak_gb']:.2f} GB, {measured['seconds']:.0f} s")
            result |= {f"{key}_{name}": value for key, value in measured.items()}
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
