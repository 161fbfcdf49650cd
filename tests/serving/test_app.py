"""The service gives the right masks, the right refusals, and stays there under load."""

import base64
import io
import json
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tifffile

from nuclei3d.images.tiff import write_image
from nuclei3d.images.voxel_size import VoxelSize

Image = np.ndarray[Any, Any]
Serving = Callable[..., AbstractContextManager[Any]]


def labels_of(response: requests.Response) -> Image:
    prediction = response.json()["predictions"][0]
    return np.asarray(tifffile.imread(io.BytesIO(base64.b64decode(prediction["labels"]))))


def records(volume: str, **params: object) -> dict[str, object]:
    return {"dataframe_records": [{"volume": volume}], "params": params}


def test_both_forms_of_a_data_frame_give_the_masks(serving: Serving, volume: str, image: Image) -> None:
    split = {"dataframe_split": {"columns": ["volume"], "data": [[volume]]}}
    with serving() as running:
        for body in (records(volume), split):
            response = running.post(body)
            assert response.status_code == 200
            np.testing.assert_array_equal(labels_of(response), image > 100)


def test_the_answer_echoes_parameters_and_version(serving: Serving, volume: str) -> None:
    with serving() as running:
        answer = running.post(records(volume, mode="stitch", anisotropy=4)).json()["predictions"][0]
        assert answer["parameters"] == {"mode": "stitch", "anisotropy": 4.0}
        assert answer["model"]["version"] == "3"
        assert requests.get(f"{running.url}/version", timeout=5).json()["model"] == running.model.version


def test_a_path_below_the_root_is_read_and_no_other(serving: Serving, image: Image, tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_image(root / "a.tif", image, VoxelSize(2, 1, 1))
    write_image(tmp_path / "b.tif", image, VoxelSize(2, 1, 1))
    (root / "link.tif").symlink_to(tmp_path / "b.tif")
    with serving(root=root) as running:
        inside = running.post({"dataframe_records": [{"path": "a.tif"}]})
        np.testing.assert_array_equal(labels_of(inside), image > 100)
        for path in ("../b.tif", str(tmp_path / "b.tif"), "link.tif", "file://b.tif"):
            refused = running.post({"dataframe_records": [{"path": path}]})
            assert refused.status_code == 400, path
    with serving() as running:
        assert running.post({"dataframe_records": [{"path": "a.tif"}]}).status_code == 400


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        ({"dataframe_records": []}, "no rows"),
        ({"dataframe_records": [{"volumes": "a"}]}, "unknown column 'volumes'"),
        ({"dataframe_records": [{"volume": "%"}]}, "base64"),
        ({"dataframe_records": "a"}, "list of objects"),
        ({"dataframe_split": {"columns": ["volume"], "data": [["a", "b"]]}}, "as many values"),
        ({"dataframe_split": {"columns": ["volume"]}}, "'columns' and 'data'"),
        ({"inputs": [1]}, "unknown field 'inputs'"),
        ({"dataframe_records": [{}], "parameters": {}}, "unknown field 'parameters'"),
    ],
)
def test_a_bad_body_is_refused_with_a_reason(serving: Serving, body: object, told: str) -> None:
    with serving() as running:
        response = running.post(body)
        assert response.status_code == 400
        assert told in response.json()["message"]
        assert running.model.begun == 0


def test_misspelt_parameters_are_refused_not_dropped(serving: Serving, volume: str) -> None:
    with serving() as running:
        response = running.post(records(volume, cellprob_treshold=1.0))
        assert response.status_code == 400
        assert "did you mean 'cellprob_threshold'" in response.json()["message"]


def test_other_media_types_are_refused(serving: Serving, volume: str) -> None:
    with serving() as running:
        response = running.post(records(volume), headers={"Content-Type": "application/x-pickle"})
        assert response.status_code == 415


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_above_the_limit_is_refused_and_the_status_is_seen(serving: Serving, chunked: bool) -> None:
    content = b" " * 3_000_000
    parts = (content[i : i + 100_000] for i in range(0, len(content), 100_000))
    with serving(max_body_mb=1) as running:
        response = requests.post(
            f"{running.url}/invocations",
            data=parts if chunked else content,
            headers={"Content-Type": "application/json"},
            timeout=20,
        )
        assert response.status_code == 413


def test_a_volume_above_the_limit_is_refused_by_its_header(serving: Serving, volume: str) -> None:
    with serving(max_voxels=209) as running:
        response = running.post(records(volume))
        assert response.status_code == 400
        assert "5 x 6 x 7 = 210 voxels" in response.json()["message"]
        assert running.model.begun == 0


