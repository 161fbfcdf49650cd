"""Outputs that appear whole or not at all: written aside, then renamed."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EACCES, EBUSY, EDQUOT, EFBIG, EIO, EISDIR, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS
from fnmatch import fnmatchcase
from itertools import chain, count
from pathlib import Path
from typing import Any

from nuclei3d.errors import InputError, MachineError, reason_of

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


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, tree: Any, **options: Any) -> None:
    """Write indented JSON, whole or not at all; `options` are those of `json.dumps`."""
    write_text(path, json.dumps(tree, indent=2, **options) + "\n")


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a table as CSV, whole or not at all."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


@contextmanager
def whole_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Fill a folder whole or not at all.

    Yields an empty hidden folder beside `path`; it takes the place of `path` when the body ends well, and is
    removed when it does not. A folder that is already there gives way, with all that it holds, unless
    `replace` is false; the working directory or a folder above it never does. A link stays, and what it
    leads to is replaced. Errors as those of `whole_file`.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    require_replaceable(path)
    if not replace and path.is_dir() and any(path.iterdir()):
        raise InputError(f"the output folder {path} is not empty; remove it or choose another")
    with _partial(path) as partial:
        partial.mkdir()
        try:
            yield partial
            if path.exists():
                old = _hidden_name(path, "replaced")
                path.rename(old)
                partial.rename(path)
                remove(old)
            else:
                partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def free_path(path: Path) -> Path:
    """Give a path at which nothing lies: this one, or with a number after its stem."""
    stem = path.name.removesuffix(suffix := _suffix_of(path))
    numbered = (path.with_name(f"{stem}_{number}{suffix}") for number in count(2))
    return next(each for each in chain([path], numbered) if not each.exists())


def require_writable(path: Path) -> None:
    """Raise InputError before the work, where a file or folder could not be written after it.

    Nothing is made: asked is the folder that is there, `path` itself or the nearest one above it.
    """
    place = path.absolute()
    if place.is_file():
        place = place.parent
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise InputError(f"cannot write {path}: {place} is no folder; choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            f"cannot write {path}: {place} cannot be written; choose a place that can be written"
        )


@contextmanager
def own_temporary_folder() -> Iterator[None]:
    """Have all temporary files of this process and its children lie in one folder, which ends with it.

    They may hold a user's volumes; those that killed processes of this machine left behind go now.
    """
    host = _host()
    try:
        common = Path(tempfile.gettempdir())
        _remove_dead(common, rf"nuclei3d-{re.escape(host)}-(\d+)-\w{{8}}")
        own = tempfile.mkdtemp(prefix=f"nuclei3d-{host}-{os.getpid()}-")
    except OSError as error:
        raise MachineError(f"there is no place for temporary files ({error}); set TMPDIR") from None
    before = os.environ.get("TMPDIR")
    tempfile.tempdir = os.environ["TMPDIR"] = own
    try:
        yield
    finally:
        tempfile.tempdir = None
        del os.environ["TMPDIR"]
        if before is not None:
            os.environ["TMPDIR"] = before
        for entry in Path(own).glob("*"):
            if not entry.name.startswith(("pymp-", "matplotlib-")):
                remove(entry)
        try:
            os.rmdir(own)
        except OSError:
            # multiprocessing and matplotlib (without a home) need their folders until the process ends, and
            # then want to remove them
            from multiprocessing.util import Finalize

            Finalize(None, shutil.rmtree, (own, True), exitpriority=-200)


_STRAY = (".DS_Store", "._*", "Thumbs.db", "desktop.ini", ".gitignore", ".nfs*", ".*.sw?")
"""What systems and editors leave in any folder, and DVC beside what it keeps: no loss."""
_LISTING = ".written.json"


def list_written(folder: Path, *, digests: bool = False) -> None:
    """Note in a folder just filled what is in it, for `refuse_foreign_folder`; by content if with digests."""
    from nuclei3d.digests import digests_of  # which takes numpy's time

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    md5s = digests_of(files) if digests else [None] * len(files)
    write_json(folder / _LISTING, dict(zip(names, md5s, strict=True)))


def refuse_foreign_folder(
    folder: Path, kind: str, marker: tuple[str, str], own: Iterable[str] = (), added: Iterable[str] = ()
) -> None:
    """Raise InputError if a folder to replace holds anything but what commands of ours wrote there.

    A folder of this `kind` has the `marker`, a JSON file with a key (``""``: whichever). In it is what
    `list_written` noted, unchanged where it noted contents, and what other commands `added`; where nothing
    was noted, by older versions, what is called as in `own` (patterns of `fnmatch`).
    """
    if not folder.is_dir():
        return
    from nuclei3d.digests import digests_of

    file, key = marker
    inside = sorted(each.relative_to(folder) for each in folder.rglob("*") if not _is_stray(each))
    if inside and not _holds_key(folder / file, key):
        raise InputError(f"{folder} exists and is no {kind}; give another folder or remove it yourself")
    listed = _read_listing(folder)
    fault = None
    if listed is None:
        foreign = [each for each in inside if not _matches(each.parts[0], (file, *own, *added))]
    else:
        files = [each for each in inside if (folder / each).is_file() and str(each) != _LISTING]
        mine = [each for each in files if each.as_posix() in listed]
        foreign = [each for each in files if each not in mine and not _matches(each.as_posix(), added)]
        noted = [each for each in mine if listed[each.as_posix()] is not None and str(each) != file]
        found = digests_of([folder / each for each in noted])
        changed = [each for each, md5 in zip(noted, found, strict=True) if md5 != listed[each.as_posix()]]
        fault = f"{changed[0]} in it was changed since it was written" if changed else None
    if foreign:
        fault = f"{foreign[0]} in it did not come with this {kind}"
    if fault is not None:
        raise InputError(f"{folder} would be replaced, but {fault}; move it away, or give another folder")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, each) for each in patterns)


def _is_stray(path: Path) -> bool:
    return _matches(path.name, _STRAY)


def _holds_key(file: Path, key: str) -> bool:
    try:
        tree = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and (not key or key in tree)


def _read_listing(folder: Path) -> dict[str, str | None] | None:
    try:
        tree = json.loads((folder / _LISTING).read_bytes())
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def require_replaceable(path: Path) -> None:
    """Raise InputError where a folder cannot be replaced: by a file there, or the command running in it."""
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


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """Give a name beside `path`, and turn the system's complaints about the place into one clear line."""
    try:
        missing = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        # of killed processes, whatever they wrote into this folder
        _remove_dead(path.parent, rf"\..*\.partial-{re.escape(_host())}-(\d+)-[0-9a-f]{{8}}(\.[\w.]+)?")
        _put_back(path.parent)
        try:
            yield _hidden_name(path)
        except BaseException:
            # whoever fails leaves no empty folders behind either
            with suppress(OSError):
                for folder in missing:
                    folder.rmdir()
            raise
    except RuntimeError as error:
        # what torch makes of an error of the disk; it does not say which
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise MachineError(
            f"cannot write {path}: is the disk full? free some space or choose another place"
        ) from error
    except OSError as error:
        if not _blames_place(error, path):
            raise
        reason = error.strerror or reason_of(error)
        if error.errno in _FAULTS:
            mend = "free some space or choose another place"
            raise MachineError(f"cannot write {_shown(path)}: {reason}; {mend}") from error
        raise InputError(
            f"cannot write {_shown(path)}: {reason}; choose a place that can be written"
        ) from error


