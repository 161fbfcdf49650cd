"""Training here against ``cellpose.train.train_seg``: the same slices, network, number and size of crops.

    python benchmarks/training.py [--slices DIR] [--steps N] [--learning-rate X] [--json]

Without --slices, a small sample is simulated and prepared in a temporary folder. Three ratios are measured:

throughput_ratio   crops per second here / there, from the first step to the end
startup_ratio      seconds there / here from the call until the network sees its first crop; both sides have
                   their modules loaded and their files in the page cache
val_loss_ratio     validation loss here / there after the same number of crops, on the same unaugmented crops
                   of the validation planes; each network sees them normalised as in its training

cpu_time_ratio, processor time per crop there / here, is besides what a busy machine can measure.

Both use the optimiser AdamW, batches of the same size, and stock's augmentation as far as both have it; the
learning rate and its schedule are each one's own defaults. A GPU is so fast that the first steps, in which
libraries choose their algorithms, weigh heavily: take --steps 600 or more there.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cellpose.resnet_torch import CPnet

from nuclei3d.config import load_params
from nuclei3d.config.sections import TrainParams
from nuclei3d.console import say
from nuclei3d.networks.cpnet import choose_device, new_network
from nuclei3d.stages.export.cellpose import write_training_set
from nuclei3d.stages.prepare import prepare
from nuclei3d.stages.simulate import simulate
from nuclei3d.stages.training_data import Slices, load_samples, read_slices
from nuclei3d.training.crops import CropGrid
from nuclei3d.training.examples import Examples
from nuclei3d.training.learner import Arithmetic
from nuclei3d.training.loop import train_network
from nuclei3d.training.samples import SampleSet
from shared import new_parser


@dataclass(frozen=True)
class Measured:
    """Seconds until the first step; crops per second and processor seconds per crop from there on."""

    startup_seconds: float
    crops_per_second: float
    cpu_seconds_per_crop: float
    validation_loss: float = math.nan


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
    grid = CropGrid.of_planes(settings, described.diameter_px)
    examples = Examples(planes, validation, settings, grid, seed=seed)
    outcome = train_network(network, examples, settings, device=choose_device(settings.device))
    measured = clock.stop(settings.epochs * (settings.crops_per_epoch or len(planes)))
    network.load_state_dict(outcome.weights)
    return measured, network


def train_stock(slices: Path, all_files: Path, settings: TrainParams, seed: int) -> tuple[Measured, CPnet]:
    """Train with ``train_seg`` on the files written for it."""
    from cellpose.train import train_seg

    described = read_slices(slices)
    infos = [info for info in described.infos["train"] if info.nuclei >= settings.min_train_masks]
    files = [str(all_files / f"{info.file}_img.tif") for info in infos]
    torch.manual_seed(seed)
    network = new_network(settings.diameter_px, seed).to(choose_device(settings.device))
    clock = _Clock(network)
    with tempfile.TemporaryDirectory() as folder:
        train_seg(
            network,
            train_files=files,
            channels=[0, 0],
            batch_size=settings.batch_size,
            n_epochs=settings.epochs,
            nimg_per_epoch=settings.crops_per_epoch,
            bsize=settings.crop_px,
            min_train_masks=settings.min_train_masks,
            save_path=folder,
            model_name="stock",
        )
        measured = clock.stop(settings.epochs * (settings.crops_per_epoch or len(files)))
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
    grid = CropGrid.of_planes(settings, described.diameter_px)
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
    return {
        "throughput_ratio": ours.crops_per_second / stock.crops_per_second,
        "startup_ratio": stock.startup_seconds / ours.startup_seconds,
        "val_loss_ratio": ours.validation_loss / stock.validation_loss,
        "cpu_time_ratio": stock.cpu_seconds_per_crop / ours.cpu_seconds_per_crop,
        "ours": vars(ours),
        "stock": vars(stock),
        "device": str(choose_device(settings.device)),
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


def main() -> None:
    """Read the command line, compare, print."""
    parser = new_parser(__doc__)
    parser.add_argument("--slices", type=Path, help="folder made by prepare; default: a simulated sample")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop-px", type=int, default=128)
    parser.add_argument("--diameter-px", type=float, default=17.0)
    parser.add_argument("--learning-rate", type=float, default=TrainParams().learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # stock warms up for ten epochs, whatever their length
    epochs = 12
    settings = TrainParams(
        diameter_px=options.diameter_px,
        epochs=epochs,
        batch_size=options.batch_size,
        crops_per_epoch=max(1, options.steps // epochs) * options.batch_size,
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
