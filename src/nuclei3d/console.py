"""What the user sees: messages and progress bars on stderr, one JSON object on stdout."""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def printable(text: str, longest: int = 200) -> str:
    """Make a text safe to repeat: in one line, cut short, with control characters escaped."""
    shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text[: longest + 1])
    return shown if len(shown) <= longest else f"{shown[:longest]}..."


def say(text: str) -> None:
    """Print one line for the reader on stderr; control characters but line breaks and tabs are escaped."""
    shown = "".join(sign if sign in "\n\t" else printable(sign) for sign in text)
    _console.print(shown, markup=False)


#: What `warn` said since the command began.
warned: dict[str, None] = {}
_kept_quiet: list[bool] = []


def warn(text: str) -> None:
    """Print a line about something odd, once a command; it also stands among the ``warnings`` of --json."""
    if text not in warned:
        warned[text] = None
        if not _kept_quiet:
            say(f"warning: {text}")


def keep_warnings() -> None:
    """Have warnings of this process noted only: the one that started it takes them and says them."""
    _kept_quiet.append(True)


def emit_json(result: dict[str, Any]) -> None:
    """Print the one machine-readable object of a command (``--json``) on stdout."""
    json.dump(result, sys.stdout, default=str)
    sys.stdout.write("\n")
    sys.stdout.flush()


#: Seconds between two lines of progress where stderr is a log file.
LOG_INTERVAL_S = 30.0


class Bar:
    """A running progress bar; `advance` moves it, `skip` too, `note` changes the text behind it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, steps: float = 1) -> None:
        """Move the bar forward."""
        self._progress.advance(self._task, steps)

    def skip(self, steps: float) -> None:
        """Move the bar past what was done before this run: it says nothing of the time left."""
        self.advance(steps)

    def note(self, text: str) -> None:
        """Show a short text behind the bar, such as the current loss."""
        self._progress.update(self._task, note=text)


class LogBar(Bar):
    """Progress for a log file: now and then a line with the share done, the time left and the note."""

    def __init__(self, description: str, total: int | None) -> None:
        self._description = description
        self._total = total
        self._done = self._skipped = 0.0
        self._note = ""
        self._start = self._last = time.monotonic()

    def advance(self, steps: float = 1) -> None:
        """Count, and print a line if the last one is long ago."""
        self._done += steps
        now = time.monotonic()
        if now - self._last < LOG_INTERVAL_S:
            return
        self._last = now
        left = ""
        own = self._done - self._skipped
        if self._total and own:
            seconds = (now - self._start) / own * (self._total - self._done)
            left = f", about {datetime.timedelta(seconds=round(seconds))} left"
        total = f"/{self._total}" if self._total else ""
        say(f"{self._description}: {round(self._done, 2):g}{total}{left} {self._note}".rstrip())

    def skip(self, steps: float) -> None:
        """Count what was done before this run."""
        self._done += steps
        self._skipped += steps

    def note(self, text: str) -> None:
        """Keep a text for the next line."""
        self._note = text


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Bar]:
    """Show a progress bar on stderr with the count, time spent and time left.

    Where stderr is no terminal (a log file, CI) a line is printed every half minute instead.
    """
    if not _console.is_terminal:
        yield LogBar(description, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_console) as progress:
        yield Bar(progress, progress.add_task(description, total=total, note=""))


def some_of(names: Sequence[object], most: int = 3) -> str:
    """Name the first few, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
