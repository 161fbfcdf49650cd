"""The client gets what the service computes, tries again where that helps, and says what is wrong."""

import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest

from nuclei3d.client import RemoteModel, is_service
from nuclei3d.config.sections import PredictParams
from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize

Image = np.ndarray[Any, Any]
Serving = Callable[..., AbstractContextManager[Any]]
VOXEL_SIZE = VoxelSize(2.0, 0.3, 0.3)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32", "float64", "bool"])
def test_an_image_of_any_type_comes_back_as_labels(serving: Serving, image: Image, dtype: str) -> None:
    sent = image.astype(dtype) if dtype != "bool" else image > 100
    with serving() as running:
        found = RemoteModel(running.url, PredictParams(mode="stitch")).segment(sent, VOXEL_SIZE)
    np.testing.assert_array_equal(found.labels, (sent > 100).astype(np.uint32))
    assert found.labels.dtype == np.uint32
    assert found.nuclei[0].volume_um3 == 4.0
    assert found.model["version"] == "3"
    assert found.parameters["mode"] == "stitch"
    assert found.parameters["voxel_size_um"] == [2.0, 0.3, 0.3]
    assert "device" not in found.parameters


def test_a_volume_of_three_planes_is_not_taken_for_a_colour_picture(serving: Serving) -> None:
    image = np.arange(3 * 20 * 20, dtype=np.uint16).reshape(3, 20, 20)
    with serving() as running:
        found = RemoteModel(running.url).segment(image, VOXEL_SIZE)
    np.testing.assert_array_equal(found.labels, image > 100)


def test_the_token_comes_from_the_environment(serving, image, monkeypatch):
    with serving(token="sesame") as running:
        monkeypatch.setenv("NUCLEI3D_TOKEN", "sesame")
        RemoteModel(running.url).segment(image, VOXEL_SIZE)
        monkeypatch.delenv("NUCLEI3D_TOKEN")
        with pytest.raises(InputError, match=r"401.*token"):
            RemoteModel(running.url).segment(image, VOXEL_SIZE)


def test_a_refusal_is_told_in_the_words_of_the_service(serving: Serving, image: Image) -> None:
    with serving(max_voxels=10) as running, pytest.raises(InputError, match=r"400.*this service takes 10"):
        RemoteModel(running.url).segment(image, VOXEL_SIZE)


def test_a_service_that_is_not_there_is_one_line() -> None:
    with pytest.raises(InputError, match="start the service") as caught:
        RemoteModel("http://127.0.0.1:9", patience_s=0.5).segment(np.zeros((2, 4, 4), np.uint8), VOXEL_SIZE)
    assert "\n" not in str(caught.value)


def test_a_busy_service_is_tried_again(serving: Serving, image: Image, capsys: Any) -> None:
    with serving(queue=0) as running:
        running.model.go.clear()
        place = running.service.queue.take_place()
        threading.Timer(0.7, lambda: running.service.queue.leave(place)).start()
        running.model.go.set()
        found = RemoteModel(running.url).segment(image, VOXEL_SIZE)
    np.testing.assert_array_equal(found.labels, image > 100)
    assert "is busy (503)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer", [b"hello", b"[]", b'{"predictions": []}', b'{"predictions": [{"labels": "?"}]}']
)
def test_another_kind_of_server_is_recognised(answer: bytes) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(InputError, match="does it serve nuclei3d"):
            RemoteModel(f"http://127.0.0.1:{server.server_port}").segment(
                np.zeros((2, 4, 4), np.uint8), VOXEL_SIZE
            )
    finally:
        server.shutdown()
        server.server_close()


def test_an_unknown_score_survives_the_way(serving: Serving, image: Image) -> None:
    with serving() as running:
        running.model.score = None
        found = RemoteModel(running.url).segment(image, VOXEL_SIZE)
    assert math.isnan(found.nuclei[0].score)


def test_an_address_is_told_from_a_folder() -> None:
    assert is_service("http://host:5050")
    assert is_service("https://host/model")
    assert not is_service("models:/nuclei_3d@champion")
    assert not is_service("models/nuclei_3d")
