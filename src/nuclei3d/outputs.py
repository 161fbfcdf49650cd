"""Outputs that appear whole or not at all: written aside, then renamed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EBUSY, EDQUOT, EFBIG, EIO, EISDIR, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS
from pathlib import Path

from nuclei3d.errors import InputError, MachineError

# Of these the machine is at fault, not the choice of the place; numpy reports a short write without a number.
_FAULTS = frozenset({ENOSPC, EDQUOT, EFBIG, EIO, None})

# What the file system says when the place, not the program, is at fault.
_PLACE_ERRORS = _FAULTS | {EROFS, EACCES, EPERM, ENOTDIR, EISDIR, ENAMETOOLONG, EBUSY}


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all.

    Yields the path of a hidden temporary file beside `path`, with the same suffix, for the body to write. It
    is renamed to `path` when the body ends well, and removed when it does not; an older file at `path` stays
    untouched until then. Folders on the way are made. An InputError or MachineError says why a place
    (no permission, full disk, a file where a folder should be) cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write the file {path}: a folder has that name; remove it or choose another")
    with _partial(path) as partial:
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Fill a folder whole or not at all.

    Yields an empty hidden folder beside `path`; it takes the place of `path` when the body ends well, and is
    removed when it does not. A folder that is already there gives way, with all that it holds, unless
    `replace` is false; the working directory or a folder above it never does. Errors as those of
    `whole_file`.
    """
    path = Path(path)
    _check_replaceable(path, replace)
    with _partial(path) as partial:
        partial.mkdir()
        try:
            yield partial
            if path.exists():
                old = _hidden_name(path)
                path.rename(old)
                partial.rename(path)
                shutil.rmtree(old)
            else:
                partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def require_writable(path: Path) -> None:
    """Raise the error of `whole_file` before the work, where no file could be written at `path` after it."""
    with _partial(Path(path)) as probe:
        probe.touch()
        probe.unlink()


def refuse_foreign_folder(folder: Path, marker: str, kind: str) -> None:
    """Raise InputError if a folder to replace holds files, but not the one that marks its kind."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise InputError(f"{folder} exists and is no {kind}; give another folder or remove it yourself")


def _check_replaceable(path: Path, replace: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"cannot write the folder {path}: a file has that name; remove it or choose another")
    here = Path.cwd().resolve()
    if path.resolve() in (here, *here.parents):
        raise InputError(
            f"the output folder {path} is the working directory or lies above it and would be replaced; "
            "name a folder of its own"
        )
    if not replace and any(path.iterdir()):
        raise InputError(f"the output folder {path} is not empty; remove it or choose another")


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """Give a name beside `path`, and turn the system's complaints about the place into one clear line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        yield _hidden_name(path)
    except OSError as error:
        if not _blames_place(error, path):
            raise
        reason = error.strerror or " ".join(str(error).split())
        if error.errno in _FAULTS:
            mend = "free some space or choose another place"
            raise MachineError(f"cannot write {path}: {reason}; {mend}") from error
        raise InputError(f"cannot write {path}: {reason}; choose a place that can be written") from error


def _blames_place(error: OSError, path: Path) -> bool:
    if error.filename is not None:
        # The body may fail to read some other file: that error is not ours to explain.
        named = Path(os.fsdecode(error.filename)).absolute()
        return named.is_relative_to(path.absolute().parent) or path.absolute().is_relative_to(named)
    return error.errno in _PLACE_ERRORS


def _name_parts(path: Path) -> tuple[str, str]:
    """Give what stands before and after the process in the hidden names that this machine gives."""
    suffix = ".ome.tif" if path.name.endswith(".ome.tif") else path.suffix
    host = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:40]
    return f".{path.name.removesuffix(suffix)[:100]}.partial-{host}-", suffix


def _hidden_name(path: Path) -> Path:
    start, suffix = _name_parts(path)
    return path.with_name(f"{start}{os.getpid()}-{uuid.uuid4().hex[:8]}{suffix}")


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes of this machine left behind while writing this same path."""
    start, suffix = map(re.escape, _name_parts(path))
    pattern = re.compile(rf"{start}(\d+)-[0-9a-f]{{8}}{suffix}\Z")
    for entry in path.parent.iterdir():
        match = pattern.match(entry.name)
        if match is None:
            continue
        import psutil  # only where there is a leftover: importing it takes time

        if psutil.pid_exists(int(match.group(1))):
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
