"""Time and peak memory of a piece of work, repeated, for the benchmarks."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil


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
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    peak = 0.0
    result = None
    for _ in range(repeats):
        result = None
        with _PeakMemory() as memory:
            start, cpu_start = time.perf_counter(), time.process_time()
            result = work()
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
        peak = max(peak, memory.megabytes)
    return Timing(tuple(seconds), tuple(cpu_seconds), peak), result
