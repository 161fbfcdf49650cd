"""Time and peak memory of a piece of work, repeated, for the benchmarks."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from nuclei3d.console import say


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
        self._start = self._process.memory_info().rss
        self._peak = self._start
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
    all sides alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in works}
    peaks = dict.fromkeys(works, 0.0)
    results: dict[str, Any] = dict.fromkeys(works)
    for name in order_of_turns({name: repeats for name, (_, repeats) in works.items()}):
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


def order_of_turns(repeats: Mapping[str, int]) -> list[str]:
    """Spread the runs of each side evenly over the whole: of 3 and 1, the one comes second or third."""
    turns = [((i + 0.5) / count, name) for name, count in repeats.items() for i in range(count)]
    return [name for _, name in sorted(turns, key=lambda turn: turn[0])]


def ratio_of(peer: Sequence[float], own: Sequence[float]) -> dict[str, float]:
    """Tell how many times the peer's duration ours is: of the medians, and the least and most of all runs."""
    return {
        "median": round(statistics.median(peer) / statistics.median(own), 2),
        "least": round(min(peer) / max(own), 2),
        "most": round(max(peer) / min(own), 2),
    }
