"""The HTTP service: the endpoints of MLflow's scoring server, with a queue, limits and a token.

The body of a request is received to disk within limits, then taken apart and checked; jobs wait in a queue of
limited length and are computed one at a time.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, Protocol

import uvicorn
from fastapi import FastAPI, Request, Response

from nuclei3d import __version__
from nuclei3d.config.sections import ServeParams
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.experiment.invocation import (
    RequestParams,
    VolumeLimits,
    check_row,
    decode_volume,
    open_frame,
    path_below,
    read_request_params,
)

Progress = Callable[[float], None]


class QueueFullError(Exception):
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
    """A place in the queue, taken before the work is known, given back by `JobQueue.leave`."""

    future: Future[Any] = field(default_factory=Future)
    abandoned: threading.Event = field(default_factory=threading.Event)
    work: Callable[[Progress], Any] | None = None

    def check(self, _share: float = 0.0) -> None:
        """Raise if nobody waits any more; called by the computation as its progress."""
        if self.abandoned.is_set():
            raise AbandonedError


class JobQueue:
    """One worker thread for one device, and the jobs that wait for it.

    At most `waiting` requests may hold a place besides the one that is being computed.
    """

    def __init__(self, waiting: int) -> None:
        self._places = waiting + 1
        self._taken: set[Place] = set()
        self._waiting: deque[Place] = deque()
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
        """Take a place; QueueFullError if none is free, ClosedError if the service is stopping."""
        with self._changed:
            if self._closed:
                raise ClosedError
            if len(self._taken) >= self._places:
                raise QueueFullError(self.retry_after_s)
            place = Place()
            self._taken.add(place)
            return place

    def compute(self, place: Place, work: Callable[[Progress], Any]) -> Future[Any]:
        """Put the work of a place into the queue; it is called with the progress function to call."""
        with self._changed:
            if self._closed:
                raise ClosedError
            place.work = work
            self._waiting.append(place)
            self._changed.notify()
        return place.future

    def leave(self, place: Place) -> None:
        """Give a place back: work that waits is never begun, work that runs stops at its next step."""
        place.abandoned.set()
        with self._changed:
            self._taken.discard(place)
            if place in self._waiting:
                self._waiting.remove(place)

    def close(self) -> None:
        """Take no more requests and send those away that wait; the one being computed goes on."""
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for place in waiting:
            place.future.set_exception(ClosedError())

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._closed:
                        return
                    self._changed.wait()
                place = self._waiting.popleft()
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


_FORMATS = ("dataframe_records", "dataframe_split")
_DRAIN_S = 20.0
_SILENCE_S = 30.0


class TooLargeError(Exception):
    """The body is larger than the service takes."""


class GoneError(Exception):
    """The sender hung up."""


class TooSlowError(Exception):
    """The sender said nothing for too long."""


async def receive_body(request: Request, file: IO[bytes], limit_bytes: int) -> None:
    """Write the body of a request to `file`.

    Raises TooLargeError, TooSlowError (nothing came for half a minute), or GoneError (the sender hung up).
    """
    received = 0
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), _SILENCE_S)
        except TimeoutError:
            raise TooSlowError from None
        if message["type"] == "http.disconnect":
            raise GoneError
        chunk = message.get("body", b"")
        received += len(chunk)
        if received > limit_bytes:
            raise TooLargeError
        await asyncio.to_thread(file.write, chunk) if len(chunk) > 1 << 20 else file.write(chunk)
        if not message.get("more_body", False):
            request.state.received = True
            file.flush()
            return


async def drain_body(request: Request) -> None:
    """Let a sender that is refused finish sending, for a while: only then will it read the answer.

    A client that still sends when the connection is closed sees a broken connection and not the status.
    """
    if getattr(request.state, "received", False):
        return

    async def drop() -> None:
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return

    try:
        await asyncio.wait_for(drop(), _DRAIN_S)
    except TimeoutError:
        return


async def until_disconnect(request: Request) -> None:
    """Return when the sender hangs up; to be called after the whole body was received."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def take_apart(body: Path, folder: Path, limits: VolumeLimits) -> tuple[list[Path], RequestParams]:
    """Split a body into files and parameters, and check all of it, so that a bad request need not wait.

    The body is a file with the JSON that MLflow defines, ``dataframe_records`` or ``dataframe_split`` and
    ``params``; it is emptied. The volumes that were sent are put into `folder`, one file each.
    """
    try:
        tree = json.loads(body.read_bytes())
    except (ValueError, RecursionError):
        raise InputError("the body is not valid JSON") from None
    body.write_bytes(b"")
    if not isinstance(tree, dict):
        raise InputError("the body must be a JSON object with 'dataframe_records' or 'dataframe_split'")
    unknown = sorted(set(tree) - {*_FORMATS, "params"})
    if unknown:
        raise InputError(f"unknown field '{unknown[0]}'; known: {', '.join(_FORMATS)}, params")
    given = [name for name in _FORMATS if name in tree]
    if len(given) != 1:
        raise InputError("the body must have exactly one of 'dataframe_records' and 'dataframe_split'")
    params = tree.get("params") or {}
    if not isinstance(params, dict):
        raise InputError("'params' must be an object with names and values")
    asked = read_request_params(params)
    records = _records(tree) if given[0] == _FORMATS[0] else _split(tree.pop(_FORMATS[1]))
    tree.clear()
    if not records:
        raise InputError("the request has no rows")
    files = []
    for number, record in enumerate(records):
        volume, path = check_row(record)
        if path is not None:
            file = path_below(limits.root, path)
        else:
            file = folder / f"{number}.tif"
            file.write_bytes(decode_volume(volume))
        record.clear()
        open_frame(file, asked, limits.max_voxels)
        files.append(file)
    return files, asked


