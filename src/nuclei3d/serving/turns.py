"""Turns at the device: jobs wait in a line of limited length and are computed one at a time."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

Progress = Callable[[float], None]


class LineFullError(Exception):
    """No place is left; `retry_after_s` says when one may be."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the service is busy; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class AbandonedError(Exception):
    """Nobody waits for this job any more."""


class ClosedError(Exception):
    """The service is stopping."""


@dataclass(eq=False)
class Place:
    """A place in the line, taken before the work is known, given back by `Turns.leave`."""

    future: Future[Any] = field(default_factory=Future)
    abandoned: threading.Event = field(default_factory=threading.Event)
    work: Callable[[Progress], Any] | None = None

    def check(self, _share: float = 0.0) -> None:
        """Raise if nobody waits any more; called by the computation as its progress."""
        if self.abandoned.is_set():
            raise AbandonedError


class Turns:
    """One worker thread for one device, and the line before it.

    Parameters
    ----------
    waiting
        How many requests may hold a place besides the one that is being computed.
    """

    def __init__(self, waiting: int) -> None:
        self._places = waiting + 1
        self._taken: set[Place] = set()
        self._line: deque[Place] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._mean_s = 1.0
        self._worker = threading.Thread(target=self._work, name="device", daemon=True)
        self._worker.start()

    @property
    def accepting(self) -> bool:
        """Whether a request would get a place now."""
        with self._changed:
            return not self._closed and len(self._taken) < self._places

    @property
    def retry_after_s(self) -> int:
        """Seconds after which a place is likely to be free, from the mean duration of the last jobs."""
        return max(1, min(60, math.ceil(self._mean_s)))

    def take_place(self) -> Place:
        """Take a place.

        Raises
        ------
        LineFullError
            If none is free.
        ClosedError
            If the service is stopping.
        """
        with self._changed:
            if self._closed:
                raise ClosedError
            if len(self._taken) >= self._places:
                raise LineFullError(self.retry_after_s)
            place = Place()
            self._taken.add(place)
            return place

    def compute(self, place: Place, work: Callable[[Progress], Any]) -> Future[Any]:
        """Put the work of a place into the line; it is called with the progress function to call."""
        with self._changed:
            if self._closed:
                raise ClosedError
            place.work = work
            self._line.append(place)
            self._changed.notify()
        return place.future

    def leave(self, place: Place) -> None:
        """Give a place back: work that waits is never begun, work that runs stops at its next step."""
        place.abandoned.set()
        with self._changed:
            self._taken.discard(place)
            if place in self._line:
                self._line.remove(place)

    def close(self) -> None:
        """Take no more requests and send those away that wait; the one being computed goes on."""
        with self._changed:
            self._closed = True
            waiting = list(self._line)
            self._line.clear()
            self._changed.notify()
        for place in waiting:
            place.future.set_exception(ClosedError())

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._line:
                    if self._closed:
                        return
                    self._changed.wait()
                place = self._line.popleft()
            self._do(place)

    def _do(self, place: Place) -> None:
        assert place.work is not None
        if place.abandoned.is_set() or not place.future.set_running_or_notify_cancel():
            return
        start = time.monotonic()
        try:
            result = place.work(place.check)
        except BaseException as error:
            place.future.set_exception(error)
            return
        self._mean_s += 0.3 * (time.monotonic() - start - self._mean_s)
        place.future.set_result(result)
