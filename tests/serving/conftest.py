"""A service on loopback around a model that needs no network: it thresholds."""

import base64
import json
import socket
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

from nuclei3d.config.sections import ServeParams
from nuclei3d.experiment.invocation import RequestParams, VolumeLimits, open_frame
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.serve import Service, make_app


class ThresholdModel:
    """Labels what is brighter than 100, after waiting in steps until it is told to go on."""

    def __init__(self, limits: VolumeLimits) -> None:
        self.limits = limits
        self.version = {"name": "threshold", "registered_name": "threshold", "version": "3"}
        self.go = threading.Event()
        self.go.set()
        self.begun = 0
        self.score: float | None = 0.5

    def segment_file(
        self, file: Path, asked: RequestParams, progress: Callable[[float], None] | None = None
    ) -> dict[str, Any]:
        self.begun += 1
        while not self.go.wait(0.005):
            if progress is not None:
                progress(0.5)
        frame, voxel_size = open_frame(file, asked, self.limits.max_voxels)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "labels.tif"
            write_labels(out, (frame.read() > 100).astype(np.uint32), voxel_size)
            labels = base64.b64encode(out.read_bytes()).decode()
        return {
            "labels": labels,
            "nuclei": [
                {"label": 1, "z_um": 1.0, "y_um": 2.0, "x_um": 3.0, "volume_um3": 4.0, "mean_intensity": 5.0}
                | {"score": self.score}
            ],
            "parameters": asked.model_dump(mode="json", exclude_unset=True),
            "model": self.version,
            "seconds": {"network": 0.0},
        }


@dataclass
class Running:
    """A running service and what a test does with it."""

    url: str
    model: Any
    service: Service
    server: uvicorn.Server
    threads: list[threading.Thread] = field(default_factory=list)

    def post(self, body: object, **options: Any) -> requests.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        return requests.post(f"{self.url}/invocations", data=data, headers=headers, timeout=30, **options)

    def post_later(self, body: object) -> list[requests.Response]:
        """Send a request from another thread; the answer appears in the list."""
        answers: list[requests.Response] = []
        thread = threading.Thread(target=lambda: answers.append(self.post(body)), daemon=True)
        self.threads.append(thread)
        thread.start()
        return answers

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, "the service never got there"
            time.sleep(0.01)


@contextmanager
def _serving(
    root: Path | None = None, token: str | None = None, model: Any = None, **settings: Any
) -> Iterator[Running]:
    params = ServeParams(port=0, **settings)
    model = model or ThresholdModel(VolumeLimits(root, params.max_voxels))
    service = Service(model, params, token)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(make_app(service), log_level="error", lifespan="off", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
    thread.start()
    running = Running(f"http://127.0.0.1:{listening.getsockname()[1]}", model, service, server)
    running.wait_for(lambda: server.started)
    try:
        yield running
    finally:
        if isinstance(model, ThresholdModel):
            model.go.set()
        service.queue.close()
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def serving() -> Callable[..., AbstractContextManager[Running]]:
    """A function that starts a service with the given settings."""
    return _serving


@pytest.fixture
def image() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype(np.uint16)


@pytest.fixture
def volume(image: np.ndarray[Any, Any], tmp_path: Path) -> str:
    """The image as base64 of an OME-TIFF with a voxel size."""
    file = tmp_path / "sent.ome.tif"
    write_image(file, image, VoxelSize(2.0, 0.5, 0.5))
    return base64.b64encode(file.read_bytes()).decode()
