"""Digests of files and folders by their content. A file that did not change is not read again.

MD5, because DVC and the manifests of data sets are in it: one reading of a file serves all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from nuclei3d.errors import InputError

KNOWN_FILE = user_cache_path("nuclei3d") / "digests.db"
"""What is known of this user's files. It may be deleted: then they are read again."""

_SETTLED_S = 2.0
"""A file changed so recently may change again within the clock's step; its digest is not kept."""
_TABLE = """create table if not exists digests (device integer, inode integer, size integer, changed integer,
modified integer, md5 text, primary key (device, inode)) without rowid"""
_KEEP = "insert or replace into digests values (?, ?, ?, ?, ?, ?)"
_LOOK = "select md5 from digests where device=? and inode=? and size=? and changed=? and modified=?"


def digest_of(path: Path, *, without: Sequence[str] = ()) -> str:
    """Digest a file, or a folder with the names and contents of all files in it, links followed.

    A file's is its MD5; a folder's is the one that DVC gives it (``<md5>.dir``). Something that is neither,
    such as a link to nowhere, counts by its name. Entries of the folder called as in `without` are left out.
    InputError is raised if there is nothing, or it cannot be read.
    """
    if not path.is_dir():
        return digests_of([path])[0]
    files = sorted(_files_below(path, without), key=lambda file: file.relative_to(path).as_posix())
    listing = [
        {"md5": md5, "relpath": file.relative_to(path).as_posix()}
        for file, md5 in zip(files, digests_of(files), strict=True)
    ]
    return (
        hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"
    )


def digests_of(files: Sequence[Path]) -> list[str]:
    """Digest files; those whose size, times of change and place on the disk are known are not read."""
    known = _open_known()
    if known is None:
        return [_read(file) for file in files]
    with closing(known):
        try:
            return [_look_up(known, file) for file in files]
        finally:
            with suppress(sqlite3.Error):
                known.commit()


def digest_of_frame(image: NDArray[Any] | None, labels: NDArray[Any]) -> str:
    """Digest the voxels of an image and its labels, each (Z, Y, X), as ``<image>-<labels>``.

    So a frame is known in whatever file and type it lies. What is absent, or without any label, is ``0``.
    """
    parts = (image, "<f4"), (labels if labels.any() else None, "<u4")
    return "-".join("0" if voxels is None else digest_of_voxels(voxels, kind) for voxels, kind in parts)


def digest_of_voxels(voxels: NDArray[Any], kind: str = "<f4") -> str:
    """Digest an image (Z, Y, X), taken as numbers of this kind."""
    digest = hashlib.blake2b(repr(voxels.shape).encode(), digest_size=6)
    for plane in voxels:
        digest.update(np.ascontiguousarray(plane, dtype=kind).data)
    return digest.hexdigest()


def _look_up(known: sqlite3.Connection, file: Path) -> str:
    try:
        found = file.stat()
    except OSError:
        return _read(file)
    # the time of change (ctime) tells of a change even where size and time of modification were put back
    state = (found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns, found.st_mtime_ns)
    with suppress(sqlite3.Error):
        row = known.execute(_LOOK, state).fetchone()
        if row is not None:
            return str(row[0])
    began = time.time()
    md5 = _read(file)
    if max(found.st_ctime, found.st_mtime) < began - _SETTLED_S:
        with suppress(sqlite3.Error):
            known.execute(_KEEP, (*state, md5))
    return md5


def _read(file: Path) -> str:
    if not file.is_file() and (file.exists() or file.is_symlink()):
        # a pipe or a device would block for ever; a link to nowhere has no content
        return "no file"
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None


def _files_below(folder: Path, without: Sequence[str]) -> Iterator[Path]:
    """List the files of a folder and of folders linked into it; a link to a folder that it is in is not."""
    for base, names, files in os.walk(folder, followlinks=True):
        here = Path(base)
        if here == folder:
            names[:] = [name for name in names if name not in without]
            files = [name for name in files if name not in without]
        if any((here / name).is_symlink() for name in names):
            around = {above.resolve() for above in (here, *here.parents)}
            names[:] = [name for name in names if (here / name).resolve() not in around]
        yield from (here / name for name in files)


def _open_known() -> sqlite3.Connection | None:
    """Open what is known; None where nothing can be kept (no home, a full disk): files are read then."""
    try:
        KNOWN_FILE.parent.mkdir(parents=True, exist_ok=True)
        known = sqlite3.connect(KNOWN_FILE, timeout=5)
    except (OSError, sqlite3.Error):
        return None
    with suppress(sqlite3.Error):
        known.execute(_TABLE)
    return known
