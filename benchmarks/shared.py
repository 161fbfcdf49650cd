"""What the benchmarks share: command lines, tables, synthetic nuclei and networks, times and memory."""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn

from nuclei3d.config import Params, load_params
from nuclei3d.config.sections import TrainParams
from nuclei3d.console import say
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import new_network
from nuclei3d.scoring.matching import average_precision, overlap_table
from nuclei3d.segmentation.masks import clean_labels
from nuclei3d.stages.training_data import read_slices

CUBIC = VoxelSize(1, 1, 1)
Labels = NDArray[np.uint32]
Shape = tuple[int, int, int]


def new_parser(
    doc: str | None, *, whole: bool = False, embryos: bool = False, params: Path | None = None
) -> argparse.ArgumentParser:
    """Make a parser with --json that describes itself by the first line or the whole of a docstring.

    With `embryos` it has --data and --out, with `params` the options that `params_of` reads.
    """
    text = doc or ""
    parser = argparse.ArgumentParser(
        description=text if whole else text.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter if whole else argparse.HelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    if embryos:
        parser.add_argument("--data", type=Path, required=True, help="the embryos of BBBC050")
        parser.add_argument("--out", type=Path, required=True, help="folder for all that is made")
    if params is not None:
        parser.add_argument("--params", type=Path, default=params)
        parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="NAME=VALUE")
    return parser


def params_of(options: argparse.Namespace) -> Params:
    """Read the parameters that the command line names."""
    return load_params(options.params, options.overrides)