def _records(tree: dict[str, Any]) -> list[dict[str, Any]]:
    records = tree.pop("dataframe_records")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError("'dataframe_records' must be a list of objects with 'volume' or 'path'")
    return records


def _split(frame: Any) -> list[dict[str, Any]]:
    if not isinstance(frame, dict) or not {"columns", "data"} <= set(frame):
        raise InputError("'dataframe_split' must be an object with 'columns' and 'data'")
    unknown = sorted(set(frame) - {"columns", "data", "index"})
    if unknown:
        raise InputError(f"unknown field '{unknown[0]}' in 'dataframe_split'; known: columns, data, index")
    columns, data = frame["columns"], frame["data"]
    if not isinstance(columns, list) or not isinstance(data, list):
        raise InputError("'columns' and 'data' of 'dataframe_split' must be lists")
    if not all(isinstance(row, list) and len(row) == len(columns) for row in data):
        raise InputError("each row of 'data' must have as many values as there are 'columns'")
    return [dict(zip(map(str, columns), row, strict=True)) for row in data]


class ServedModel(Protocol):
    """What the service needs of the model: that of `nuclei3d.experiment.serving_model`."""

    limits: VolumeLimits
    version: dict[str, str]

    def segment_file(
        self, file: Path, asked: RequestParams, progress: Callable[[float], None] | None = None
    ) -> dict[str, Any]:
        """Segment the volume in a file; see `nuclei3d.experiment.serving_model.NucleiModel`."""


@dataclass(frozen=True)
class Refusal(Exception):  # noqa: N818 - it is an answer, not an error of ours
    """An answer other than 200."""

    status: int
    code: str
    message: str
    headers: tuple[tuple[str, str], ...] = ()

    def response(self) -> Response:
        """Give the answer, in the form of MLflow's errors."""
        body = json.dumps({"error_code": self.code, "message": self.message})
        return Response(body, self.status, dict(self.headers), media_type="application/json")


