"""Locks of a search: who may take the next trial, and which workers are still alive."""

from __future__ import annotations

import fcntl
import os
import socket
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.storages.journal import JournalFileOpenLock

if TYPE_CHECKING:
    from sqlalchemy import Engine


class KernelLock(JournalFileOpenLock):
    """A lock on a file that the kernel itself gives back when the process holding it is killed.

    Optuna's own locks are files whose presence means "locked"; after a kill they hold everybody up for half
    a minute.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._held: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        handle = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
        self._held = handle
        return True

    def release(self) -> None:
        """Give the lock back."""
        handle, self._held = self._held, None
        if handle is not None:
            os.close(handle)


class WorkerMark:
    """A worker's name, and a file that it keeps locked as long as it lives."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._path = folder / f"{self.name}.lock"
        self._handle = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o666)
        fcntl.flock(self._handle, fcntl.LOCK_EX)

    def close(self) -> None:
        """Take the mark away."""
        self._path.unlink(missing_ok=True)
        os.close(self._handle)

    def is_dead(self, name: str, *, missing_is_dead: bool) -> bool:
        """Tell whether another worker is known to be gone; False also where its mark lies elsewhere."""
        if name == self.name:
            return False
        try:
            handle = os.open(self._folder / f"{name}.lock", os.O_RDWR)
        except OSError:
            return missing_is_dead
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(handle)
        (self._folder / f"{name}.lock").unlink(missing_ok=True)
        return True


@contextmanager
def advisory_lock(engine: Engine) -> Iterator[None]:
    """Hold a lock in the database, which ends with the connection, also when the process is killed."""
    from sqlalchemy import text

    key = zlib.crc32(b"nuclei3d search")
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        yield
