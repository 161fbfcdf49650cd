"""Peak memory of a training on many planes: 8000 of 256 x 256 pixels must fit into 6 GB.

    python benchmarks/training_memory.py [--planes N] [--edge PX] [--steps N] [--json]

Some dozens of planes are drawn and stand in, under many names, for as many different ones. A few steps are
trained on them twice, each in a process of its own whose peak (resident memory) is taken:

peak_gb_disk     larger than train.memory_limit_gb: read plane by plane
peak_gb_memory   kept in memory
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import load_params
from nuclei3d.console import say
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.train import train
from nuclei3d.stages.training_data import StoredSample, describe_samples, plane_flows, store_sample
from nuclei3d.training.samples import SampleInfo, SampleView
from shared import new_parser

_DRAWN = 48
_VIEWS: tuple[SampleView, ...] = ("xy", "xz", "yz")


def write_slices(folder: Path, planes: int, edge: int) -> None:
    """Write a slice data set whose planes are links to a few."""
    rng = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    samples: list[StoredSample] = []
    for number in range(planes):
        view = _VIEWS[number % len(_VIEWS)]
        frame = f"t{number // 768:03d}"
        file = f"train/e_{frame}_{view}_{number:05d}"
        if number < _DRAWN:
            image, labels = draw_plane(rng, edge)
            info = SampleInfo(
                file=file,
                embryo="e",
                frame=frame,
                view=view,
                index=number,
                shape=(1, edge, edge),
                voxel_size=VoxelSize(0.35, 0.35, 0.35),
                nuclei=int(labels.max()),
                min_contrast=3.0,
                norm_low=50.0,
                norm_high=450.0,
            )
            flows = plane_flows(labels)[:, None]
            samples.append(store_sample(folder, "train", info, image[None], labels[None], flows))
        else:
            first = samples[number % _DRAWN]
            os.link(folder / f"{first.info.file}.bin", folder / f"{file}.bin")
            info = replace(first.info, file=file, frame=frame, view=view, index=number)
            samples.append(replace(first, info=info))
    summary = {"data": "absent", "nucleus_diameter_um": 12.0, "voxel_um": 0.35, "diameter_px": 34.0}
    describe_samples(folder, summary, samples)


def draw_plane(rng: np.random.Generator, edge: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Draw noisy discs, some touching, and their labels."""
    y, x = np.mgrid[:edge, :edge]
    labels = np.zeros((edge, edge), np.uint16)
    for _ in range(12):
        cy, cx, radius = *rng.uniform(0, edge, 2), rng.uniform(14, 20)
        disc = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
        labels[disc & (labels == 0)] = labels.max() + 1
    labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.uint16)
    brightness = np.concatenate([[0], rng.uniform(100, 400, int(labels.max()))])
    return rng.poisson(50 + brightness[labels]).astype(np.uint16), labels


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
    parser = new_parser(__doc__)
    parser.add_argument("--planes", type=int, default=8000)
    parser.add_argument("--edge", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    result: dict[str, Any] = {"planes": options.planes, "edge_px": options.edge, "steps": options.steps}
    with tempfile.TemporaryDirectory() as place:
        slices = Path(place) / "slices"
        write_slices(slices, options.planes, options.edge)
        for name, limit_gb in (("disk", 0.01), ("memory", 100.0)):
            measured = measure(slices, Path(place) / name, options.steps, limit_gb)
            say(f"{name}: {measured['peak_gb']:.2f} GB, {measured['seconds']:.0f} s")
            result |= {f"{key}_{name}": value for key, value in measured.items()}
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
