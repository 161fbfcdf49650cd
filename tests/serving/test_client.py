"""The client gets what the service computes, tries again where that helps, and says what is wrong."""

import math
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest

from nuclei3d.client import RemoteModel, is_service
from nuclei3d.config import Params
from nuclei3d.config.sections import PredictParams
from nuclei3d.errors import InputError
from nuclei3d.images.tiff import write_image
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.predict import predict
from nuclei3d.stages.predictor import open_model
from threshold_model import VERSION

Image = np.ndarray[Any, Any]
Serving = Callable[..., AbstractContextManager[Any]]
VOXEL_SIZE = VoxelSize(2.0, 0.3, 0.3)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def test_it_knows_which_model_answers(serving):
    with serving() as running:
        served = RemoteModel(running.url).served_model()
        assert isinstance(served, dict)
        assert served["version"] == "3"
    assert RemoteModel("http://127.0.0.1:9").served_model() is None


def test_a_model_trained_again_behind_the_same_address_is_noticed(serving, image, tmp_path, free_port):
    write_image(tmp_path / "a.tif", image, VOXEL_SIZE)

    def predicted(params: Params) -> bool:
        frame = predict(params, [tmp_path / "a.tif"], f"http://127.0.0.1:{free_port}", tmp_path / "out")
        return not frame.frames[0].done_before

    params = Params(predict=PredictParams(report=False))
    with serving(port=free_port):
        assert [predicted(params), predicted(params)] == [True, False]
    with serving(port=free_port, version={**VERSION, "weights_sha256": "1"}) as running:
        assert [predicted(params), predicted(params)] == [True, False]
        # exchanged while it is asked: no mask of a model that is not the one of the record
        running.service.version = VERSION
        with pytest.raises(InputError, match="another model than at the start"):
            predicted(params)
        assert not list((tmp_path / "out").rglob("a.json"))


def test_a_page_changes_nothing_of_what_a_service_gave(serving: Serving) -> None:
    with serving() as running:
        asked = (PredictParams(report=report) for report in (True, False))
        opened = [open_model(Params(predict=each), running.url) for each in asked]
    assert opened[0].identity == opened[1].identity
    weaker = [each.with_params(score_threshold=0.0, min_volume_um3=0.0) for each in opened]
    assert weaker[0].identity == weaker[1].identity


def test_a_service_that_does_not_say_what_it_serves_is_asked_each_time(serving, image, tmp_path, monkeypatch):
    write_image(tmp_path / "a.tif", image, VOXEL_SIZE)
    monkeypatch.setattr(RemoteModel, "served_model", lambda self: None)
    with serving() as running:
        for _ in range(2):
            params = Params(predict=PredictParams(report=False))
            found = predict(params, [tmp_path / "a.tif"], running.url, tmp_path / "out")
            assert not found.frames[0].done_before


def test_the_token_comes_from_the_environment(serving, image, monkeypatch):
    with serving(token="sesame") as running:
        monkeypatch.setenv("NUCLEI3D_TOKEN", "sesame")
        RemoteModel(running.url).segment(image, VOXEL_SIZE)
        monkeypatch.delenv("NUCLEI3D_TOKEN")
        with pytest.raises(InputError, match=r"401.*token"):
            RemoteModel(running.url).segment(image, VOXEL_SIZE)


def test_a_refusal_is_told_in_the_words_of_the_service(serving: Serving, image: Image) -> None:
    with serving(max_voxels=10) as running, pytest.raises(InputError, match=r"413.*this service takes 10"):
        RemoteModel(running.url).segment(image, VOXEL_SIZE)


def test_a_service_that_is_not_there_is_one_line() -> None:
    with pytest.raises(InputError, match="start the service") as caught:
        RemoteModel("http://127.0.0.1:9", patience_s=0.5).segment(np.zeros((2, 4, 4), np.uint8), VOXEL_SIZE)
    assert "\n" not in str(caught.value)


def test_a_busy_service_is_tried_again(serving: Serving, image: Image, capsys: Any) -> None:
    with serving(queue=0) as running:
        running.service.places += 1

        def leave() -> None:
            running.service.places -= 1

        threading.Timer(0.7, leave).start()
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
    with serving(score=None) as running:
        found = RemoteModel(running.url).segment(image, VOXEL_SIZE)
    assert math.isnan(found.nuclei[0].score)


def test_an_address_is_told_from_a_folder() -> None:
    assert is_service("http://host:5050")
    assert is_service("https://host/model")
    assert not is_service("models:/nuclei_3d@champion")
    assert not is_service("models/nuclei_3d")
