"""What commands pass on, and how they end: one line on stderr and a code."""

import signal
import subprocess
import sys
from importlib import import_module
from inspect import Parameter, signature

import pytest

from nuclei3d import cli
from nuclei3d.errors import InputError, MachineError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            InputError("embryo.tif is no volume; give a 3D stack"),
            2,
            "embryo.tif is no volume; give a 3D stack",
        ),
        (MachineError("cannot write out: no space left"), 1, "cannot write out: no space left"),
        (
            PermissionError(13, "Permission denied", "film/zarr.json"),
            2,
            "film/zarr.json: permission denied; change that, or choose another place",
        ),
        (KeyboardInterrupt(), 130, "stopped; what was finished is kept"),
    ],
)
def test_a_command_that_cannot_go_on_says_so_in_one_line(monkeypatch, capsys, error, code, line):
    def fails() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert capsys.readouterr().err == f"nuclei3d: {line}\n"


WAITS = """
import signal, sys, time
# a shell starts what runs in the background deaf to it
signal.signal(signal.SIGINT, signal.default_int_handler)
from nuclei3d import cli
import nuclei3d.stages.compare as stage
def wait(*_, **__):
    try:
        print("ready", flush=True)
        time.sleep(600)
    except KeyboardInterrupt as error:
        raise {raised}
stage.compare = wait
sys.argv = ["nuclei3d", "compare", ".", "."]
cli.main()
"""


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        ("", "stopped; what was finished is kept"),
        ("KeyboardInterrupt('3 of 5 frames are done')", "stopped; 3 of 5 frames are done"),
        # what an interrupted import of a compiled module can look like
        ("ImportError('numpy.core failed')", "stopped; what was finished is kept"),
    ],
)
def test_ctrl_c_says_what_is_kept(tmp_path, raised, line):
    with subprocess.Popen(
        [sys.executable, "-c", WAITS.format(raised=raised)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == f"nuclei3d: {line}\n"


def test_ctrl_c_while_the_command_line_is_imported_is_one_line(tmp_path):
    code = (
        "import sys\n"
        "class Stops:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer':\n            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stops())\n"
        "from nuclei3d.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "nuclei3d: stopped before it began\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("predict nowhere --model m --out o", "nowhere does not exist"),
        ("prepare --data nowhere --out o", "nowhere does not exist (--data)"),
        ("train --slices nowhere --out o", "nowhere does not exist (--slices)"),
        ("evaluate --truth . --pred nowhere --out o", "nowhere does not exist (--pred)"),
        ("compare nowhere .", "nowhere does not exist"),
        ("train --slices . --out notes.txt", "notes.txt is a file; give another folder with --out"),
        (
            "predict . --model m --out /proc/self/out",
            "cannot write /proc/self/out: /proc/self cannot be written; choose a place that can be written",
        ),
        (
            "predict . --model m --out o --set normalization.noise_floor=5",
            "--set normalization.noise_floor=5 would not act: predict normalises as the model was trained; "
            "set it for prepare and train anew",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_large_is_imported(tmp_path, arguments, line):
    code = (
        "import sys\n"
        "from nuclei3d import cli\n"
        f"sys.argv = ['nuclei3d', *{arguments.split()!r}]\n"
        "try:\n    cli.main()\n"
        "finally:\n    print(sorted({'torch', 'mlflow', 'numpy', 'scipy'} & set(sys.modules)))\n"
    )
    (notes := tmp_path / "notes.txt").touch()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr, done.stdout) == (2, f"nuclei3d: {line}\n", "[]\n")
    assert list(tmp_path.iterdir()) == [notes]


@pytest.mark.parametrize(
    ("stage", "names"),
    [c.callback.passes for c in cli.app.registered_commands if hasattr(c.callback, "passes")],
)
def test_a_command_passes_on_what_its_stage_takes(stage, names):
    module, _, function = stage.partition(":")
    taken = dict(signature(getattr(import_module(f"nuclei3d.{module}"), function)).parameters)
    if any(each.kind is Parameter.VAR_KEYWORD for each in taken.values()):
        name = function.removeprefix("record_")
        taken |= signature(getattr(import_module(f"nuclei3d.stages.{name}"), name)).parameters
    assert names <= set(taken)
    needed = {name for name, each in taken.items() if each.default is each.empty}
    assert needed <= {*names, "params", "options"}
