"""A worker: one process that opens something once and works with it, and may die or be killed at any moment.

What it works on comes from strangers, so everything that can go wrong there ends with the process: this one
watches its memory, kills it where nobody waits any more, and starts it again.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pkgutil
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

import psutil

from nuclei3d.console import printable, say
from nuclei3d.errors import InputError, MachineError

_LOOK_S = 0.1
_LONGEST_PAUSE_S = 60.0


class WorkerError(Exception):
    """What was asked of the worker failed there, by a fault of ours."""


class WorkerDiedError(Exception):
    """The process ended, or was killed by others, while it worked."""


class Worker:
    """One process, started again whenever it dies, that is called `name` in messages.

    Functions are named (``package.module:function``), so that this process need not import what they use. The
    result of `opening` is kept there and given to all that is done; at `memory_gb` of resident memory the
    process is killed.
    """

    def __init__(self, name: str, opening: str, *arguments: Any, memory_gb: float) -> None:
        self.name = name
        self.arguments: Sequence[Any] = arguments
        self._opening = opening
        self._most_bytes = memory_gb * 1e9
        self._pool: ProcessPoolExecutor | None = None
        self._process: psutil.Process | None = None
        self._up = asyncio.Event()
        self._turn = asyncio.Lock()
        self._outgrown: ProcessPoolExecutor | None = None

    @property
    def ready(self) -> bool:
        """Whether the process lives and has opened what it works with."""
        return self._up.is_set() and self._resident_bytes() > 0

    def start(self) -> None:
        """Start the process; what opening raises is raised here."""
        # A server that has imported everything and never worked gives birth to a process in milliseconds.
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"))
        try:
            try:
                opened = pool.submit(_open, self._opening, self.arguments)
            except OSError as error:
                # the path of a socket may have 107 characters
                told = f"cannot start the process for the {self.name}: {error}"
                raise MachineError(f"{told}; set TMPDIR to a short path") from None
            self._process = psutil.Process(opened.result())
        except BaseException:
            pool.shutdown(wait=False)
            raise
        self._pool = pool

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function as `run` does, before the process is watched."""
        assert self._pool is not None
        return self._pool.submit(_call, function, arguments).result()

    async def watch(self) -> None:
        """Keep the process within its memory, and alive; runs until cancelled."""
        pause = _LOOK_S
        while True:
            while (resident := self._resident_bytes()) > 0:
                self._up.set()
                if resident > self._most_bytes:
                    # a large process takes a while to end; by then there may be another
                    self._outgrown = self._pool
                    self.kill()
                await asyncio.sleep(_LOOK_S)
            self.kill()
            try:
                await asyncio.to_thread(self.start)
                pause = _LOOK_S
            except Exception as error:
                say(f"the {self.name} does not start: {printable(str(error) or type(error).__name__)}")
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def run(self, function: str, *arguments: Any) -> Any:
        """Call a function in the process with what was opened and `arguments`, after those that came before.

        Cancelling this kills the process. InputError and MemoryError are raised as the function does, the
        latter also if the process grew beyond its memory, WorkerDiedError if it died, WorkerError of all else
        that the function raises.
        """
        async with self._turn:
            while True:
                await self._up.wait()
                pool = self._pool
                assert pool is not None
                try:
                    future = asyncio.wrap_future(pool.submit(_call, function, arguments))
                    break
                except (BrokenProcessPool, RuntimeError):  # it died idle
                    self._up.clear()
            try:
                return await future
            except BrokenProcessPool:
                if pool is self._pool:
                    self._up.clear()
                if pool is self._outgrown:
                    raise MemoryError from None
                raise WorkerDiedError from None
            except asyncio.CancelledError:
                self.kill()
                raise

    def kill(self) -> None:
        """End the process, whatever it does; where it is watched it is started again."""
        self._up.clear()
        if self._process is not None:
            with suppress(psutil.NoSuchProcess):
                self._process.kill()
            self._process = None
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def _resident_bytes(self) -> int:
        """Give the resident memory of the process; 0 if it is dead."""
        try:
            return int(self._process.memory_info().rss) if self._process is not None else 0
        except psutil.Error:
            return 0


_opened: Any = None


def _open(opening: str, arguments: Sequence[Any]) -> int:
    """Prepare the process; give its number."""
    global _opened
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tie_to_parent()
    _opened = pkgutil.resolve_name(opening)(*arguments)
    return os.getpid()


def tie_to_parent() -> None:
    """Have this process, spawned by another one, end with it, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _call(function: str, arguments: Sequence[Any]) -> Any:
    try:
        return pkgutil.resolve_name(function)(_opened, *arguments)
    except (InputError, MemoryError):
        raise
    except Exception as error:
        # torch's own kind, which the other side does not import
        if type(error).__name__ == "OutOfMemoryError":
            raise MemoryError from None
        raise WorkerError(f"{type(error).__name__}: {printable(str(error))}") from None