def markdown(columns: Sequence[str], rows: Mapping[str, Sequence[str]], corner: str = "") -> str:
    """Draw a table in Markdown."""
    lines = [f"| {corner}{' ' if corner else ''}| {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)


def ap_of(truth: NDArray[Any], labels: NDArray[Any], *thresholds: float) -> list[float]:
    """Give the average precision at some thresholds."""
    return [float(value) for value in average_precision(overlap_table(truth, labels), thresholds)]


# --- nuclei


@dataclass(frozen=True)
class Ellipsoid:
    """A nucleus: centre (z, y, x) in um, semi-axes in um and their directions (rows of a rotation)."""

    centre: NDArray[np.float64]
    semi_axes: NDArray[np.float64]
    rotation: NDArray[np.float64]

    @property
    def radius(self) -> float:
        """Radius of the sphere of equal volume."""
        return float(np.prod(self.semi_axes) ** (1 / 3))


def touching_nuclei(
    box_um: tuple[float, float, float], count: int, diameter_um: float, voxel_size: VoxelSize, seed: int
) -> Labels:
    """Pack ellipsoids into a box, one after the other, each as close to the others as may be; draw them.

    Radii are uniform in diameter / 2 (1 +- 0.25). Two centres are at least 0.92 times the sum of their radii
    apart: neighbours cut into each other, and their labels touch.
    """
    rng = np.random.default_rng(seed)
    placed: list[Ellipsoid] = []
    radii = diameter_um / 2 * np.sort(rng.uniform(0.75, 1.25, count))[::-1]
    box = np.array(box_um)
    for radius in radii:
        margin = np.minimum(0.75 * radius, box / 2)
        candidates = rng.uniform(margin, box - margin, (4000, 3))
        chosen = 0
        if placed:
            centres = np.array([other.centre for other in placed])
            reach = np.array([other.radius for other in placed]) + radius
            nearest = (np.linalg.norm(candidates[:, None] - centres, axis=2) / reach).min(1)
            nearest[nearest < 0.92] = np.inf
            chosen = int(np.argmin(nearest))
            if not np.isfinite(nearest[chosen]):
                continue
        axes = rng.uniform(0.88, 1.12, 3)
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        placed.append(Ellipsoid(candidates[chosen], radius * axes / np.prod(axes) ** (1 / 3), rotation))
    return draw_labels(placed, box_um, voxel_size)


def draw_labels(
    ellipsoids: list[Ellipsoid], box_um: tuple[float, float, float], voxel_size: VoxelSize
) -> Labels:
    """Sample ellipsoids at voxel centres; where two overlap the voxel goes to the one it lies deeper in."""
    edges = np.array(voxel_size.zyx)
    shape = np.maximum(1, np.round(np.array(box_um) / edges)).astype(int)
    labels = np.zeros(shape, np.uint32)
    depth = np.zeros(shape, np.float32)
    for number, body in enumerate(ellipsoids, start=1):
        reach = body.semi_axes.max()
        low = np.clip(np.floor((body.centre - reach) / edges - 0.5).astype(int), 0, shape)
        high = np.clip(np.ceil((body.centre + reach) / edges + 0.5).astype(int), 0, shape)
        here = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        at = np.stack(np.meshgrid(*[np.arange(a, b) for a, b in zip(low, high, strict=True)], indexing="ij"))
        offset = (at + 0.5) * edges.reshape(3, 1, 1, 1) - body.centre.reshape(3, 1, 1, 1)
        along = np.tensordot(body.rotation, offset, 1) / body.semi_axes.reshape(3, 1, 1, 1)
        inner = (1 - np.sqrt((along**2).sum(0))) * body.radius
        deeper = inner > depth[here]
        labels[here][deeper] = number
        depth[here][deeper] = inner[deeper]
    clean_labels(labels)
    return labels


def draw_volume(
    shape: Shape, diameter: float, share: float, rng: np.random.Generator
) -> tuple[NDArray[np.uint16], Labels]:
    """Draw nuclei, touching or nearly, in an ellipsoid that fills a share of the volume (1: everywhere)."""
    spacing = 1.08 * diameter
    axes = [np.arange(0.6 * spacing, size - 0.4 * spacing, spacing) for size in shape]
    centres = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    centres += rng.uniform(-0.12, 0.12, centres.shape) * diameter
    if share < 1:
        middle = np.array(shape) / 2
        # An ellipsoid that touches all faces fills pi / 6.
        reach = (share / (np.pi / 6)) ** (1 / 3) * middle - diameter / 2
        centres = centres[(((centres - middle) / reach) ** 2).sum(1) < 1]
    bodies = []
    for centre in centres:
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        semi_axes = diameter / 2 * rng.uniform(0.85, 1.15) * rng.uniform(0.9, 1.1, 3)
        bodies.append(Ellipsoid(centre, semi_axes, rotation))
    labels = draw_labels(bodies, shape, CUBIC)
    brightness = np.append(0, rng.uniform(0.5, 1.2, int(labels.max())))[labels]
    light = ndimage.gaussian_filter(brightness.astype(np.float32), (diameter / 9, 0.8, 0.8))
    image = rng.poisson(100 + 300 * light) + rng.normal(0, 3, shape)
    return np.clip(image, 0, None).astype(np.uint16), labels


# --- networks


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add the model that is measured, and the size at which nuclei are drawn for it."""
    parser.add_argument("--model", type=Path, default=Path("models/nuclei_3d"), help="model folder")
    parser.add_argument("--diameter", type=float, default=17.0, help="of the nuclei, in voxels")


def train_with_stock(network: nn.Module, slices: Path, files: Path, settings: TrainParams, out: Path) -> int:
    """Train with ``train_seg`` on the planes in `files` that its rule admits; give the number of crops.

    The files are those of `write_training_set`; the weights are in ``out/models/stock``.
    """
    from cellpose.train import train_seg

    infos = read_slices(slices).infos["train"]
    admitted = [info.file for info in infos if info.nuclei >= settings.min_train_masks]
    train_seg(
        network,
        train_files=[str(files / f"{file}_img.tif") for file in admitted],
        channels=[0, 0],
        batch_size=settings.batch_size,
        n_epochs=settings.epochs,
        nimg_per_epoch=settings.crops_per_epoch,
        bsize=settings.crop_px,
        min_train_masks=settings.min_train_masks,
        save_path=out,
        model_name="stock",
    )
    return settings.epochs * (settings.crops_per_epoch or len(admitted))


class Filters(nn.Module):
    """Three filters in the place of a network: flow up the blurred brightness, logit by brightness.

    The first batches go through CPnet as well, so that its share of the memory is there.
    """

    def __init__(self, diameter: float) -> None:
        super().__init__()
        reach = int(diameter / 2)
        position = torch.arange(-reach, reach + 1).float()
        bell = torch.exp(-(position**2) / (2 * (diameter / 4) ** 2))
        blur = bell[:, None] * bell
        kernels = torch.stack([blur * position[:, None], blur * position, blur / blur.sum()])
        self.weight = nn.Parameter(kernels[:, None], requires_grad=False)
        self.diam_mean = nn.Parameter(torch.tensor([diameter]), requires_grad=False)
        self.real = new_network(diameter, 0)
        self.real_batches = 0
        self.mkldnn = False
        self.nout = 3
        self.device = torch.device("cpu")

    def forward(self, stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give flow and logit, and a style as CPnet does."""
        if self.real_batches > 0:
            self.real_batches -= 1
            self.real(stack)
        output = nn.functional.conv2d(stack[:, :1].float(), self.weight, padding="same")
        length = output[:, :2].square().sum(1, keepdim=True).sqrt() + 1e-6
        flow = 5 * output[:, :2] / length
        logit = 10 * (output[:, 2:] - 0.35)
        return torch.cat([flow, logit], 1), torch.zeros(len(stack), 256)


# --- time and memory


@dataclass(frozen=True)
class Timing:
    """Seconds and processor seconds of each repeat, and the peak of memory above the start in MB.

    Processor seconds say more than seconds on a machine that others use at the same time.
    """

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    peak_mb: float

    @property
    def median(self) -> float:
        """Median of the repeats in seconds."""
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float:
        """Median of the repeats in processor seconds."""
        return statistics.median(self.cpu_seconds)

    def __str__(self) -> str:
        return f"{self.median:.2f} s ({self.cpu_median:.2f} s of processor time)"

    def as_json(self) -> dict[str, Any]:
        """Give median, spread (lowest and highest) and memory."""
        return {
            "median_s": round(self.median, 4),
            "spread_s": [round(min(self.seconds), 4), round(max(self.seconds), 4)],
            "cpu_median_s": round(self.cpu_median, 4),
            "cpu_spread_s": [round(min(self.cpu_seconds), 4), round(max(self.cpu_seconds), 4)],
            "repeats": len(self.seconds),
            "peak_mb": round(self.peak_mb, 1),
        }


class _PeakMemory:
    """Watches the resident memory of this process from a thread; `megabytes` is the peak above the start."""

    def __enter__(self) -> _PeakMemory:
        self._process = psutil.Process()
        self._start = self._peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, self._process.memory_info().rss)
        self.megabytes = (self._peak - self._start) / 1e6


