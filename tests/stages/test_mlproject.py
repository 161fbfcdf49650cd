"""Each entry point of MLproject gives a command line that exists, whatever values its parameters have."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import nuclei3d
from nuclei3d.cli import app
from nuclei3d.config import load_params

PROJECT = Path(nuclei3d.__file__).parents[2]
ENTRIES: dict[str, Any] = yaml.safe_load((PROJECT / "MLproject").read_text())["entry_points"]


def command_line(entry: str, folder: Path, **given: str) -> list[str]:
    """What the shell command of an entry point would call, found by a stand-in for python."""
    stand_in = folder / "python"
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    stand_in.write_text(f'#!/bin/sh\nexec {sys.executable} -S -c {shlex.quote(code)} "$@"\n')
    stand_in.chmod(0o755)
    defaults = {name: str(spec["default"]) for name, spec in ENTRIES[entry]["parameters"].items()}
    # As mlflow.projects does it: values are quoted, then put into the text.
    values = {name: shlex.quote(value) for name, value in (defaults | given).items()}
    command = ENTRIES[entry]["command"].format(**values)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, check=True
    )
    arguments: list[str] = yaml.safe_load(done.stdout)
    assert arguments[:2] == ["-m", "nuclei3d"]
    return arguments[2:]


def parse(arguments: list[str]) -> dict[str, Any]:
    """What the command line makes of its arguments; it exits where it does not know one."""
    group = typer.main.get_command(app)
    with group.make_context("nuclei3d", list(arguments)) as context:
        _, subcommand, rest = group.resolve_command(context, list(arguments))
        return subcommand.make_context(arguments[0], list(rest), parent=context).params


def test_every_command_that_needs_no_screen_is_an_entry_point() -> None:
    commands = set(typer.main.get_command(app).commands) - {"view", "correct", "params"}
    assert commands == {"run" if entry == "main" else entry for entry in ENTRIES}


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_point_runs_with_its_defaults(entry: str, tmp_path: Path) -> None:
    arguments = command_line(entry, tmp_path)
    assert arguments[0] == {"main": "run"}.get(entry, entry)
    given = parse(arguments)
    assert not given["overrides"]
    assert given["params"] is None
    assert "" not in given.values()


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_parameter_reaches_the_command_line(entry: str, tmp_path: Path) -> None:
    # Values that are legal in every place: numbers, and for the overrides, an override.
    given = {name: str(11 + number) for number, name in enumerate(ENTRIES[entry]["parameters"])}
    given["set"] = "train.epochs=7"
    parsed = parse(command_line(entry, tmp_path, **given))
    for name, value in given.items():
        if name in ("force", "apply", "same_numbers", "track", "overwrite"):
            assert parsed[name] is True
        else:
            assert value in str(parsed), name


def test_overrides_may_hold_lists_and_several_of_them(tmp_path: Path) -> None:
    text = "data.voxel_size_um=[2.0, 0.35, 0.35] seed=3 predict.mode=stitch"
    parsed = parse(command_line("main", tmp_path, set=text))
    assert parsed["overrides"] == ["data.voxel_size_um=[2.0, 0.35, 0.35]", "seed=3", "predict.mode=stitch"]
    parsed = parse(command_line("export", tmp_path, format="cellpose bioimageio"))
    assert parsed["formats"] == ["cellpose", "bioimageio"]


def test_the_shell_takes_values_as_they_are(tmp_path: Path) -> None:
    parsed = parse(command_line("main", tmp_path, data="my data; touch x", out="$HOME/*"))
    assert (parsed["data"], parsed["out"]) == (Path("my data; touch x"), Path("$HOME/*"))


def documented_runs() -> list[tuple[str, str]]:
    pages = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
    found = [
        (page.name, line.split(" #")[0].strip())
        for page in pages
        for line in re.findall(r"`?(mlflow run \.[^`\n]*)", page.read_text())
    ]
    return [(page, line) for page, line in found if "<" not in line]


@pytest.mark.parametrize(("page", "line"), documented_runs())
def test_a_documented_run_gives_a_command_line_that_exists(page: str, line: str, tmp_path: Path) -> None:
    entry, given = "main", {}
    words = iter(shlex.split(line)[3:])
    for word in words:
        value = next(words)
        if word == "-e":
            entry = value
        elif word == "-P":
            name, _, given_value = value.partition("=")
            assert name in ENTRIES[entry]["parameters"], f"{page}: {line}"
            given[name] = given_value
        else:
            assert (word, value) == ("--env-manager", "local"), f"{page}: {line}"
    load_params(None, parse(command_line(entry, tmp_path, **given))["overrides"] or ())


def test_the_3d_network_for_a_cpu_reaches_the_parameters(tmp_path: Path) -> None:
    (line,) = [line for page, line in documented_runs() if "profile=small" in line]
    given = dict(word.split("=", 1) for word in shlex.split(line) if "=" in word)
    params = load_params(None, parse(command_line("main", tmp_path, **given))["overrides"])
    assert (params.train.network, params.train.full3d.profile) == ("full3d", "small")
    assert params.train.batch_size == 2