def test_a_token_is_asked_for_where_one_is_set(serving: Serving, volume: str) -> None:
    with serving(token="open sesame") as running:
        assert running.post(records(volume)).status_code == 401
        assert running.post(records(volume), headers={"Authorization": "Bearer no"}).status_code == 401
        allowed = running.post(records(volume), headers={"Authorization": "Bearer open sesame"})
        assert allowed.status_code == 200
        assert requests.get(f"{running.url}/ping", timeout=5).status_code == 200


def test_a_full_line_answers_503_with_retry_after_and_health_stays_quick(serving, volume):
    with serving(queue=1) as running:
        running.model.go.clear()
        first, second = running.post_later(records(volume)), running.post_later(records(volume))
        running.wait_for(lambda: running.model.begun == 1 and not running.service.queue.accepting)
        refused = running.post(records(volume))
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert requests.get(f"{running.url}/ready", timeout=5).status_code == 503
        for endpoint in ("ping", "health", "version"):
            assert requests.get(f"{running.url}/{endpoint}", timeout=5).status_code == 200
        running.model.go.set()
        running.wait_for(lambda: bool(first and second))
        assert [answer.status_code for answer in (*first, *second)] == [200, 200]
        assert requests.get(f"{running.url}/ready", timeout=5).status_code == 200


def send_and_hang_up(url: str, body: dict[str, object]) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    content = json.dumps(body).encode()
    line = socket.create_connection((host, int(port)))
    head = "POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    line.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return line


def test_an_abandoned_request_is_not_computed(serving: Serving, volume: str) -> None:
    with serving(queue=2) as running:
        running.model.go.clear()
        first = running.post_later(records(volume))
        running.wait_for(lambda: running.model.begun == 1)
        line = send_and_hang_up(running.url, records(volume))
        queue = running.service.queue
        running.wait_for(lambda: len(queue._waiting) == 1)
        line.close()
        running.wait_for(lambda: len(queue._waiting) == 0)
        running.model.go.set()
        running.wait_for(lambda: bool(first))
        assert running.post(records(volume)).status_code == 200
        assert running.model.begun == 2


def test_a_request_abandoned_while_it_is_computed_is_stopped(serving: Serving, volume: str) -> None:
    with serving(queue=0) as running:
        running.model.go.clear()
        line = send_and_hang_up(running.url, records(volume))
        running.wait_for(lambda: running.model.begun == 1)
        line.close()
        running.wait_for(lambda: running.service.queue.accepting)


def test_a_request_that_takes_too_long_is_stopped(serving: Serving, volume: str) -> None:
    with serving(timeout_s=0.3) as running:
        running.model.go.clear()
        response = running.post(records(volume))
        assert response.status_code == 504
        running.model.go.set()
        assert running.post(records(volume)).status_code == 200


def test_a_stopping_service_finishes_what_it_computes_and_sends_the_others_away(serving, volume):
    with serving(queue=2) as running:
        running.model.go.clear()
        first = running.post_later(records(volume))
        running.wait_for(lambda: running.model.begun == 1)
        second = running.post_later(records(volume))
        running.wait_for(lambda: len(running.service.queue._waiting) == 1)
        running.service.queue.close()
        running.server.should_exit = True
        running.wait_for(lambda: bool(second))
        assert second[0].status_code == 503
        running.model.go.set()
        running.wait_for(lambda: bool(first))
        assert first[0].status_code == 200


def test_a_fault_of_ours_is_500_and_the_service_goes_on(serving, volume, monkeypatch):
    with serving() as running:
        real = running.model.segment_file

        def broken(*_: object) -> None:
            raise RuntimeError("secret path /home/me")

        monkeypatch.setattr(running.model, "segment_file", broken)
        response = running.post(records(volume))
        assert response.status_code == 500
        assert "secret" not in response.text
        monkeypatch.setattr(running.model, "segment_file", real)
        assert running.post(records(volume)).status_code == 200


def test_several_rows_are_answered_in_order(serving, volume, image, tmp_path):
    other = tmp_path / "other.tif"
    write_image(other, 200 - image, VoxelSize(2, 1, 1))
    second = base64.b64encode(other.read_bytes()).decode()
    with serving() as running:
        answer = running.post({"dataframe_records": [{"volume": volume}, {"volume": second}]})
        assert len(answer.json()["predictions"]) == 2
        np.testing.assert_array_equal(labels_of(answer), image > 100)