def measure(work: Callable[[], Any], repeats: int) -> tuple[Timing, Any]:
    """Run `work` so many times; give its timing and its last result."""
    return measure_in_turns({"": (work, repeats)})[""]


def measure_in_turns(works: Mapping[str, tuple[Callable[[], Any], int]]) -> dict[str, tuple[Timing, Any]]:
    """Run each work as often as is said beside it, by turns; give timing and last result of each.

    The load of a shared machine changes over the minutes that a comparison takes. By turns, it changes for
    all sides alike: of 3 runs and 1, the one comes second or third.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in works}
    peaks = dict.fromkeys(works, 0.0)
    results: dict[str, Any] = dict.fromkeys(works)
    turns = [((i + 0.5) / count, name) for name, (_, count) in works.items() for i in range(count)]
    for _, name in sorted(turns, key=lambda turn: turn[0]):
        results[name] = None
        with _PeakMemory() as memory:
            start, cpu_start = time.perf_counter(), time.process_time()
            results[name] = works[name][0]()
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - cpu_start)
        peaks[name] = max(peaks[name], memory.megabytes)
        if name:
            say(f"  {name}: {seconds[name][-1]:.1f} s ({cpu_seconds[name][-1]:.1f} s of processor time)")
    return {
        name: (Timing(tuple(seconds[name]), tuple(cpu_seconds[name]), peaks[name]), results[name])
        for name in works
    }


def ratio_of(peer: Sequence[float], own: Sequence[float]) -> dict[str, float]:
    """Tell how many times the peer's duration ours is: of the medians, and the least and most of all runs."""
    return {
        "median": round(statistics.median(peer) / statistics.median(own), 2),
        "least": round(min(peer) / max(own), 2),
        "most": round(max(peer) / min(own), 2),
    }


@dataclass(frozen=True)
class CommandRun:
    """Seconds of a command, processor seconds of it and its workers, peak of its own memory, what it said."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    messages: str


def run_command(*arguments: str, threads: int | None = None) -> CommandRun:
    """Run a command of nuclei3d in a process of its own."""
    environment = dict(os.environ)
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    started, cpu_started = time.perf_counter(), _cpu_of_children()
    # A pipe that nobody reads until the end would fill up.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        command = [sys.executable, "-m", "nuclei3d", *arguments]
        process = subprocess.Popen(command, env=environment, stderr=said)
        watched, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, watched.memory_info().rss)
            time.sleep(0.02)
        said.seek(0)
        messages = said.read()
    if process.returncode:
        raise RuntimeError(messages)
    return CommandRun(time.perf_counter() - started, _cpu_of_children() - cpu_started, peak / 1e6, messages)


def _cpu_of_children() -> float:
    """Processor seconds of all processes that this one, or one of those, has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
