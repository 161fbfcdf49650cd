"""Several workers of a search on one machine, each a process that ends with the search."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from nuclei3d.console import say
from nuclei3d.errors import InputError

# Spawned, not forked: threads and CUDA do not survive a fork.
_CONTEXT = multiprocessing.get_context("spawn")
_MAX_DEATHS = 20
_FAREWELL_S = 10.0


def run_workers(work: Callable[[], None], count: int) -> None:
    """Run `work` in so many processes until all of them have ended well.

    A process that was killed (by the system for lack of memory, say) is replaced, up to twenty times. When
    this process dies, however it dies, they die too.

    Parameters
    ----------
    work
        Can be pickled; ends when nothing is left to do.
    count
        Number of processes. They share the cores, and the GPUs in turn.

    Raises
    ------
    InputError
        If one of them ended with an error.
    """
    errors: SimpleQueue[str] = _CONTEXT.SimpleQueue()
    running: dict[SpawnProcess, int] = {}
    deaths = 0

    def start(index: int) -> None:
        process = _CONTEXT.Process(target=_serve, args=(work, index, count, errors), name=f"worker {index}")
        process.start()
        running[process] = index

    try:
        for index in range(count):
            start(index)
        while running:
            wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                index = running.pop(process)
                if process.exitcode == 0:
                    continue
                if not errors.empty():
                    raise InputError(errors.get())
                deaths += 1
                if process.exitcode is None or process.exitcode > 0 or deaths > _MAX_DEATHS:
                    raise RuntimeError(f"worker {index} ended with exit code {process.exitcode}; see above")
                say(f"worker {index} was killed by signal {-process.exitcode}; another takes its place")
                start(index)
    except KeyboardInterrupt:
        # a terminal interrupts them too, and they want to hand their trials back
        wait_until = time.monotonic() + _FAREWELL_S
        for process in running:
            process.join(max(0.0, wait_until - time.monotonic()))
        raise
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()


def _serve(work: Callable[[], None], index: int, count: int, errors: SimpleQueue[str]) -> None:
    _die_with_parent()
    _share_machine(index, count)
    try:
        work()
    except InputError as error:
        errors.put(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _share_machine(index: int, count: int) -> None:
    """Give this process its part of the cores and one GPU; before torch is imported, which looks here."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
    else:
        gpus = [name for name in visible.split(",") if name]
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
