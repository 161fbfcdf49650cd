"""The exceptions that the command line ends with one line for, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pydantic import ValidationError


class InputError(ValueError):
    """Bad input or usage: the user's input, not our code, is at fault.

    The command line prints its message as one line and exits with `exit_code`. A good message says what
    was found, where, what was expected and how to mend it.
    """

    exit_code = 2


class MachineError(InputError):
    """The input is fine and the machine is not: a full disk, too little memory, a worker that died.

    What was finished is kept, and the same command goes on once the machine is mended. Exit code 1.
    """

    exit_code = 1


class TooLargeError(InputError):
    """What a request asks for costs more than a service gives; its status is 413, not 400."""


class StoppedError(InputError):
    """The user stopped the work (Ctrl-C); the message says what is kept. Exit code 130, as of a shell."""

    exit_code = 130


def hint_at(name: str, known: Collection[str], prefix: str = "") -> str:
    """Say which of the known names may have been meant, with a prefix to it, or else all of them."""
    close = closest(name, known)
    return f"did you mean '{prefix}{close}'?" if close is not None else f"known: {', '.join(known)}"


def closest(name: str, known: Collection[str]) -> str | None:
    """Give the known name that may have been meant, if any is close."""
    # a stranger's name may be of any length
    return next(iter(difflib.get_close_matches(name[:50], known, n=1)), None)


def reason_of(error: BaseException, longest: int | None = None) -> str:
    """Give what an error of a library says, in one line; its kind where it says nothing."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


class Problem(NamedTuple):
    """What is wrong with a value: the field in dots (empty: the whole), the value, the reason in words."""

    field: str
    value: Any
    reason: str


def first_problem(error: ValidationError) -> Problem:
    """Give the first of the problems that pydantic found."""
    found = error.errors()[0]
    field = ".".join(map(str, found["loc"]))
    return Problem(field, found["input"], found["msg"].removeprefix("Value error, "))


def missing(path: Path, message: str) -> InputError:
    """Make the error for a path at which there is nothing.

    Where it, or a folder above it that is not there either, has its ``.dvc`` file beside it, the command that
    fetches it is told, elsewhere the `message`.
    """
    for tracked in (path, *path.parents):
        pointer = Path(f"{tracked}.dvc")
        if pointer.is_file() and not tracked.exists():
            return InputError(f"{path} is tracked by DVC but not here yet; get it with: dvc pull {pointer}")
    return InputError(message)
