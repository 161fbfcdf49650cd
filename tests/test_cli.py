"""How commands end: one line on stderr and a code."""

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
