"""Outputs that appear whole or not at all: written aside, then renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nuclei3d.errors import InputError, MachineError

# What the file system says when the place, not the program, is at fault.
_PLACE_ERRORS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EFBIG,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.EBUSY,
        errno.EIO,
    }
)

# Of these the machine is at fault, not the choice of the place; numpy reports a short write without a number.
_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, None})


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
    with _writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        partial = _partial_name(path)
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
    with _writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        partial = _partial_name(path)
        partial.mkdir()
        try:
            yield partial
            if path.exists():
                old = _partial_name(path)
                path.rename(old)
                partial.rename(path)
                shutil.rmtree(old)
            else:
                partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def refuse_foreign_folder(folder: Path, marker: str, kind: str) -> None:
    """Raise InputError if a folder to replace holds files, but not the one that marks its kind."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise InputError(f"{folder} exists and is no {kind}; give another folder or remove it yourself")


def _check_replaceable(path: Path, replace: bool) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"cannot write the folder {path}: a file has that name; remove it or choose another")
    if not path.is_dir():
        return
    resolved = path.resolve()
    here = Path.cwd().resolve()
    if resolved == here or resolved in here.parents:
        raise InputError(
            f"the output folder {path} is the working directory or lies above it and would be replaced; "
            "name a folder of its own"
        )
    if not replace and any(path.iterdir()):
        raise InputError(f"the output folder {path} is not empty; remove it or choose another")


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Turn the system's complaints about the place of `path` into one clear line."""
    try:
        yield
    except OSError as error:
        if not _blames_place(error, path):
            raise
        reason = error.strerror or " ".join(str(error).split())
        if error.errno in _FAULTS:
            mend = "free some space or choose another place"
            raise MachineError(f"cannot write {path}: {reason}; {mend}") from error
        mend = "choose a place that can be written"
        raise InputError(f"cannot write {path}: {reason}; {mend}") from error


def _blames_place(error: OSError, path: Path) -> bool:
    if error.filename is not None:
        # The body may fail to read some other file: that error is not ours to explain.
        named = Path(os.fsdecode(error.filename)).absolute()
        return named.is_relative_to(path.absolute().parent) or path.absolute().is_relative_to(named)
    # numpy reports a short write by a bare OSError without a number.
    return error.errno is None or error.errno in _PLACE_ERRORS


def _partial_name(path: Path) -> Path:
    suffix = ".ome.tif" if path.name.endswith(".ome.tif") else path.suffix
    stem = path.name.removesuffix(suffix)[:100]
    token = uuid.uuid4().hex[:8]
    return path.with_name(f".{stem}.partial-{_host()}-{os.getpid()}-{token}{suffix}")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:40]


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes of this machine left behind while writing this same path."""
    suffix = ".ome.tif" if path.name.endswith(".ome.tif") else path.suffix
    stem = path.name.removesuffix(suffix)[:100]
    pattern = re.compile(
        re.escape(f".{stem}.partial-{_host()}-") + r"(\d+)-[0-9a-f]{8}" + re.escape(suffix) + r"\Z"
    )
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
