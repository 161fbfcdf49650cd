"""What the benchmarks share: synthetic nuclei and networks, times and memory, steps done once, tables."""

from __future__ import annotations

import argparse
import statistics
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

from nuclei3d.console import say
from nuclei3d.flows import flows_2d
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import load_model
from nuclei3d.scoring.matching import average_precision, overlap_table
from nuclei3d.segmentation.masks import clean_labels

CUBIC = VoxelSize(1, 1, 1)
EMBRYOS = tuple(f"Emb{number:02d}" for number in range(1, 12))
"""Those of BBBC050."""
Labels = NDArray[np.uint32]
Shape = tuple[int, int, int]


def new_parser(doc: str | None, *, whole: bool = False) -> argparse.ArgumentParser:
    """Make a parser with --json that describes itself by the first line or the whole of a docstring."""
    text = doc or ""
    parser = argparse.ArgumentParser(
        description=text if whole else text.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter if whole else argparse.HelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def markdown(columns: Sequence[str], rows: Mapping[str, Sequence[str]], corner: str = "") -> str:
    """Draw a table in Markdown."""
    lines = [f"| {corner}{' ' if corner else ''}| {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)


def once(folder: Path, name: str, times: dict[str, float], work: Callable[[], Any]) -> None:
    """Do a step unless its record says that it is done; keep the seconds it took."""
    record = folder / f"{name}.seconds"
    if record.is_file():
        times[name] = float(record.read_text())
        return
    say(f"--- {name}")
    start = time.perf_counter()
    work()
    times[name] = time.perf_counter() - start
    record.write_text(f"{times[name]:.2f}\n")


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
    labels = draw_labels(bodies, tuple(map(float, shape)), CUBIC)
    brightness = np.append(0, rng.uniform(0.5, 1.2, int(labels.max())))[labels]
    light = ndimage.gaussian_filter(brightness.astype(np.float32), (diameter / 9, 0.8, 0.8))
    image = rng.poisson(100 + 300 * light) + rng.normal(0, 3, shape)
    return np.clip(image, 0, None).astype(np.uint16), labels


# --- networks


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `network_of`."""
    parser.add_argument("--model", type=Path, help="model folder; without, one is trained briefly")
    parser.add_argument("--diameter", type=float, default=17.0, help="of the nuclei, in voxels")
    parser.add_argument("--steps", type=int, default=150, help="of the brief training")


def network_of(arguments: argparse.Namespace) -> nn.Module:
    """Load the network that is asked for, or train one on planes of a volume, enough to find such nuclei."""
    if arguments.model:
        return load_model(arguments.model).network
    diameter, steps = arguments.diameter, arguments.steps
    say(f"no --model: training one for {steps} steps")
    rng = np.random.default_rng(0)
    image, labels = draw_volume((64, 160, 160), diameter, 1.0, rng)
    low, high = np.percentile(image, (1, 99.8))
    planes = ((image - low) / (high - low)).astype(np.float32)
    network = new_network(diameter, 0).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        batch, targets = [], []
        for _ in range(6):
            axis = int(rng.integers(3))
            index = int(rng.integers(labels.shape[axis]))
            plane, truth = planes.take(index, axis), labels.take(index, axis)
            y, x = (int(rng.integers(size - 64 + 1)) for size in plane.shape)
            box = (slice(y, y + 64), slice(x, x + 64))
            batch.append(np.stack([plane[box], 0 * plane[box]]))
            inside = (truth > 0)[box].astype(np.float32)
            targets.append(np.concatenate([5 * flows_2d(truth)[:, box[0], box[1]], inside[None]]))
        wanted = torch.from_numpy(np.stack(targets))
        output = network(torch.from_numpy(np.stack(batch)).contiguous(memory_format=torch.channels_last))[0]
        loss = nn.functional.mse_loss(output[:, :2], wanted[:, :2]) / 2
        loss = loss + nn.functional.binary_cross_entropy_with_logits(output[:, 2], wanted[:, 2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


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
    """Watches the resident memory of this process from a thread."""

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
        self._peak = max(self._peak, self._process.memory_info().rss)
        self._stop.set()
        self._thread.join()

    @property
    def megabytes(self) -> float:
        return (self._peak - self._start) / 1e6


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
