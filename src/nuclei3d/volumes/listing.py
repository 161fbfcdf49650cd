"""Which volumes lie in a folder, in which order, and what their outputs are called."""

from __future__ import annotations

import re
from pathlib import Path

from nuclei3d.errors import InputError
from nuclei3d.volumes.missing import missing
from nuclei3d.volumes.zarr_store import is_zarr

_SUFFIXES = (".ome.tiff", ".ome.tif", ".tiff", ".tif", ".ome.zarr", ".zarr")
_TIFF_SUFFIXES = (".tif", ".tiff")


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sort key under which t2 comes before t10."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in parts] + [(-1, text)]


def frame_stem(path: Path) -> str:
    """Give the file name without .tif, .ome.tif, .zarr and the like."""
    lower = path.name.lower()
    for suffix in _SUFFIXES:
        if lower.endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def list_volumes(folder: Path) -> list[Path]:
    """List the TIFF files and zarr folders directly in a folder, in natural order, without hidden ones."""
    paths = [
        path
        for path in folder.iterdir()
        if not path.name.startswith(".")
        and (is_zarr(path) or (path.suffix.lower() in _TIFF_SUFFIXES and path.is_file()))
    ]
    return sorted(paths, key=lambda path: natural_key(path.name))


def volume_paths(source: Path) -> list[Path]:
    """List the volumes that a path stands for: itself, or those in the folder.

    Raises
    ------
    InputError
        If the path does not exist or the folder holds none.
    """
    if not source.exists():
        raise missing(source, f"{source} does not exist")
    if not source.is_dir() or is_zarr(source):
        return [source]
    paths = list_volumes(source)
    if not paths:
        hint = f"; did you mean {source / 'images'}?" if (source / "images").is_dir() else ""
        raise InputError(f"{source} holds no .tif, .tiff or .zarr{hint or '; give a folder that does'}")
    return paths