def _blames_place(error: OSError, path: Path) -> bool:
    if error.filename is not None:
        # The body may fail to read some other file: that error is not ours to explain.
        named = Path(os.fsdecode(error.filename)).absolute()
        return named.is_relative_to(path.absolute().parent) or path.absolute().is_relative_to(named)
    return error.errno in _PLACE_ERRORS


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:40]


def _hidden_name(path: Path, state: str = "partial") -> Path:
    suffix = _suffix_of(path)
    stem = path.name.removesuffix(suffix)[:100]
    return path.with_name(f".{stem}.{state}-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{suffix}")


def _suffix_of(path: Path) -> str:
    return ".ome.tif" if path.name.endswith(".ome.tif") else path.suffix


def _shown(path: Path) -> Path:
    """Give a path as it will be, where folders on the way still have their hidden names."""
    return Path(*(re.sub(r"^\.(.*)\.partial-.*?(\.[\w.]+)?$", r"\1\2", part) for part in path.parts))


def _remove_dead(folder: Path, pattern: str) -> None:
    """Remove what lies in a folder under the name of a process of this machine that is no more."""
    for entry in folder.iterdir():
        match = re.fullmatch(pattern, entry.name)
        if match is None:
            continue
        import psutil  # only where there is a leftover: importing it takes time

        if not psutil.pid_exists(int(match.group(1))):
            remove(entry)


def _put_back(folder: Path) -> None:
    """Give folders their names back whose process was killed while it put another in their place."""
    named = rf"\.(.*)\.replaced-{re.escape(_host())}-(\d+)-[0-9a-f]{{8}}(\.[\w.]+)?"
    for entry in folder.glob(".*.replaced-*"):
        if match := re.fullmatch(named, entry.name):
            import psutil

            place = folder / f"{match[1]}{match[3] or ''}"
            if psutil.pid_exists(int(match[2])):
                continue
            if place.exists():
                remove(entry)
            else:
                entry.rename(place)


def remove(entry: Path) -> None:
    """Remove a file or folder, if it is there and can be."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with suppress(OSError):
            entry.unlink()
