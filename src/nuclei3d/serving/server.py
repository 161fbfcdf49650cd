"""Running the service until it is told to stop."""

from __future__ import annotations

import signal
import socket
from types import FrameType

import uvicorn

from nuclei3d.config.serve import ServeParams
from nuclei3d.console import say
from nuclei3d.errors import InputError
from nuclei3d.serving.app import Service, make_app


class _Server(uvicorn.Server):
    """A server that, told to stop, sends waiting requests away and finishes the one being computed."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would raise the signal once more at the end; being told to stop is no failure here.
        self._service.turns.close()
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def listen(params: ServeParams) -> socket.socket:
    """Take the address, so that a port in use is told before a model is loaded.

    Raises
    ------
    InputError
        If the address cannot be taken.
    """
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
