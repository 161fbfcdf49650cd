"""The stages of the pipeline, one module a command: files in, files out."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

from nuclei3d.console import progress_bar

Result = TypeVar("Result")


def map_in_processes(
    words: str, work: Callable[..., Result], *items: Sequence[Any], workers: int
) -> list[Result]:
    """Work on items in so many processes, under a progress bar; 1 means this process."""
    results: list[Result] = []
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(words, total=len(items[0])))
        found: Iterable[Result] = map(work, *items)
        if workers > 1:
            # spawned, not forked: threads of numerical libraries do not survive a fork
            spawn = multiprocessing.get_context("spawn")
            found = stack.enter_context(ProcessPoolExecutor(workers, spawn)).map(work, *items)
        for result in found:
            results.append(result)
            bar.advance()
    return results
