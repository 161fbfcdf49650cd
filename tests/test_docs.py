"""The commands of the README and of docs/ are real: all parse, those of the README's bash blocks run."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from nuclei3d.cli import app
from nuclei3d.config import load_params
from nuclei3d.stages.simulate import simulate
from pages_fixture import BLOCK, ROOT, environment

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path, kinds: tuple[str, ...] = ("bash", "sh")) -> list[str]:
    lines: list[str] = []
    for kind, body in BLOCK.findall(page.read_text()):
        if kind in kinds:
            lines += body.replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def nuclei3d_commands() -> list[tuple[str, str]]:
    return [
        (page.name, command)
        for page in PAGES
        for command in commands(page)
        if command.startswith("nuclei3d ")
    ]


@pytest.mark.parametrize(("page", "command"), nuclei3d_commands())
def test_a_documented_command_parses(page: str, command: str) -> None:
    name, *arguments = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    with group.make_context("nuclei3d", [name, *arguments]) as context:
        _, subcommand, rest = group.resolve_command(context, [name, *arguments])
        subcommand.make_context(name, list(rest), parent=context)


def test_the_parameter_names_of_the_docs_exist() -> None:
    named = [
        match
        for page in PAGES
        for match in re.findall(r"--set ([a-z0-9_.]+=[^\s`]+)", page.read_text())
        if "NUMBER" not in match and "section" not in match
    ]
    load_params(None, named)


def test_the_sample_parameters_are_valid() -> None:
    for path in (ROOT / "params.yaml", ROOT / "benchmarks" / "bbbc050.yaml"):
        load_params(path)


@pytest.mark.slow  # runs the whole job of the README twice on tiny embryos: about a minute on two quiet cores
def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    tiny = load_params(None, ["simulate.frames=1", "simulate.shape=[12,64,64]", "simulate.nuclei=10"])
    simulate(tiny, tmp_path / "data")
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree["train"].update(epochs=1, crops_per_epoch=16, validation_crops=8)
    tree["evaluate"] = {"bootstrap": 50}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    for command in commands(ROOT / "README.md", ("bash",)):
        if command.startswith("make "):
            continue  # .ci/run calls these
        arguments = shlex.split(command)
        assert arguments[0] == "nuclei3d"
        if arguments[1] == "register":
            arguments.append("--force")  # a model of 16 crops does not beat the naive baseline
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (tmp_path / "runs" / "evaluation" / "report.html").stat().st_size > 10_000
    # the lines of Python, with the model that was trained in the place of the released one
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    shutil.copytree(tmp_path / "runs" / "nuclei_3d", tmp_path / "models" / "nuclei_3d")
    code = code.replace("t000.tif", next((tmp_path / "data/embryo_c/images").glob("*.tif")).name)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert " nuclei" in done.stdout
