"""dvc.yaml declares every room and every parameter that a stage uses: nothing changes unseen."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import nuclei3d
from nuclei3d.config import Params

PACKAGE = Path(nuclei3d.__file__).parent
PROJECT = PACKAGE.parents[1]
STAGES: dict[str, Any] = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]

# The modules with which a stage begins.
ENTRIES = {
    "prepare": ("stages.prepare",),
    "train": ("stages.train",),
    "assess": ("stages.assess", "stages.predict", "stages.evaluate"),
}
# What cannot change a result: messages, records of it, how processes end, a service elsewhere, and the
# wrappers of every stage.
OUTSIDE = {"console", "errors", "experiment", "client", "worker", "stages.recorded"}


def module_file(name: str) -> Path | None:
    path = PACKAGE.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def imports_of(name: str) -> frozenset[str]:
    """Names of this package's modules that a module imports at run time, wherever in the file."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
        for child in ast.iter_child_nodes(node):
            visit(child)

    file = module_file(name)
    assert file is not None
    visit(ast.parse(file.read_text()))
    ours = {name.removeprefix("nuclei3d.") for name in found if name.startswith("nuclei3d.")}
    return frozenset(name for name in ours if module_file(name))


def modules_used(stage: str) -> set[str]:
    waiting, seen = list(ENTRIES[stage]), set()
    while waiting:
        name = waiting.pop()
        if name not in seen and name not in OUTSIDE and name.partition(".")[0] not in OUTSIDE:
            seen.add(name)
            waiting.extend(imports_of(name))
    return seen


def room_of(module: str) -> str:
    room = PACKAGE / module.partition(".")[0]
    return (room if room.is_dir() else room.with_suffix(".py")).relative_to(PROJECT).as_posix()


@pytest.mark.parametrize("stage", ENTRIES)
def test_every_room_that_a_stage_uses_is_a_dependency_and_no_other(stage: str) -> None:
    declared = {dep for dep in STAGES[stage]["deps"] if dep.startswith("src/")}
    assert {room_of(module) for module in modules_used(stage)} == declared


def test_the_caches_of_python_are_no_dependencies() -> None:
    assert "__pycache__/" in (PROJECT / ".dvcignore").read_text().splitlines()


@pytest.mark.parametrize("stage", ENTRIES)
def test_every_section_that_a_stage_uses_is_declared(stage: str) -> None:
    declared = set(STAGES[stage]["params"])
    sections = set(Params.model_fields) - {"tracking", "serve", "search", "simulate"}
    # training_data serves prepare with the format only, train with the rest
    for module in modules_used(stage) - ({"stages.training_data"} if stage == "prepare" else set()):
        file = module_file(module)
        assert file is not None
        for section in sections - declared:
            used = {
                f"{section}.{name}" for name in re.findall(rf"params\.{section}\.(\w+)", file.read_text())
            }
            assert used <= declared, f"{file} uses {used - declared}: declare that in {stage}"


@pytest.mark.parametrize("stage", ENTRIES)
def test_params_yaml_has_every_section_that_is_declared(stage: str) -> None:
    tree = yaml.safe_load((PROJECT / "params.yaml").read_text())
    named = set(tree) | {
        f"{section}.{key}" for section, keys in tree.items() if isinstance(keys, dict) for key in keys
    }
    missing = set(STAGES[stage]["params"]) - named
    assert missing == set(), "DVC wants these in params.yaml, if only as 'name: {}'"


def test_a_parameter_of_the_training_reaches_only_train_and_what_follows() -> None:
    def concerned(name: str) -> set[str]:
        ways = {name, name.partition(".")[0]}
        return {stage for stage, entry in STAGES.items() if ways & set(entry["params"])}

    assert concerned("train.learning_rate") == {"train"}
    # the kind of network decides what prepare writes
    assert concerned("train.network") == {"prepare", "train"}
    # what a training starts from decides the scale of the planes, and stands beside the model in the report
    assert concerned("train.start_from") == {"prepare", "train", "assess"}
    assert "runs/nuclei_3d" in STAGES["assess"]["deps"]
    assert not any("runs/" in dep for dep in STAGES["prepare"]["deps"])


def test_derived_outputs_are_never_pushed() -> None:
    for stage in STAGES.values():
        for out in (*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])):
            (settings,) = out.values() if isinstance(out, dict) else ({},)
            assert settings.get("push") is False or settings.get("cache") is False, out


@pytest.mark.skipif(not (PROJECT / ".dvc").is_dir(), reason="not a checkout of the project")
def test_dvc_sees_each_file_that_says_what_it_tracks() -> None:
    """What it does not see (a pattern of .gitignore may hide it) `dvc checkout` deletes."""
    from dvc.repo import Repo

    tracked = {path for path in PROJECT.glob("**/*.dvc") if path.is_file() and ".venv" not in path.parts}
    assert tracked
    with Repo(PROJECT) as repo:
        seen = {Path(stage.path) for stage in repo.index.stages}
    assert tracked <= seen


@pytest.mark.slow(reason="prepares the sample in a fresh clone")
@pytest.mark.skipif(not (PROJECT / ".dvc").is_dir(), reason="not a checkout of the project")
def test_the_released_model_outlives_every_command_of_dvc_in_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(clone / "src"), "OMP_NUM_THREADS": "1"}
    # the store of this test's own: the clone's
    environment = {name: value for name, value in environment.items() if not name.startswith("MLFLOW_")}

    def call(*words: str) -> str:
        done = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    subprocess.run(["git", "clone", "-q", str(PROJECT), str(clone)], check=True)
    tracked = ("data.dvc", "models/nuclei_3d.dvc")
    weights = clone / "models" / "nuclei_3d" / "nuclei_3d"
    call("dvc", "pull", *tracked)
    before = weights.read_bytes()
    for command in (
        ("checkout", *tracked),
        ("exp", "run", "-S", "train.epochs=2", "prepare"),
        ("gc", "--workspace", "--force"),
        ("push", *tracked),
    ):
        call("dvc", *command)
        assert weights.read_bytes() == before, command
    assert "up to date" in call("dvc", "status", *tracked)
