"""The HTTP service: the endpoints of MLflow's scoring server, with workers, limits and a token.

This process receives and answers; it never looks into a body. One worker takes bodies apart and checks them,
so that a bad request is refused at once whatever is being computed; another holds the model and computes one
request at a time (`nuclei3d.worker`). A request has a place in the queue once its body was found to be good.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import math
import multiprocessing
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import uvicorn
from fastapi import FastAPI, Request, Response
from filelock import FileLock, Timeout
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from nuclei3d import __version__
from nuclei3d.config import Params
from nuclei3d.config.sections import ServeParams
from nuclei3d.console import printable, say
from nuclei3d.errors import InputError, TooLargeError
from nuclei3d.experiment.invocation import MAX_ROWS, RequestParams
from nuclei3d.worker import Worker, WorkerDiedError

_PREFIX = "nuclei3d-serve-"
_LOCK = ".lock"
_SHARE_OF_MEMORY = 0.8
_CONNECTIONS = 512
_HEAD_S = 20.0
_SEND_S = 300.0
_READ_S = 60.0
_DRAIN_S = 20.0
# Imported once, before the workers are born.
IMPORTED_BY_WORKERS = (
    "nuclei3d.experiment.registry",
    "nuclei3d.experiment.serving_model",
    "nuclei3d.segmentation.dynamics",
    "nuclei3d.segmentation.network_pass",
)


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


def _too_large(message: str) -> Refusal:
    return Refusal(413, "REQUEST_TOO_LARGE", message)


def _busy(message: str, seconds: int) -> Refusal:
    return Refusal(503, "TEMPORARILY_UNAVAILABLE", message, (("Retry-After", str(seconds)),))


class Service:
    """The two workers, as started, the queue before them, and the rules of admission.

    `version` says what the model is; `folder` takes the bodies of requests, and what is made of them.
    """

    def __init__(
        self,
        params: ServeParams,
        reader: Worker,
        segmenter: Worker,
        version: dict[str, str],
        folder: Path,
        token: str | None = None,
    ) -> None:
        self.params = params
        self.reader = reader
        self.segmenter = segmenter
        self.version = version
        self.places = 0
        self.closed = False
        self._folder = folder
        self._token = token
        self._most_bytes = params.max_body_mb * 1_000_000
        self._held_bytes: dict[Path, int] = {}
        self._turn = asyncio.Lock()
        self._waiting: set[asyncio.Task[Any]] = set()
        self._mean_s = 1.0
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def ready(self) -> bool:
        """Whether a request would be computed now, or wait for others only."""
        free = self.places <= self.params.queue and not self.closed
        return free and self.reader.ready and self.segmenter.ready

    @property
    def retry_after_s(self) -> int:
        """Seconds after which a place is likely to be free, from the mean duration of the last requests."""
        return max(1, min(60, math.ceil(self._mean_s)))

    @asynccontextmanager
    async def working(self, _app: object = None) -> AsyncIterator[None]:
        """Watch the workers; they end with it."""
        self._loop = asyncio.get_running_loop()
        workers = (self.reader, self.segmenter)
        watching = [asyncio.create_task(worker.watch()) for worker in workers]
        try:
            yield
        finally:
            for task in watching:
                task.cancel()
            for worker in workers:
                worker.kill()

    def close(self) -> None:
        """Take no more requests and send those away that wait; the one being computed goes on.

        May be called from any thread, and from a handler of signals.
        """
        self.closed = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._waiting])

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
        """Answer with the JSON of MLflow's server, or raise a `Refusal`; ClientDisconnect if it hung up."""
        self.check_token(request)
        self._check_head(request)
        try:
            async with asyncio.timeout(self.params.timeout_s):
                with tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as folder:
                    body = Path(folder) / "body.json"
                    try:
                        await self._receive(request, body)
                        return await _unless_gone(request, self._work(body))
                    finally:
                        self._held_bytes.pop(body, None)
        except TooLargeError as error:
            raise _too_large(str(error)) from None
        except InputError as error:
            raise Refusal(400, "INVALID_PARAMETER_VALUE", str(error)) from None
        except MemoryError:
            raise _too_large(
                "the request needs more memory than the service has; send a smaller volume"
            ) from None
        except WorkerDiedError:
            raise Refusal(
                422,
                "UNPROCESSABLE",
                "the request ended the process that worked on it, twice; check the volume",
            ) from None
        except TimeoutError:
            raise Refusal(
                504,
                "DEADLINE_EXCEEDED",
                f"not done within {self.params.timeout_s:g} s; send a smaller volume",
            ) from None

    def _check_head(self, request: Request) -> None:
        if self.closed:
            raise _busy("the service is stopping", 10)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, "UNSUPPORTED_MEDIA_TYPE", f"send application/json, not '{printable(kind)}'")
        length = request.headers.get("content-length", "0")
        if length.isdecimal():
            self._check_length(int(length))

    def _check_length(self, length: int) -> None:
        if length > self._most_bytes:
            raise _too_large(
                f"the body is larger than the {self.params.max_body_mb} MB that this service takes"
            )

    async def _receive(self, request: Request, body: Path) -> None:
        """Write the body to a file, within its own deadline and a limit on all bodies."""
        self._held_bytes[body] = 0
        try:
            async with asyncio.timeout(self.params.body_s):
                with body.open("wb") as file:
                    async for chunk in request.stream():
                        self._held_bytes[body] += len(chunk)
                        self._check_length(self._held_bytes[body])
                        if sum(self._held_bytes.values()) > (self.params.queue + 2) * self._most_bytes:
                            raise _busy("the service holds too many large requests", self.retry_after_s)
                        file.write(chunk)
        except TimeoutError:
            raise Refusal(408, "REQUEST_TIMEOUT", "the body of the request did not arrive in time") from None

    async def _work(self, body: Path) -> bytes:
        """Check a body, wait for the turn, compute."""
        answer = body.with_name("answer.json")
        try:
            async with asyncio.timeout(_READ_S):
                files, asked = await _insist(
                    self.reader, "nuclei3d.experiment.invocation:take_apart", body, body.parent
                )
        except TimeoutError:
            raise _too_large(f"the body cannot be read within {_READ_S:g} s; send a smaller one") from None
        body.unlink()
        if self.places > self.params.queue:
            raise _busy(f"the service is busy; try again in {self.retry_after_s} s", self.retry_after_s)
        task = asyncio.current_task()
        assert task is not None
        self.places += 1
        self._waiting.add(task)
        try:
            async with self._turn:
                self._waiting.discard(task)
                start = time.monotonic()
                await _insist(
                    self.segmenter, "nuclei3d.experiment.serving_model:answer_rows", files, asked, answer
                )
                self._mean_s += 0.3 * (time.monotonic() - start - self._mean_s)
        except asyncio.CancelledError:
            if self.closed and task in self._waiting:
                raise _busy("the service is stopping", 10) from None
            raise
        finally:
            self._waiting.discard(task)
            self.places -= 1
        return await asyncio.to_thread(answer.read_bytes)


