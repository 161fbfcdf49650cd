"""Training here against ``cellpose.train.train_seg``: the same slices, network, number and size of crops.

    python benchmarks/training.py [--slices DIR] [--steps N] [--learning-rate X] [--json]
    python benchmarks/training.py --memory [--planes N] [--edge PX] [--steps N] [--json]

Without --slices, a small sample is simulated and prepared in a temporary folder. Three ratios are measured:

throughput_ratio   crops per second here / there, from the first step to the end
startup_ratio      seconds there / here from the call until the network sees its first crop; both sides have
                   their modules loaded and their files in the page cache
val_loss_ratio     validation loss here / there after the same number of crops, on the same unaugmented crops
                   of the validation planes; each network sees them normalised as in its training

cpu_time_ratio, processor time per crop there / here, is besides what a busy machine can measure. `ours` has
the seconds of all epochs, too: in steps, in these waited for crops, between epochs (validation, state).

Both use the optimiser AdamW, batches of the same size, and stock's augmentation as far as both have it; the
learning rate and its schedule are each one's own defaults. A GPU is so fast that the first steps, in which
libraries choose their algorithms, weigh heavily: take --steps 600 or more there.

With --memory the peak memory of training on many planes is measured in its place (8000 of 256 x 256 pixels
must fit into 6 GB). Some dozens of planes stand in, under many names, for as many different ones. Each
training is a process of its own whose peak (resident memory) is taken:

peak_gb_disk     larger than train.memory_limit_gb: read plane by plane
peak_gb_memory   kept in memory
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cellpose.resnet_torch import CPnet

from nuclei3d.config import load_params
from nuclei3d.config.sections import TrainParams
from nuclei3d.console import say
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import choose_device, new_network
from nuclei3d.scoring.matching import relabel_sequential
from nuclei3d.stages.export.cellpose import write_training_set
from nuclei3d.stages.prepare import prepare
from nuclei3d.stages.simulate import simulate
from nuclei3d.stages.training_data import (
    Slices,
    SliceSummary,
    StoredSample,
    describe_samples,
    load_samples,
    plane_flows,
    read_slices,
    store_sample,
)
from nuclei3d.training.arithmetic import Arithmetic
from nuclei3d.training.crops import CropGrid
from nuclei3d.training.examples import Examples
from nuclei3d.training.loop import train_network
from nuclei3d.training.samples import SampleInfo, SampleSet
from nuclei3d.views import VIEWS
from shared import draw_volume, new_parser, run_command, train_with_stock

DRAWN = 48
THROUGHPUT_BARS = {"cpu": 1.0, "cuda": 5.0}


@dataclass(frozen=True)
class Measured:
    """Seconds until the first step; crops per second and processor seconds per crop from there on."""

    startup_seconds: float
    crops_per_second: float
    cpu_seconds_per_crop: float
    validation_loss: float = math.nan
    seconds: dict[str, float] = field(default_factory=dict)


class _Clock:
    """Notes when a network is called first."""

    def __init__(self, network: CPnet) -> None:
        self._first: tuple[float, float] | None = None
        network.register_forward_pre_hook(lambda *_: self._note())
        self._began = time.perf_counter()

    def _note(self) -> None:
        if self._first is None:
            self._first = (time.perf_counter(), time.process_time())

    def stop(self, crops: int) -> Measured:
        """Take the time now."""
        assert self._first is not None
        wall, cpu = self._first
        return Measured(
            startup_seconds=wall - self._began,
            crops_per_second=crops / (time.perf_counter() - wall),
            cpu_seconds_per_crop=(time.process_time() - cpu) / crops,
        )


def train_ours(slices: Path, settings: TrainParams, seed: int) -> tuple[Measured, CPnet]:
    """Train here; the clock runs from reading the slices."""
    network = new_network(settings.diameter_px, seed)
    clock = _Clock(network)
    described = read_slices(slices)
    planes = load_samples(described, "train", settings.memory_limit_gb)
    validation = load_samples(described, "validation", settings.memory_limit_gb)
    grid = CropGrid.of_planes(settings, described.summary.diameter_px)
    examples = Examples(planes, validation, settings, grid, seed=seed)
    outcome = train_network(network, examples, settings, device=choose_device(settings.device))
    measured = clock.stop(settings.epochs * (settings.crops_per_epoch or len(planes)))
    history = outcome.state.history
    steps = sum(examples.crops / report["crops_per_second"] for report in history)
    waited = sum(report["waited_seconds"] for report in history)
    between = sum(report["seconds"] for report in history) - steps
    measured = replace(measured, seconds={"steps": steps, "waited": waited, "between": between})
    network.load_state_dict(outcome.weights)
    return measured, network


def train_stock(slices: Path, files: Path, settings: TrainParams, seed: int) -> tuple[Measured, CPnet]:
    """Train with ``train_seg`` on the files written for it."""
    torch.manual_seed(seed)
    network = new_network(settings.diameter_px, seed).to(choose_device(settings.device))
    clock = _Clock(network)
    with tempfile.TemporaryDirectory() as folder:
        measured = clock.stop(train_with_stock(network, slices, files, settings, Path(folder)))
    return measured, network


def stock_normalised(planes: SampleSet) -> SampleSet:
    """Give planes the range that stock Cellpose normalises with: their own 1st and 99th percentile."""
    infos = []
    for number, info in enumerate(planes.infos):
        raw = planes.normalised(number) * (info.norm_high - info.norm_low) + info.norm_low
        low, high = (float(v) for v in np.percentile(raw, [1, 99]))
        infos.append(replace(info, norm_low=low, norm_high=max(high, low + 1e-3)))
    return replace(planes, infos=tuple(infos))


def validation_loss(network: CPnet, planes: SampleSet, described: Slices, settings: TrainParams) -> float:
    """Compute the loss on fixed crops, in float32."""
    grid = CropGrid.of_planes(settings, described.summary.diameter_px)
    judged = settings.model_copy(update={"validation_crops": 256, "batch_size": 16})
    examples = Examples(planes, planes, judged, grid, seed=0)
    arithmetic = Arithmetic(choose_device(settings.device), torch.float32, torch.contiguous_format)
    return examples.validate(network, arithmetic)["validation_loss"]


def compare(slices: Path, files: Path, settings: TrainParams, seed: int) -> dict[str, Any]:
    """Train both and compare; `files` is an empty folder for what stock Cellpose reads."""
    described = read_slices(slices)
    say("writing the planes for cellpose.train.train_seg")
    write_training_set(slices, files)
    planes = load_samples(described, "validation")
    load_samples(described, "train")
    warm_up(slices, files, settings)
    say("training here")
    ours, network = train_ours(slices, settings, seed)
    ours = replace(ours, validation_loss=validation_loss(network, planes, described, settings))
    say(f"  {ours}")
    say("training with cellpose.train.train_seg")
    stock, network = train_stock(slices, files, settings, seed)
    planes = stock_normalised(planes)
    stock = replace(stock, validation_loss=validation_loss(network, planes, described, settings))
    say(f"  {stock}")
    device = choose_device(settings.device).type
    throughput_ratio = ours.crops_per_second / stock.crops_per_second
    return {
        "throughput_ratio": throughput_ratio,
        "startup_ratio": stock.startup_seconds / ours.startup_seconds,
        "val_loss_ratio": ours.validation_loss / stock.validation_loss,
        "cpu_time_ratio": stock.cpu_seconds_per_crop / ours.cpu_seconds_per_crop,
        "ours": vars(ours),
        "stock": vars(stock),
        "device": device,
        "passed": throughput_ratio >= THROUGHPUT_BARS[device],
        "threads": torch.get_num_threads(),
        "planes": len(described.infos["train"]),
        "steps": settings.epochs * math.ceil((settings.crops_per_epoch or 0) / settings.batch_size),
        **{name: getattr(settings, name) for name in ("learning_rate", "crop_px", "batch_size")},
    }


def warm_up(slices: Path, files: Path, settings: TrainParams) -> None:
    """Load compiled code and touch the files of both sides once."""
    short = {"epochs": 1, "crops_per_epoch": 2, "validation_crops": 2}
    train_ours(slices, settings.model_copy(update=short), 0)
    from cellpose import train as _  # noqa: F401 - loaded, as ours is

    for path in sorted((*(slices / "train").iterdir(), *(files / "train").iterdir())):
        path.read_bytes()


def sample_slices(folder: Path) -> Path:
    """Simulate and prepare a sample."""
    split = {"train": "embryo_a", "validation": "embryo_b", "test": "embryo_c"}
    named = [f"data.split.{part}=[{embryo}]" for part, embryo in split.items()]
    params = load_params(None, ["tracking.enabled=false", *named])
    simulate(params, folder / "data")
    prepare(params, folder / "data", folder / "slices")
    return folder / "slices"


def write_planes(folder: Path, planes: int, edge: int) -> None:
    """Write a slice data set whose planes are links to a few."""
    image, labels = draw_volume((DRAWN, edge, edge), 34.0, 1.0, np.random.default_rng(0))
    (folder / "train").mkdir(parents=True)
    samples: list[StoredSample] = []
    for number in range(planes):
        view, frame = VIEWS[number % len(VIEWS)], f"t{number // 768:03d}"
        file = f"train/e_{frame}_{view}_{number:05d}"
        if number < DRAWN:
            plane = relabel_sequential(labels[number])[0].astype(np.uint16)
            info = SampleInfo(
                file=file,
                embryo="e",
                frame=frame,
                view=view,
                index=number,
                shape=(1, edge, edge),
                voxel_size=VoxelSize(0.35, 0.35, 0.35),
                nuclei=int(plane.max()),
                min_contrast=3.0,
                norm_low=100.0,
                norm_high=450.0,
            )
            flows = plane_flows(plane)[:, None]
            samples.append(store_sample(folder, "train", info, image[number][None], plane[None], flows))
        else:
            first = samples[number % DRAWN]
            os.link(folder / f"{first.info.file}.bin", folder / f"{file}.bin")
            info = replace(first.info, file=file, frame=frame, view=view, index=number)
            samples.append(replace(first, info=info))
    summary = SliceSummary(
        data=Path("absent"),
        nucleus_diameter_um=12.0,
        voxel_um=0.35,
        diameter_px=34.0,
        contrast_quintiles=(),
        md5="",
    )
    describe_samples(folder, summary, samples)


def measure_memory(folder: Path, planes: int, edge: int, steps: int) -> dict[str, Any]:
    """Train a few steps of 8 crops on many planes, read from the disk and held in memory."""
    write_planes(folder / "slices", planes, edge)
    result: dict[str, Any] = {"planes": planes, "edge_px": edge, "steps": steps}
    for name, limit_gb in (("disk", 0.01), ("memory", 100.0)):
        settings = {
            "train.epochs": 1,
            "train.batch_size": 8,
            "train.crops_per_epoch": 8 * steps,
            "train.memory_limit_gb": limit_gb,
            "calibrate.volumes": 0,
            "tracking.enabled": "false",
        }
        options = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
        run = run_command("train", "--slices", str(folder / "slices"), "--out", str(folder / name), *options)
        result |= {f"peak_gb_{name}": run.peak_mb / 1e3, f"seconds_{name}": run.seconds}
        say(f"{name}: {run.peak_mb / 1e3:.2f} GB, {run.seconds:.0f} s")
    return result


def main() -> None:
    """Read the command line, compare, print."""
    parser = new_parser(__doc__)
    parser.add_argument("--slices", type=Path, help="folder made by prepare; default: a simulated sample")
    parser.add_argument("--steps", type=int, help="default 240, with --memory 10")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop-px", type=int, default=128)
    parser.add_argument("--diameter-px", type=float, default=17.0)
    parser.add_argument("--learning-rate", type=float, default=TrainParams().learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true", help="measure the memory of a training instead")
    parser.add_argument("--planes", type=int, default=8000, help="with --memory")
    parser.add_argument("--edge", type=int, default=256, help="of the planes, with --memory")
    options = parser.parse_args()
    if options.memory:
        with tempfile.TemporaryDirectory() as folder:
            result = measure_memory(Path(folder), options.planes, options.edge, options.steps or 10)
        if options.json:
            print(json.dumps(result))
        return
    # stock warms up for ten epochs, whatever their length
    epochs = 12
    settings = TrainParams(
        diameter_px=options.diameter_px,
        epochs=epochs,
        batch_size=options.batch_size,
        crops_per_epoch=max(1, (options.steps or 240) // epochs) * options.batch_size,
        crop_px=options.crop_px,
        learning_rate=options.learning_rate,
        validation_crops=1,
        select="last",
    )
    with tempfile.TemporaryDirectory() as folder:
        slices = options.slices or sample_slices(Path(folder))
        files = Path(folder) / "files"
        files.mkdir()
        result = compare(slices, files, settings, options.seed)
    for name in ("throughput_ratio", "startup_ratio", "val_loss_ratio"):
        say(f"{name}: {result[name]:.3g}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
