"""Whether the service can be hurt: clients of all kinds at once, and its workers killed meanwhile.

    python benchmarks/soak.py --json
    python benchmarks/soak.py --clients 50 --seconds 120 --kill-every 10

Clients send valid, wrong, hostile, slow and abandoned requests. Passed: no wrong mask, right statuses,
/ping always answered, afterwards as many open files, as little memory and as few temporary files as before.
"""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests
import tifffile

from nuclei3d.config.sections import PredictParams
from nuclei3d.console import say
from nuclei3d.segmentation.segmenter import Segmenter
from serving import VOXEL_SIZE_UM, running_service, volume_of
from shared import new_parser

BUSY = 503
HEAD = "POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
NOT_KEPT_MB = 60
"""By how much the receiving process may have grown: what the interpreter keeps."""


def body_of(tiff: bytes, **params: object) -> bytes:
    volume = base64.b64encode(tiff).decode()
    return json.dumps({"params": params, "dataframe_records": [{"volume": volume}]}).encode()


def tiff_of(image: np.ndarray[Any, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, image, **options)
    return file.getvalue()


def strange_ome(inside: str, count: int = 6) -> bytes:
    """Give an OME-TIFF with a description of ours."""
    sizes = 'SizeX="48" SizeY="48" SizeZ="6" SizeC="1" SizeT="1"'
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'UUID="urn:uuid:1"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" '
        f'{sizes}><TiffData IFD="0" PlaneCount="{count}">{inside}</TiffData></Pixels></Image></OME>'
    )
    return tiff_of(np.zeros((6, 48, 48), np.uint16), description=xml, metadata=None)


def many_pages(count: int) -> bytes:
    """Give a TIFF of pages of one pixel."""
    entries = [(256, 4, 1), (257, 4, 1), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 4, 1), (279, 4, 1)]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    size = len(directory) + 4
    starts = [16 + number * size for number in range(1, count)] + [0]
    return (
        b"II*\0"
        + struct.pack("<I", 16)
        + bytes(8)
        + b"".join(directory + struct.pack("<I", s) for s in starts)
    )