async def _insist(worker: Worker, function: str, *arguments: Any) -> Any:
    """Have a worker do something; once more if it died, for that may have had nothing to do with it.

    So the function must leave what it was given as it was.
    """
    with suppress(WorkerDiedError):
        return await worker.run(function, *arguments)
    return await worker.run(function, *arguments)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, bytes]) -> bytes:
    """Await a result; it is cancelled if the sender, whose body is here, hangs up."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    doing = asyncio.create_task(work)
    tasks = (doing, asyncio.create_task(hung_up()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drain_body(request: Request) -> None:
    """Let a sender that is refused finish sending, for a while: only then will it read the answer.

    A client that still sends when the connection is closed sees a broken connection and not the status.
    """
    with suppress(TimeoutError, ClientDisconnect, RuntimeError):
        async with asyncio.timeout(_DRAIN_S):
            async for _ in request.stream():
                pass


def make_app(service: Service) -> FastAPI:
    """Make the web application.

    ``/ping`` and ``/health`` say that the process lives, ``/ready`` whether it would take a request now,
    ``/version`` what it runs; ``/invocations`` segments. All but the last answer at once, whatever is being
    computed.
    """
    app = FastAPI(
        title="nuclei3d", version=__version__, docs_url=None, redoc_url=None, lifespan=service.working
    )
    if is_loopback(service.params.host):
        # A page of the web whose name was bound to this address would send its own name.
        hosts = ["localhost", "127.0.0.1", "[::1]", service.params.host]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)

    @app.get("/ping")
    @app.get("/health")
    async def ping() -> Response:
        return Response("\n", media_type="application/json")

    @app.get("/ready", responses={503: {}})
    async def ready() -> Response:
        if service.ready:
            return _json({"ready": True})
        headers = {"Retry-After": str(service.retry_after_s)}
        return Response(json.dumps({"ready": False}), 503, headers, media_type="application/json")

    @app.get("/version")
    async def version() -> Response:
        return _json({"nuclei3d": __version__, "model": service.version})

    @app.post("/invocations", openapi_extra=_request_schema(), responses={status: {} for status in _STATUSES})
    async def invocations(request: Request) -> Response:
        start = time.monotonic()
        try:
            answer = await service.answer(request)
        except Refusal as refusal:
            say(f"POST /invocations {refusal.status}: {refusal.message}")
            await _drain_body(request)
            return refusal.response()
        except ClientDisconnect:
            say("POST /invocations: abandoned by its sender")
            return Response(status_code=499)
        except asyncio.CancelledError:
            # told to stop, the server waits for so long and no longer
            return _busy("the service is stopping", 10).response()
        except Exception as error:
            say(f"POST /invocations 500: {type(error).__name__}: {printable(str(error), 1000)}")
            return Refusal(500, "INTERNAL_ERROR", "the service failed; its log says more").response()
        say(f"POST /invocations 200 in {time.monotonic() - start:.1f} s")
        return Response(answer, media_type="application/json")

    return app


_STATUSES = (400, 401, 408, 413, 415, 422, 503, 504)


def _request_schema() -> dict[str, Any]:
    """Describe the body of a request for /openapi.json."""
    text = {"type": "string"}
    row = {"type": "object", "properties": {"volume": text, "path": text}, "additionalProperties": False}
    split = {
        "type": "object",
        "properties": {
            "columns": {"type": "array", "items": {"enum": ["volume", "path"]}},
            "data": {"type": "array", "items": {"type": "array", "items": text}, "maxItems": MAX_ROWS},
        },
        "required": ["columns", "data"],
    }
    body = {
        "type": "object",
        "properties": {
            "dataframe_records": {"type": "array", "items": row, "minItems": 1, "maxItems": MAX_ROWS},
            "dataframe_split": split,
            "params": RequestParams.model_json_schema(),
        },
        "additionalProperties": False,
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}}


def _json(tree: object) -> Response:
    return Response(json.dumps(tree), media_type="application/json")


class _Connection(H11Protocol):
    """A connection that is closed if no head of a request comes in time, or an answer is not taken in time.

    uvicorn would wait for ever.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._seen: object = None
        self._timer = self.loop.call_later(_HEAD_S, self._close_if_silent)
        self._sending: asyncio.TimerHandle | None = None

    def _close_if_silent(self) -> None:
        done = self.cycle is None or self.cycle.response_complete or self.transport.is_closing()
        if done and self.cycle is self._seen and self._sending is None:
            self.transport.abort()
            return
        # an answer that was begun meanwhile has as long as any other
        self._seen = self.cycle if done else self
        self._timer = self.loop.call_later(_HEAD_S, self._close_if_silent)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending = self.loop.call_later(_SEND_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_sending()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._end_sending()
        super().connection_lost(exc)

    def _end_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None


class ServiceServer(uvicorn.Server):
    """A server that, told to stop, sends waiting requests away and finishes the one being computed."""

    def __init__(self, service: Service) -> None:
        config = uvicorn.Config(
            make_app(service),
            http=_Connection,
            ws="none",
            log_level="error",
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=int(service.params.shutdown_s),
        )
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at a signal."""
        # uvicorn would raise the signal once more at the end; being told to stop is no failure here.
        self._service.close()
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


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


@contextmanager
def open_service(model: str, params: Params, token: str | None = None) -> Iterator[Service]:
    """Start the workers of a model (a URI of MLflow, which is looked up once, or a model folder)."""
    memory_gb = params.serve.memory_gb or _SHARE_OF_MEMORY * psutil.virtual_memory().available / 1e9
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(IMPORTED_BY_WORKERS))
    segmenter = Worker(
        "model", "nuclei3d.experiment.registry:load_served_model", model, params, memory_gb=memory_gb
    )
    with _own_folder() as folder:
        try:
            segmenter.start()
            home, version = segmenter.call("nuclei3d.experiment.serving_model:describe")
            segmenter.arguments = (home, params)
            reader = Worker(
                "reader of requests",
                "nuclei3d.experiment.invocation:open_admission",
                Path(home),
                params,
                memory_gb=memory_gb,
            )
            reader.start()
            yield Service(params.serve, reader, segmenter, version, folder, token)
        finally:
            segmenter.kill()


@contextmanager
def _own_folder() -> Iterator[Path]:
    """Make a temporary folder, and remove those of services that were killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(Timeout, OSError), FileLock(left / _LOCK, blocking=False):
            shutil.rmtree(left)
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as folder,
        FileLock(Path(folder) / _LOCK, blocking=False),
    ):
        yield Path(folder)


def run_service(service: Service, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM."""
    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    say(f"serving {describe(service)} at {address}; stop with Ctrl-C")
    ServiceServer(service).run(sockets=[listening])
    say("stopped")


def describe(service: Service) -> str:
    """Say which model a service runs."""
    version = service.version
    if "version" in version:
        return f"{version['registered_name']} version {version['version']}"
    return version.get("name", "a model")