class Service:
    """A model, the queue before it, and the rules of admission."""

    def __init__(self, model: ServedModel, params: ServeParams, token: str | None = None) -> None:
        self.model = model
        self.params = params
        self.queue = JobQueue(params.queue)
        self._token = token
        # Taking a body apart holds all of it in memory: one at a time.
        self._parsing = asyncio.Semaphore(1)

    def check_token(self, request: Request) -> None:
        """Refuse a request without the bearer token, if there is one."""
        if self._token is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise Refusal(
                401, "UNAUTHENTICATED", "this service wants a bearer token", (("WWW-Authenticate", "Bearer"),)
            )

    async def answer(self, request: Request) -> bytes:
        """Answer one request for segmentation with the JSON that MLflow's server gives, or raise a
        `Refusal`.
        """
        arrival = time.monotonic()
        self.check_token(request)
        limit = self.params.max_body_mb * 1_000_000
        _check_head(request, limit)
        try:
            place = self.queue.take_place()
        except QueueFullError as error:
            raise _busy(str(error), error.retry_after_s) from None
        except ClosedError:
            raise _stopping() from None
        try:
            with tempfile.TemporaryDirectory(prefix="nuclei3d-") as folder:
                return await self._work(request, place, Path(folder), limit, arrival)
        except TooLargeError:
            raise _too_large(limit) from None
        except TooSlowError:
            raise Refusal(408, "REQUEST_TIMEOUT", "the body of the request did not arrive") from None
        except InputError as error:
            raise Refusal(400, "INVALID_PARAMETER_VALUE", str(error)) from None
        except ClosedError:
            raise _stopping() from None
        except TimeoutError:
            raise Refusal(
                504,
                "DEADLINE_EXCEEDED",
                f"not done within {self.params.timeout_s:g} s; send a smaller volume",
            ) from None
        finally:
            self.queue.leave(place)

    async def _work(self, request: Request, place: Place, folder: Path, limit: int, arrival: float) -> bytes:
        body = folder / "body.json"
        with body.open("wb") as file:
            await receive_body(request, file, limit)
        gone = asyncio.create_task(until_disconnect(request))
        try:
            async with self._parsing:
                files, asked = await asyncio.to_thread(take_apart, body, folder, self.model.limits)

            def work(progress: Progress) -> bytes:
                predictions = []
                for item in files:
                    progress(0.0)
                    predictions.append(self.model.segment_file(item, asked, progress))
                return json.dumps({"predictions": predictions}).encode()

            future = asyncio.wrap_future(self.queue.compute(place, work))
            left = self.params.timeout_s - (time.monotonic() - arrival)
            waiting: Iterable[asyncio.Future[Any]] = (future, gone)
            done, _ = await asyncio.wait(waiting, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
            if future in done:
                return bytes(future.result())
            future.add_done_callback(_forget)
            if gone in done:
                raise GoneError
            raise TimeoutError
        finally:
            gone.cancel()


def make_app(service: Service) -> FastAPI:
    """Make the web application.

    ``/ping`` and ``/health`` say that the process lives, ``/ready`` whether it would take a request now,
    ``/version`` what it runs; ``/invocations`` segments. All but the last answer at once, whatever is being
    computed.
    """
    app = FastAPI(title="nuclei3d", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/ping")
    @app.get("/health")
    async def ping() -> Response:
        return Response("\n", media_type="application/json")

    @app.get("/ready")
    async def ready() -> Response:
        if service.queue.accepting:
            return _json({"ready": True})
        headers = {"Retry-After": str(service.queue.retry_after_s)}
        return Response(json.dumps({"ready": False}), 503, headers, media_type="application/json")

    @app.get("/version")
    async def version() -> Response:
        return _json({"nuclei3d": __version__, "model": service.model.version})

    @app.post("/invocations")
    async def invocations(request: Request) -> Response:
        start = time.monotonic()
        try:
            answer = await service.answer(request)
        except Refusal as refusal:
            say(f"POST /invocations {refusal.status}: {refusal.message}")
            await drain_body(request)
            return refusal.response()
        except (GoneError, AbandonedError):
            say("POST /invocations: abandoned by its sender")
            return Response(status_code=499)
        except Exception as error:
            say(f"POST /invocations 500: {type(error).__name__}: {' '.join(str(error).split())}")
            return Refusal(500, "INTERNAL_ERROR", "the service failed; its log says more").response()
        say(f"POST /invocations 200 in {time.monotonic() - start:.1f} s")
        return Response(answer, media_type="application/json")

    return app


def _check_head(request: Request, limit: int) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "UNSUPPORTED_MEDIA_TYPE", f"send application/json, not '{kind}'")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> Refusal:
    return Refusal(
        413, "REQUEST_TOO_LARGE", f"the body is larger than the {limit / 1e6:g} MB that this service takes"
    )


def _busy(message: str, seconds: int) -> Refusal:
    return Refusal(503, "TEMPORARILY_UNAVAILABLE", message, (("Retry-After", str(seconds)),))


def _stopping() -> Refusal:
    return Refusal(503, "TEMPORARILY_UNAVAILABLE", "the service is stopping", (("Retry-After", "10"),))


def _json(tree: object) -> Response:
    return Response(json.dumps(tree), media_type="application/json")


def _forget(future: asyncio.Future[Any]) -> None:
    """Take note of the end of a computation that nobody waits for, so that asyncio does not complain."""
    if not future.cancelled():
        future.exception()


class _Server(uvicorn.Server):
    """A server that, told to stop, sends waiting requests away and finishes the one being computed."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would raise the signal once more at the end; being told to stop is no failure here.
        self._service.queue.close()
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def listen(params: ServeParams) -> socket.socket:
    """Take the address, so that a port in use is told before a model is loaded."""
    family = socket.AF_INET6 if ":" in params.host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((params.host, params.port))
    except OSError as error:
        taken.close()
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot listen on {params.host}:{params.port}: {reason}; choose another with --port or --host"
        ) from None
    return taken


def run_service(service: Service, params: ServeParams, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM."""
    config = uvicorn.Config(
        make_app(service),
        log_level="error",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=int(params.shutdown_s),
    )
    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    say(f"serving {describe(service)} at {address}; stop with Ctrl-C")
    _Server(config, service).run(sockets=[listening])
    say("stopped")


def describe(service: Service) -> str:
    """Say which model a service runs."""
    version = service.model.version
    if "version" in version:
        return f"{version['registered_name']} version {version['version']}"
    return version.get("name", "a model")
