"""A service on loopback around a model that needs no network: it thresholds."""

import base64
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import uvicorn

from nuclei3d.config import Params
from nuclei3d.config.sections import ServeParams
from nuclei3d.images.tiff import write_image
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.serve import IMPORTED_BY_WORKERS, Service, ServiceServer, listen
from nuclei3d.worker import Worker
from threshold_model import VERSION, Gate

multiprocessing.get_context("forkserver").set_forkserver_preload(list(IMPORTED_BY_WORKERS))


@dataclass
class Running:
    """A running service and what a test does with it."""

    url: str
    model: Gate
    service: Service
    server: uvicorn.Server
    threads: list[threading.Thread] = field(default_factory=list)

    def post(self, body: object, **options: Any) -> requests.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        return requests.post(f"{self.url}/invocations", data=data, headers=headers, timeout=200, **options)

    def post_later(self, body: object) -> list[requests.Response]:
        """Send a request from another thread; the answer appears in the list."""
        answers: list[requests.Response] = []
        thread = threading.Thread(target=lambda: answers.append(self.post(body)), daemon=True)
        self.threads.append(thread)
        thread.start()
        return answers

    def get(self, endpoint: str) -> requests.Response:
        return requests.get(f"{self.url}/{endpoint}", timeout=5)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end, "the service never got there"
            time.sleep(0.01)


@contextmanager
def _run(service: Service, gate: Gate) -> Iterator[Running]:
    server = ServiceServer(service)
    with listen(service.params) as listening:
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
        thread.start()
        running = Running(f"http://127.0.0.1:{listening.getsockname()[1]}", gate, service, server)
        try:
            running.wait_for(lambda: server.started and service.ready)
            yield running
        finally:
            gate.release()
            service.close()
            server.should_exit = True
            thread.join(20)


@pytest.fixture
def run_service(tmp_path: Path) -> Callable[[Service], AbstractContextManager[Running]]:
    """A function that runs a service made by the test."""
    return lambda service: _run(service, Gate(tmp_path / "gate"))


@pytest.fixture
def serving() -> Callable[..., AbstractContextManager[Running]]:
    """A function that starts a service with the given settings."""

    @contextmanager
    def start(
        token: str | None = None,
        score: float | None = 0.5,
        memory_gb: float = 4.0,
        version: dict[str, str] = VERSION,
        **settings: Any,
    ) -> Iterator[Running]:
        params = Params(serve=ServeParams(**{"port": 0, "shutdown_s": 5, **settings}))
        with tempfile.TemporaryDirectory() as folder:
            gate = Gate(Path(folder) / "gate")
            opening = "threshold_model:open_threshold"
            segmenter = Worker("model", opening, gate.folder, params, score, version, memory_gb=memory_gb)
            reader = Worker("reader", "threshold_model:open_admission", params, memory_gb=memory_gb)
            segmenter.start()
            reader.start()
            service = Service(params.serve, reader, segmenter, version, Path(folder), token)
            with _run(service, gate) as running:
                yield running

    return start


@pytest.fixture
def image() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype(np.uint16)


@pytest.fixture
def volume(image: np.ndarray[Any, Any], tmp_path: Path) -> str:
    """The image as base64 of an OME-TIFF with a voxel size."""
    file = tmp_path / "sent.ome.tif"
    write_image(file, image, VoxelSize(2.0, 0.5, 0.5))
    return base64.b64encode(file.read_bytes()).decode()
