"""The stages of the pipeline, one module a command: files in, files out."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

from nuclei3d.console import keep_warnings, progress_bar, warn, warned
from nuclei3d.errors import MachineError
from nuclei3d.worker import tie_to_parent

Result = TypeVar("Result")


def map_in_processes(
    words: str, work: Callable[..., Result], *items: Sequence[Any], workers: int
) -> list[Result]:
    """Work on items in so many processes, under a progress bar; 1 means this process.

    The processes end with this one, however it ends, and with the first error. MachineError is raised if one
    of them is killed, by the system for lack of memory, say.
    """
    pool = None
    found: Iterable[tuple[Result, Iterable[str]]]
    if workers > 1:
        # spawned, not forked: threads of numerical libraries do not survive a fork
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, spawn, initializer=_settle_in)
    results: list[Result] = []
    try:
        if pool is not None:
            # it watches a process only from the next result on: one that dies before would go unnoticed
            list(pool.map(int, range(workers)))
        with progress_bar(words, total=len(items[0])) as bar:
            noting = partial(_work_and_note, work)
            found = map(noting, *items) if pool is None else pool.map(noting, *items)
            for result, noted in found:
                for text in noted:
                    warn(text)
                results.append(result)
                bar.advance()
    except BaseException as error:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
            end_children()
        if isinstance(error, BrokenProcessPool):
            raise MachineError(
                f"{words}: one of {workers} processes was killed, most likely for lack of memory; free some, "
                "or have fewer (prepare.workers, taskset)"
            ) from None
        raise
    if pool is not None:
        pool.shutdown()
    return results


def _work_and_note(work: Callable[..., Result], *item: Any) -> tuple[Result, list[str]]:
    """Work on an item; give the warnings of this process so far, too."""
    return work(*item), list(warned)


def _settle_in() -> None:
    tie_to_parent()
    keep_warnings()
    # Ctrl-C reaches all processes of a terminal; it is the parent's to answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_children() -> None:
    """End the processes that this one spawned."""
    for process in multiprocessing.active_children():
        process.terminate()
        process.join()
