"""Outputs appear whole or not at all."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from nuclei3d import outputs
from nuclei3d.errors import InputError, MachineError
from nuclei3d.outputs import (
    list_written,
    refuse_foreign_folder,
    require_writable,
    whole_file,
    whole_folder,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_only_when_the_body_has_ended(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.ome.tif"
    with whole_file(target) as partial:
        assert partial.name.endswith(".ome.tif")
        partial.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert names(target.parent) == ["a.ome.tif"]


def test_a_failing_body_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def interrupted() -> None:
        with whole_file(target) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    with whole_file(tmp_path / "ours") as partial:
        partial.write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_unwritable_place_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    clear = r"cannot write .*file/below/a\.txt.*choose a place"
    with pytest.raises(InputError, match=clear), whole_file(tmp_path / "file" / "below" / "a.txt"):
        pass
    with pytest.raises(InputError, match="cannot write"), whole_folder(tmp_path / "file" / "out"):
        pass


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(MachineError, match=r"cannot write .*big\.bin"),
        whole_file(tmp_path / "big.bin") as partial,
    ):
        partial.write_bytes(bytes(10**6))
    # numpy reports the same condition by an OSError without a number
    with pytest.raises(MachineError, match="cannot write"), whole_file(tmp_path / "big.npy") as partial:
        np.zeros(10**6).tofile(partial)
    with pytest.raises(MachineError, match="cannot write"), whole_folder(tmp_path / "out") as folder:
        (folder / "big.bin").write_bytes(bytes(10**6))
    assert names(tmp_path) == []


def test_an_error_about_another_file_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "out" / "a.txt"):
        Path("/nowhere/input.tif").read_bytes()
    with pytest.raises(IsADirectoryError), whole_file(tmp_path / "b.txt"):
        raise IsADirectoryError(21, "Is a directory", "/nowhere")


def test_a_folder_takes_the_place_of_the_older_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with whole_folder(target) as partial:
        (partial / "new.txt").write_text("new")
        assert names(target) == ["old.txt"]
    assert names(target) == ["new.txt"]
    assert names(tmp_path) == ["out"]


def test_an_older_folder_that_cannot_be_emptied_hinders_nothing(tmp_path, monkeypatch):
    def stuck(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", "old.tif")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.tif").touch()
    monkeypatch.setattr(shutil, "rmtree", stuck)
    with whole_folder(tmp_path / "out") as partial:
        (partial / "new.tif").touch()
    assert names(tmp_path / "out") == ["new.tif"]


def test_a_failing_body_leaves_the_older_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")

    def failing() -> None:
        with whole_folder(target) as partial:
            (partial / "new.txt").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["out"]


def test_a_folder_that_holds_something_is_kept_where_that_is_asked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out", replace=False) as partial:
        (partial / "a").write_text("")
    with pytest.raises(InputError, match="not empty"), whole_folder(tmp_path / "out", replace=False):
        pass
    assert names(tmp_path / "out") == ["a"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "old.txt").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "far")
    with whole_folder(tmp_path / "out") as folder:
        (folder / "new.txt").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["new.txt"]
    assert len(list(tmp_path.iterdir())) == 2


def test_the_working_directory_and_the_folders_above_are_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (Path("."), tmp_path / "here", tmp_path, Path("..")):
        with pytest.raises(InputError, match="working directory"), whole_folder(path):
            pass
    assert names(tmp_path) == ["here"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from nuclei3d.outputs import whole_file, whole_folder\n"
        "a = whole_file(Path(sys.argv[1])); Path(a.__enter__()).write_text('half')\n"
        "b = whole_folder(Path(sys.argv[2])); (b.__enter__() / 'x').write_text('half')\n"
        "os.kill(os.getpid(), 9)"
    )
    arguments = [str(tmp_path / "a.txt"), str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], env=os.environ, check=False)
    assert killed.returncode == -9
    assert len(names(tmp_path)) == 2
    # also by one that writes something else there
    with whole_file(tmp_path / "b.txt") as partial:
        partial.write_text("whole")
    assert names(tmp_path) == ["b.txt"]


def test_temporary_files_of_a_killed_process_go_at_the_next_start(tmp_path: Path) -> None:
    script = (
        "import os, sys, tempfile\n"
        "from nuclei3d.outputs import own_temporary_folder\n"
        "with own_temporary_folder():\n"
        "    open(tempfile.mkdtemp() + '/volume.tif', 'w').write('voxels')\n"
        "    if sys.argv[1] == 'killed':\n"
        "        os.kill(os.getpid(), 9)\n"
        "    print(len(os.listdir(sys.argv[2])))"
    )
    kept = tmp_path / "nuclei3d-of-the-user"
    kept.mkdir()

    def start(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, how, str(tmp_path)]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)

    assert start("killed").returncode == -9
    assert len(names(tmp_path)) == 2
    ended = start("ended")
    assert ended.stdout == "2\n", ended.stderr
    assert names(tmp_path) == [kept.name]


def test_processes_may_be_started_from_a_temporary_folder_that_ends(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, tempfile\n"
        "from nuclei3d.outputs import own_temporary_folder\n"
        "if __name__ == '__main__':\n"
        "    for _ in range(2):\n"
        "        with own_temporary_folder():\n"
        "            open(tempfile.mkdtemp() + '/volume.tif', 'w').write('voxels')\n"
        "            process = multiprocessing.get_context('forkserver').Process(target=print)\n"
        "            process.start()\n"
        "            process.join()\n"
    )
    # the address of a socket has at most 108 characters, and pytest's folders are long
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TMPDIR": folder}
        command = [sys.executable, str(script)]
        ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert (ended.stdout, ended.stderr) == ("\n\n", "")
        assert names(Path(folder)) == []


def test_where_nothing_can_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    require_writable(tmp_path / "new" / "out")
    require_writable(tmp_path / "file")
    with pytest.raises(InputError, match=r"cannot write .*file/out: .*file is no folder"):
        require_writable(tmp_path / "file" / "out")
    with pytest.raises(InputError, match="cannot be written"):
        require_writable(Path("/proc/self/out"))
    assert names(tmp_path) == ["file"]


@pytest.mark.usefixtures("small_disk")
def test_weights_on_a_full_disk_are_one_clear_line(tmp_path: Path) -> None:
    import torch

    for state in ({"a": torch.zeros(10**6)}, {str(n): torch.zeros(1000) for n in range(100)}):
        with (
            pytest.raises(MachineError, match=r"cannot write .*last\.pt"),
            whole_file(tmp_path / "last.pt") as f,
        ):
            torch.save(state, f)
    assert names(tmp_path) == []


def test_a_living_process_keeps_its_unfinished_file(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a.txt") as first:
        first.write_text("first")
        with whole_file(tmp_path / "a.txt") as second:
            second.write_text("second")
        assert (tmp_path / "a.txt").read_text() == "second"
    assert (tmp_path / "a.txt").read_text() == "first"


def written(folder: Path) -> Path:
    """A folder as a command leaves it."""
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "one.svg").write_text("drawn")
    (folder / "metrics.json").write_text('{"volumes": {}}')
    list_written(folder, digests=True)
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: None, None),
        (lambda out: (out / "figures" / ".DS_Store").touch(), None),
        (lambda out: (out / "compare.json").touch(), None),
        (lambda out: (out / "metrics.json").write_text('{"volumes": {"a": 1}}'), None),
        (lambda out: (out / "figures" / "mine.svg").touch(), r"mine\.svg in it did not come"),
        (lambda out: (out / "figures" / "one.svg").write_text("edited"), r"one\.svg in it was changed"),
        (lambda out: (out / "metrics.json").write_text('{"accuracy": 1}'), "is no evaluation"),
        # of a version that noted nothing
        (lambda out: (out / ".written.json").unlink(), None),
        (lambda out: [(out / ".written.json").unlink(), (out / "mine").mkdir()], "mine in it did not come"),
    ],
)  # fmt: skip
def test_a_folder_is_replaced_only_if_all_in_it_was_written_by_commands(
    tmp_path: Path, change: Callable[[Path], object], words: str | None
) -> None:
    out = written(tmp_path / "out")
    change(out)
    with pytest.raises(InputError, match=words) if words else nullcontext():
        refuse_foreign_folder(out, "evaluation", ("metrics.json", "volumes"), ("figures",), ("compare.json",))


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_whose_replacement_was_killed_half_way_comes_back(tmp_path: Path, there: bool) -> None:
    with whole_folder(tmp_path / "other") as folder:
        (folder / "mark").touch()
    # between its two renamings: the old one has a hidden name, the new one may have the place
    (ended := subprocess.Popen([sys.executable, "-c", ""])).wait()
    hidden = outputs._hidden_name(tmp_path / "out").name.replace("partial", "replaced")
    old = tmp_path / hidden.replace(f"-{os.getpid()}-", f"-{ended.pid}-")
    old.mkdir()
    (old / "old").touch()
    if there:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "new").touch()
    with whole_file(tmp_path / "a.txt") as partial:
        partial.touch()
    assert names(tmp_path) == ["a.txt", "other", "out"]
    assert names(tmp_path / "out") == (["new"] if there else ["old"])