def bad_requests(good: bytes, tiff: bytes) -> dict[str, tuple[bytes, int]]:
    """Name requests that must be refused, each with its status."""
    other = '<a-b:UUID xmlns:a-b="x" FileName="../secret.tif">urn:uuid:2</a-b:UUID>'
    damaged = bytearray(tiff)
    damaged[len(damaged) // 2 :] = b""
    return {
        "misspelt": (body_of(tiff, cellprob_treshold=1.0), 400),
        "nonsense": (good[: len(good) // 2], 400),
        "no tiff": (body_of(b"hello"), 400),
        "cut": (body_of(bytes(damaged)), 400),
        "names another file": (body_of(strange_ome(other)), 400),
        "a pipe": (b'{"dataframe_records":[{"path":"pipe.tif"}]}', 400),
        "control characters": (b'{"dataframe_records":[{"path":"\\u001b[2J"}]}', 400),
        "3e8 planes": (body_of(strange_ome("", 300_000_000)), 413),
        "pages": (body_of(many_pages(50_000)), 413),
        "stretched": (body_of(tiff, voxel_size_um=[1000, 0.5, 0.5]), 413),
        "brackets": (b'{"params":{"views":[' + b"[]," * 2_000_000 + b"[]]}}", 413),
        "too long": (b" " * 11_000_000, 413),
        "gap": (body_of(tiff, stitch_max_gap=10**12), 400),
    }


class Crowd:
    """Clients that send what they like until a time is over, and what they saw."""

    def __init__(self, url: str, valid: list[tuple[bytes, Any]], bad: dict[str, tuple[bytes, int]]) -> None:
        self.url, self.valid, self.bad = url, valid, bad
        self.answers: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()

    def post(self, kind: str, body: bytes, right: set[int]) -> requests.Response | None:
        """Send a request whose answer must have one of these statuses, unless the service is busy."""
        headers = {"Content-Type": "application/json"}
        try:
            response = requests.post(f"{self.url}/invocations", data=body, headers=headers, timeout=900)
        except requests.RequestException as error:
            self.wrong[f"{kind}: {type(error).__name__}"] += 1
            return None
        self.answers[f"{kind} {response.status_code}"] += 1
        if response.status_code == BUSY and "Retry-After" in response.headers:
            # overload, rightly told, is no fault
            time.sleep(float(response.headers["Retry-After"]))
        elif response.status_code not in right:
            self.wrong[f"{kind}: {response.status_code} {response.text[:100]}"] += 1
        return response

    def ask_well(self, rng: np.random.Generator) -> None:
        """Send a valid request and look at the masks."""
        body, expected = self.valid[rng.integers(len(self.valid))]
        # 422: the process was killed twice while it worked on it
        response = self.post("valid", body, {200, 422})
        if response is not None and response.status_code == 200:
            content = base64.b64decode(response.json()["predictions"][0]["labels"])
            if not np.array_equal(tifffile.imread(io.BytesIO(content)), expected):
                self.wrong["wrong mask"] += 1

    def ask_badly(self, rng: np.random.Generator) -> None:
        """Send one of those that must be refused."""
        kind = str(rng.choice(list(self.bad)))
        body, status = self.bad[kind]
        self.post(kind, body, {status})

    def leave(self, rng: np.random.Generator) -> None:
        """Send a request, or half of one and slowly, and hang up."""
        body = self.valid[0][0]
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as line:
            line.sendall(f"{HEAD}{len(body)}\r\n\r\n".encode())
            if rng.random() < 0.5:
                line.sendall(body)
                time.sleep(float(rng.uniform(0, 3)))
            else:
                for at in range(20):
                    line.sendall(body[at : at + 1])
                    time.sleep(0.2)
        self.answers["left"] += 1

    def client(self, number: int, end: float) -> None:
        """Do one thing after another until a time."""
        rng = np.random.default_rng(number)
        deeds: list[Callable[[np.random.Generator], None]] = [self.ask_well, self.ask_badly, self.leave]
        while time.monotonic() < end:
            deed = deeds[rng.choice(3, p=[0.75, 0.23, 0.02])]
            try:
                deed(rng)
            except OSError as error:
                self.wrong[f"{deed.__name__}: {type(error).__name__}"] += 1


def measure(process: psutil.Process, folder: Path) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(OSError):
            kinds[os.readlink(entry).partition(":")[0]] += 1
    return {
        "kinds_of_open_files": dict(kinds),
        "open_files": process.num_fds(),
        "rss_mb": round(process.memory_info().rss / 1e6, 1),
        "temporary_files": sum(1 for item in folder.rglob("*") if item.is_file() and item.name != ".lock"),
    }


def soak_service(
    model: Path, clients: int, seconds: float, kill_every_s: float, folder: Path
) -> dict[str, Any]:
    """Let the crowd in; give what was seen, and what was wrong."""
    # small, so that hundreds are answered though processes are killed all the time
    images = [volume_of((4, 40, 40), seed) for seed in range(12)]
    sizes = {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", VOXEL_SIZE_UM, strict=True)}
    options = {"ome": True, "metadata": {"axes": "ZYX", **sizes}}
    tiffs = [tiff_of(image, **options) for image in images]
    valid = [
        (body_of(tiff, views=views), local.segment(image, VOXEL_SIZE_UM).labels)
        for views in (["xy"], ["xy", "xz", "yz"])
        for local in [Segmenter(model, PredictParams(views=tuple(views)))]
        for tiff, image in zip(tiffs, images, strict=True)
    ]
    nuclei = [int(labels.max()) for _, labels in valid]
    os.environ["TMPDIR"] = str(folder / "tmp")
    (folder / "tmp").mkdir()
    os.mkfifo(folder / "pipe.tif")
    slowest_ping = peak_mb = 0.0
    kills = 0
    settings = {"queue": 8, "root": folder, "max_body_mb": 10, "memory_gb": 4}
    settings["max_network_voxels"] = 3_000_000
    with running_service(model, **settings) as (remote, process):
        crowd = Crowd(remote.url, valid, bad_requests(valid[0][0], tiffs[0]))
        crowd.ask_well(np.random.default_rng(0))
        before = measure(process, folder / "tmp")
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=crowd.client, args=(n, end), daemon=True) for n in range(clients)]
        for thread in threads:
            thread.start()
        killing, rng = time.monotonic() + kill_every_s, np.random.default_rng(1)
        while any(thread.is_alive() for thread in threads):
            start = time.monotonic()
            try:
                requests.get(f"{remote.url}/ping", timeout=60).raise_for_status()
            except requests.RequestException as error:
                crowd.wrong[f"ping: {type(error).__name__}"] += 1
            slowest_ping = max(slowest_ping, time.monotonic() - start)
            everyone = [process, *process.children(recursive=True)]
            # no more kills once the clients only wait for their last answers
            if killing < time.monotonic() < end:
                workers = [each for child in process.children() for each in child.children()]
                if workers:
                    workers[rng.integers(len(workers))].kill()
                    kills += 1
                killing = time.monotonic() + kill_every_s
            total = 0
            for each in everyone:
                try:
                    total += each.memory_info().rss
                except psutil.Error:
                    continue
            peak_mb = max(peak_mb, total / 1e6)
            time.sleep(0.2)
        for _ in range(100):
            if requests.get(f"{remote.url}/ready", timeout=60).status_code == 200:
                break
            time.sleep(0.2)
        crowd.ask_well(np.random.default_rng(0))
        time.sleep(6)  # connections that are kept alive
        after = measure(process, folder / "tmp")
    if after["open_files"] > before["open_files"] + 4:
        crowd.wrong["open files grew"] += 1
    if after["rss_mb"] > before["rss_mb"] + NOT_KEPT_MB:
        crowd.wrong["memory grew"] += 1
    if after["temporary_files"]:
        crowd.wrong["temporary files were left"] += 1
    return {
        "clients": clients,
        "seconds": seconds,
        "kills": kills,
        "nuclei": nuclei,
        "different_masks": len({labels.tobytes() for _, labels in valid}),
        "answers": dict(sorted(crowd.answers.items())),
        "wrong": dict(crowd.wrong),
        "slowest_ping_s": round(slowest_ping, 3),
        "peak_of_all_processes_mb": round(peak_mb),
        "before": before,
        "after": after,
        "passed": not crowd.wrong,
    }


def main() -> None:
    parser = new_parser(__doc__, whole=True)
    parser.add_argument("--model", type=Path, default=Path("models/nuclei_3d"), help="model folder")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--kill-every", type=float, default=10.0, help="seconds between kills of a worker")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak_service(
            arguments.model, arguments.clients, arguments.seconds, arguments.kill_every, Path(folder)
        )
    say(str(found))
    if arguments.json:
        print(json.dumps({"service": found}, indent=2))


if __name__ == "__main__":
    main()
