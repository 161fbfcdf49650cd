"""What the user sees: messages and progress bars on stderr, one JSON object on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print one line for the reader on stderr."""
    _console.print(text, markup=False)


def emit_json(result: dict[str, Any]) -> None:
    """Print the one machine-readable object of a command (``--json``) on stdout."""
    json.dump(result, sys.stdout, default=str)
    sys.stdout.write("\n")
    sys.stdout.flush()


class Bar:
    """A running progress bar; `advance` moves it, `note` changes the text behind it."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress = progress
        self._task = task

    def advance(self, steps: float = 1) -> None:
        """Move the bar forward."""
        self._progress.advance(self._task, steps)

    def note(self, text: str) -> None:
        """Show a short text behind the bar, such as the current loss."""
        self._progress.update(self._task, note=text)


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Bar]:
    """Show a progress bar on stderr with the count, time spent and time left.

    Where stderr is no terminal (a log file, CI) nothing moves; only the finished state is printed.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_console, disable=not _console.is_terminal) as progress:
        yield Bar(progress, progress.add_task(description, total=total, note=""))
