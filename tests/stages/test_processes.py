"""Processes that help with a stage end with it, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nuclei3d.console import warned
from nuclei3d.errors import MachineError
from nuclei3d.stages import map_in_processes


def wait_for(found: bool, folder: Path, count: int) -> None:
    """Wait until so many workers wrote their ids, and are there or gone."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        ids = [int(file.name) for file in folder.iterdir()]
        if len(ids) == count and all(psutil.pid_exists(number) == found for number in ids):
            return
        time.sleep(0.1)
    raise AssertionError(f"workers {'did not start' if found else 'outlive their parent'}")


WORK = """
import os, sys, time
from pathlib import Path
def note_and_wait(folder, seconds):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(seconds)
    if seconds < 0.5:
        os.kill(os.getpid(), 9)
def find_odd(number):
    from nuclei3d.console import warn
    warn("one is odd")
    return number
"""
PARENT = """
import signal, sys
# a shell starts what runs in the background deaf to it
signal.signal(signal.SIGINT, signal.default_int_handler)
from noting import note_and_wait
from nuclei3d.stages import map_in_processes
if __name__ == "__main__":
    map_in_processes("prepare", note_and_wait, [sys.argv[1]] * 2, [600, 600], workers=2)
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "noting.py").write_text(WORK)
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "ids").mkdir()
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(work: Path, how: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, str(work / "parent.py"), str(work / "ids")], stderr=subprocess.PIPE, text=True
    )
    wait_for(True, work / "ids", 2)
    parent.send_signal(how)
    wait_for(False, work / "ids", 2)
    _, words = parent.communicate(timeout=60)
    assert words.count("Traceback") <= 1, "the workers say nothing of their own"


def test_a_worker_that_is_killed_is_a_fault_of_the_machine(work: Path) -> None:
    from noting import note_and_wait

    with pytest.raises(MachineError, match="prepare: one of 2 processes was killed"):
        map_in_processes("prepare", note_and_wait, [str(work / "ids")] * 2, [0.1, 600], workers=2)
    wait_for(False, work / "ids", len(list((work / "ids").iterdir())))


@pytest.mark.parametrize("workers", [1, 2])
def test_warnings_of_workers_are_said_once(
    workers: int, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from noting import find_odd

    assert map_in_processes("check", find_odd, [1, 2, 3], workers=workers) == [1, 2, 3]
    assert capfd.readouterr().err.count("one is odd") == 1
    assert list(warned) == ["one is odd"]
