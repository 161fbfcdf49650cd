"""The service cannot be hurt: what runs out is told, the next request is answered, nothing is left behind."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from filelock import FileLock
from test_app import labels_of, records, send_and_hang_up

from nuclei3d import serve as service_module
from nuclei3d.config import load_params
from nuclei3d.errors import InputError
from nuclei3d.serve import _own_folder, is_loopback
from nuclei3d.stages.serve import serve
from nuclei3d.worker import WorkerDiedError

Image = np.ndarray[Any, Any]
Serving = Callable[..., AbstractContextManager[Any]]
HEAD = "POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def processes(running: Any) -> list[psutil.Process]:
    found = (running.service.reader._process, running.service.segmenter._process)
    return [process for process in found if process is not None]


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def test_slow_senders_hold_no_place_and_have_one_deadline(
    serving: Serving, volume: str, image: Image
) -> None:
    with serving(queue=0, body_s=2.0) as running:
        lines = [connect(running.url) for _ in range(5)]
        for line in lines:
            line.sendall(f"{HEAD}Content-Length: 1000\r\n\r\n{{".encode())
        start = time.monotonic()
        assert running.get("ready").status_code == 200
        np.testing.assert_array_equal(labels_of(running.post(records(volume))), image > 100)
        # bytes that come in time do not move the deadline
        while time.monotonic() < start + 2.5:
            lines[0].sendall(b" ")
            time.sleep(0.25)
        lines[0].sendall(b" " * 998)
        assert lines[0].recv(100).startswith(b"HTTP/1.1 408")
        for line in lines:
            line.close()


def test_connections_without_a_request_are_closed(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_HEAD_S", 1.0)
    with serving() as running, connect(running.url) as silent, connect(running.url) as slow:
        with suppress(ConnectionError):
            slow.sendall(b"POST /invoc")
        with suppress(ConnectionError):
            assert silent.recv(1) == b""
        with suppress(ConnectionError):
            assert slow.recv(1) == b""


def read_slowly(line: socket.socket, bytes_a_read: int, pause_s: float) -> int:
    """Read until the other side closes; give the number of bytes."""
    count = 0
    with suppress(ConnectionError):
        while part := line.recv(bytes_a_read):
            count += len(part)
            time.sleep(pause_s)
    return count


@pytest.mark.parametrize("limit_s", [1.0, 60.0])
def test_an_answer_that_is_not_taken_in_time_is_cut_off_and_a_slow_one_is_not(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, limit_s: float
) -> None:
    """With a limit of a minute the answer takes longer than a silent connection may, and comes whole."""
    monkeypatch.setattr(service_module, "_HEAD_S", 0.5)
    monkeypatch.setattr(service_module, "_SEND_S", limit_s)
    size = 6_000_000
    with serving(queue=0) as running:

        async def huge(body: Path) -> bytes:
            return b" " * size

        monkeypatch.setattr(running.service, "_work", huge)
        host, _, port = running.url.removeprefix("http://").partition(":")
        with socket.socket() as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.connect((host, int(port)))
            line.sendall(f"{HEAD}Content-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode())
            time.sleep(3.0)
            connections = running.server.server_state.connections
            if limit_s < 3.0:
                running.wait_for(lambda: not connections)
                assert read_slowly(line, 1_000_000, 0.0) < size
            else:
                assert len(connections) == 1
                assert read_slowly(line, 1_000_000, 0.0) > size
        assert running.service.places == 0


def test_requests_in_a_row_whose_answers_nobody_takes_are_cut_off(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_SEND_S", 1.0)
    with serving() as running, connect(running.url) as line:
        line.setblocking(False)
        with suppress(BlockingIOError, ConnectionError):
            while True:
                line.send(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        running.wait_for(lambda: not running.server.server_state.connections)
        assert running.get("ping").status_code == 200


def test_nonsense_is_refused_at_once_under_load(serving: Serving, volume: str) -> None:
    with serving(queue=0) as running:
        running.model.hold()
        first = running.post_later(records(volume))
        running.wait_for(lambda: running.model.begun == 1)
        assert running.post(records(volume)).status_code == 503
        assert running.post(b"nonsense").status_code == 400
        assert running.post(records(volume, mode="magic")).status_code == 400
        assert running.post(records(base64.b64encode(b"II*\0 no TIFF").decode())).status_code == 400
        assert running.post({"dataframe_records": [{"path": "a"}] * 65}).status_code == 413
        running.model.release()
        running.wait_for(lambda: bool(first))
        assert first[0].status_code == 200


def test_memory_that_runs_out_is_413_and_the_next_request_is_answered(
    serving: Serving, volume: str, image: Image
) -> None:
    with serving(memory_gb=1.2) as running:
        running.model.bid("eat")
        refused = running.post(records(volume))
        assert refused.status_code == 413
        assert "memory" in refused.json()["message"]
        running.model.bid("")
        np.testing.assert_array_equal(labels_of(running.post(records(volume))), image > 100)


def test_a_chunk_that_swells_is_413_however_long_its_process_takes_to_end(
    serving: Serving, tmp_path: Path
) -> None:
    """What is freed of gigabytes keeps the dying process longer than the next one takes to be born."""
    root = tmp_path / "bomb.zarr"
    root.mkdir()
    described = {"zarr_format": 2, "shape": [4, 64, 64], "chunks": [4, 64, 64], "dtype": "|u1", "order": "C"}
    described |= {"compressor": {"id": "zlib", "level": 1}, "fill_value": 0, "filters": None}
    (root / ".zarray").write_text(json.dumps(described))
    (root / "0.0.0").write_bytes(zlib.compress(bytes(2_000_000_000), 1))
    asked = {"dataframe_records": [{"path": "bomb.zarr"}], "params": {"voxel_size_um": [2, 0.5, 0.5]}}
    with serving(memory_gb=1.2, root=str(tmp_path)) as running:
        refused = running.post(asked)
        assert refused.status_code == 413
        assert "memory" in refused.json()["message"]
        assert running.model.begun == 1


def test_a_request_that_ends_its_process_is_422(serving: Serving, volume: str, image: Image) -> None:
    with serving() as running:
        running.model.bid("die")
        assert running.post(records(volume)).status_code == 422
        assert running.model.begun == 2
        running.model.bid("")
        np.testing.assert_array_equal(labels_of(running.post(records(volume))), image > 100)


def test_a_worker_that_others_kill_costs_nobody_an_answer(
    serving: Serving, volume: str, image: Image
) -> None:
    with serving() as running:
        open_files = psutil.Process().num_fds()
        for _ in range(3):
            for process in processes(running):
                process.kill()
            assert running.get("ready").status_code == 503
            np.testing.assert_array_equal(labels_of(running.post(records(volume))), image > 100)
        running.model.hold()
        answers = running.post_later(records(volume))
        running.wait_for(lambda: running.model.begun == 4)
        running.service.segmenter._process.kill()
        running.wait_for(lambda: running.model.begun == 5)
        running.model.release()
        running.wait_for(lambda: bool(answers))
        np.testing.assert_array_equal(labels_of(answers[0]), image > 100)
        running.wait_for(lambda: psutil.Process().num_fds() <= open_files + 4)


def test_a_worker_that_dies_when_it_has_done_all_costs_nobody_an_answer(
    serving: Serving, volume: str, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as running:
        for worker in (running.service.reader, running.service.segmenter):
            run, deaths = worker.run, [WorkerDiedError]

            async def die_once(*asked: Any, run: Any = run, deaths: Any = deaths) -> Any:
                answer = await run(*asked)
                if deaths:
                    raise deaths.pop()
                return answer

            monkeypatch.setattr(worker, "run", die_once)
            np.testing.assert_array_equal(labels_of(running.post(records(volume))), image > 100)
            assert not deaths


def test_what_its_sender_left_is_killed(serving: Serving, volume: str) -> None:
    with serving(queue=0) as running:
        running.model.hold()
        worker = running.service.segmenter._process
        line = send_and_hang_up(running.url, records(volume))
        running.wait_for(lambda: running.model.begun == 1)
        line.close()
        running.wait_for(lambda: not worker.is_running() and running.service.ready)
        assert not [item for item in running.model.folder.parent.iterdir() if item.name != "gate"]


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io:80", "[", ""])
def test_on_loopback_only_local_names_are_answered(serving: Serving, volume: str, host: str) -> None:
    with serving() as running:
        refused = running.post(records(volume), headers={"Host": host})
        assert refused.status_code == 400
        assert running.model.begun == 0
        for local in ("localhost:1", "127.0.0.1", "[::1]:5"):
            assert running.post(records(volume), headers={"Host": local}).status_code == 200


def test_other_machines_need_a_token_or_insecure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NUCLEI3D_TOKEN", raising=False)
    with pytest.raises(InputError, match="NUCLEI3D_TOKEN, or say --insecure"):
        serve(load_params(None, ["serve.host=0.0.0.0"]), str(tmp_path))
    for settings in (["serve.host=0.0.0.0", "serve.insecure=true"], ["serve.host=127.0.0.2"]):
        with pytest.raises(InputError, match="no model folder"):
            serve(load_params(None, ["serve.port=0", *settings]), str(tmp_path / "absent"))
    assert [is_loopback(host) for host in ("localhost", "::1", "127.8.8.8", "::", "10.0.0.1", "host")] == [
        *[True] * 3,
        *[False] * 3,
    ]


def test_what_is_not_from_us_is_not_echoed(serving: Serving, volume: str, capfd: Any) -> None:
    with serving() as running:
        refused = running.post(b"{}", headers={"Content-Type": "a\x7fb" + "c" * 1000})
        assert refused.status_code == 415
        assert len(refused.text) < 400
        odd = {"dataframe_records": [{"volume": volume}], "params": {"\x1b[31mred\n": 1}}
        assert running.post(odd).status_code == 400
        cut = base64.b64encode(base64.b64decode(volume)[:-20]).decode()
        assert tempfile.gettempdir() not in running.post(records(cut)).text
        assert "server" not in running.get("ping").headers
    assert "\x1b" not in capfd.readouterr().err


def test_folders_of_killed_services_go_and_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, used = tmp_path / "nuclei3d-serve-left", tmp_path / "nuclei3d-serve-used"
    for folder in (left, used):
        (folder / "request").mkdir(parents=True)
        (folder / "request" / "body.json").touch()
    with FileLock(used / ".lock"), _own_folder() as own:
        assert sorted(tmp_path.iterdir()) == sorted([used, own])
    assert list(tmp_path.iterdir()) == [used]


def test_the_receiving_process_imports_neither_torch_nor_arrays() -> None:
    heavy = {"torch", "numpy", "mlflow", "tifffile"}
    code = f"import sys, nuclei3d.serve; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_workers_end_with_a_service_that_is_killed() -> None:
    code = (
        "from nuclei3d.worker import Worker; import time; w = Worker('w', 'builtins:dict', memory_gb=1); "
        "w.start(); print(w._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    worker.wait(20)
    parent.stdout.close()


def test_a_temporary_folder_with_too_long_a_name_for_sockets_is_told(tmp_path: Path) -> None:
    long = tmp_path / ("a" * 100)
    long.mkdir()
    code = (
        "from nuclei3d.worker import Worker; from nuclei3d.errors import MachineError\n"
        "try: Worker('model', 'builtins:dict', memory_gb=1).start()\n"
        "except MachineError as error: print(error)"
    )
    told = subprocess.check_output(
        [sys.executable, "-c", code], text=True, env=os.environ | {"TMPDIR": str(long)}
    )
    assert (
        told == "cannot start the process for the model: AF_UNIX path too long; set TMPDIR to a short path\n"
    )


def test_a_model_that_cannot_be_opened_again_is_not_ready(serving: Serving, volume: str) -> None:
    with serving(timeout_s=3.0) as running:
        running.service.segmenter.arguments = ("only one",)
        running.service.segmenter._process.kill()
        assert running.get("ready").json() == {"ready": False}
        assert running.post(records(volume)).status_code == 504
        assert running.get("ping").status_code == 200


def test_the_description_for_machines_names_the_parameters(serving: Serving) -> None:
    with serving() as running:
        described = json.loads(requests.get(f"{running.url}/openapi.json", timeout=5).text)
    body = described["paths"]["/invocations"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["properties"]["params"]["properties"]["anisotropy"]["anyOf"][0]["maximum"] == 1000
