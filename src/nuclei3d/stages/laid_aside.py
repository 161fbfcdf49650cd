"""Where files go in whose place others are written: to names that nothing has yet."""

from __future__ import annotations

from itertools import chain, count
from pathlib import Path

from nuclei3d.images.frames import frame_stem


def free_path(path: Path) -> Path:
    """Give a path at which nothing lies: this one, or with a number after its stem."""
    stem = frame_stem(path)
    numbered = (path.with_name(f"{stem}_{number}{path.name.removeprefix(stem)}") for number in count(2))
    return next(each for each in chain([path], numbered) if not each.exists())
