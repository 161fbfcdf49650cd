"""The HTTP service: the endpoints of MLflow's scoring server, with a line, limits and a token."""

from __future__ import annotations

import asyncio
import hmac
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response

from nuclei3d import __version__
from nuclei3d.config.serve import ServeParams
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.serving.body import (
    GoneError,
    TooLargeError,
    TooSlowError,
    drain_body,
    receive_body,
    take_apart,
    until_disconnect,
)
from nuclei3d.serving.turns import AbandonedError, ClosedError, LineFullError, Place, Progress, Turns
from nuclei3d.tracking.invocation import RequestParams, VolumeLimits


class ServedModel(Protocol):
    """What the service needs of the model: that of `nuclei3d.tracking.serving_model`."""

    limits: VolumeLimits
    version: dict[str, str]

    def segment_file(
        self, file: Path, wishes: RequestParams, progress: Callable[[float], None] | None = None
    ) -> dict[str, Any]:
        """Segment the volume in a file; see `nuclei3d.tracking.serving_model.NucleiModel`."""


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
    """A model, the line before it, and the rules of admission."""

    def __init__(self, model: ServedModel, params: ServeParams, token: str | None = None) -> None:
        self.model = model
        self.params = params
        self.turns = Turns(params.queue)
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
        """Answer one request for segmentation with the JSON that MLflow's server gives.

        Raises
        ------
        Refusal
            With the status that says what is wrong.
        """
        arrival = time.monotonic()
        self.check_token(request)
        limit = self.params.max_body_mb * 1_000_000
        _check_head(request, limit)
        try:
            place = self.turns.take_place()
        except LineFullError as error:
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
            self.turns.leave(place)

    async def _work(self, request: Request, place: Place, folder: Path, limit: int, arrival: float) -> bytes:
        body = folder / "body.json"
        with body.open("wb") as file:
            await receive_body(request, file, limit)
        gone = asyncio.create_task(until_disconnect(request))
        try:
            async with self._parsing:
                files, wishes = await asyncio.to_thread(take_apart, body, folder, self.model.limits)

            def work(progress: Progress) -> bytes:
                predictions = []
                for item in files:
                    progress(0.0)
                    predictions.append(self.model.segment_file(item, wishes, progress))
                return json.dumps({"predictions": predictions}).encode()

            future = asyncio.wrap_future(self.turns.compute(place, work))
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
        if service.turns.accepting:
            return _json({"ready": True})
        headers = {"Retry-After": str(service.turns.retry_after_s)}
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
