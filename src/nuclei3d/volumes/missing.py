"""What is said where nothing lies at a path: how to fetch it, where DVC knows it."""

from __future__ import annotations

from pathlib import Path

from nuclei3d.errors import InputError


def missing(path: Path, message: str) -> InputError:
    """Make the error for a path at which there is nothing.

    Parameters
    ----------
    path
        What was asked for.
    message
        What to say where DVC does not know it. Where the path, or a folder above it that is not there
        either, has its ``.dvc`` file beside it, the command that fetches it is told instead.
    """
    for tracked in (path, *path.parents):
        pointer = Path(f"{tracked}.dvc")
        if pointer.is_file() and not tracked.exists():
            return InputError(f"{path} is tracked by DVC but not here yet; get it with: dvc pull {pointer}")
    return InputError(message)
