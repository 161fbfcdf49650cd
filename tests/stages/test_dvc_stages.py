"""dvc.yaml declares every module and every parameter that a stage uses: nothing changes unseen."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import nuclei3d
from nuclei3d.config import Params

PACKAGE = Path(nuclei3d.__file__).parent
PROJECT = PACKAGE.parents[1]

# The modules with which a stage begins.
ENTRIES = {
    "prepare": ("stages.prepare",),
    "train": ("stages.train",),
    "evaluate": ("stages.assess", "stages.predict", "stages.evaluate"),
}
# What cannot change a result: messages, records of it, and how texts become parameters (their values are
# declared as such).
OUTSIDE = (
    "console",
    "errors",
    "tracking",
    "serving",
    "stages.tracked",
    "stages.register",
    "config.loading",
    "config.params",
    "config.section",
)


def module_file(name: str) -> Path | None:
    path = PACKAGE.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def imports_of(file: Path) -> frozenset[str]:
    """Names of this package's modules that a file imports at run time, wherever in the file."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found.update(
            name.removeprefix("nuclei3d.") for name in names if name.startswith("nuclei3d.") and "." in name
        )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return frozenset(name for name in found if module_file(name))


def outside(name: str) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in OUTSIDE)


def modules_used(stage: str, sections: set[str]) -> set[str]:
    waiting, seen = list(ENTRIES[stage]), set()
    while waiting:
        name = waiting.pop()
        if name in seen or outside(name):
            continue
        seen.add(name)
        file = module_file(name)
        assert file is not None
        waiting.extend(imports_of(file))
    files = {file.relative_to(PROJECT).as_posix() for name in seen if (file := module_file(name))}
    # The package of all parameters names every section; those count that the stage declares.
    config = {f"src/nuclei3d/config/{section}.py" for section in sections}
    return {file for file in files if not file.endswith("__init__.py") and "/config/" not in file} | {
        file for file in config if (PROJECT / file).is_file()
    }


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((PROJECT / "dvc.yaml").read_text())
    return dict(tree["stages"])


@pytest.mark.parametrize("stage", ENTRIES)
def test_every_module_that_a_stage_uses_is_a_dependency(stages: dict[str, Any], stage: str) -> None:
    sections = {name.partition(".")[0] for name in stages[stage]["params"]}
    declared = {dep for dep in stages[stage]["deps"] if dep.startswith("src/")}
    used = modules_used(stage, sections)
    assert used - declared == set(), (
        "add these to the deps in dvc.yaml: python tests/stages/test_dvc_stages.py does it"
    )
    assert declared - used == set(), "these are no longer used: remove them from dvc.yaml"


@pytest.mark.parametrize("stage", ENTRIES)
def test_every_section_that_a_stage_uses_is_declared(stages: dict[str, Any], stage: str) -> None:
    declared = set(stages[stage]["params"])
    sections = set(Params.model_fields) - {"tracking", "serve", "search", "simulate"}
    for file in modules_used(stage, set()):
        source = (PROJECT / file).read_text()
        for section in sections - declared:
            used = {f"{section}.{name}" for name in re.findall(rf"params\.{section}\.(\w+)", source)}
            assert used <= declared, f"{file} uses {used - declared}: declare that in {stage}"


@pytest.mark.parametrize("stage", ENTRIES)
def test_params_yaml_has_every_section_that_is_declared(stages: dict[str, Any], stage: str) -> None:
    tree = yaml.safe_load((PROJECT / "params.yaml").read_text())
    named = set(tree) | {
        f"{section}.{key}" for section, keys in tree.items() if isinstance(keys, dict) for key in keys
    }
    missing = set(stages[stage]["params"]) - named
    assert missing == set(), "DVC wants these in params.yaml, if only as 'name: {}'"


def test_a_parameter_of_the_training_reaches_only_train_and_what_follows(stages: dict[str, Any]) -> None:
    def concerned(name: str) -> set[str]:
        ways = {name, name.partition(".")[0]}
        return {stage for stage, entry in stages.items() if ways & set(entry["params"])}

    assert concerned("train.learning_rate") == {"train"}
    # the kind of network decides what prepare writes
    assert concerned("train.network") == {"prepare", "train"}
    assert "runs/nuclei_3d" in stages["evaluate"]["deps"]
    assert not any("runs/" in dep for dep in stages["prepare"]["deps"])


def test_derived_outputs_are_never_pushed(stages: dict[str, Any]) -> None:
    for stage in stages.values():
        for out in (*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])):
            (settings,) = out.values() if isinstance(out, dict) else ({},)
            assert settings.get("push") is False or settings.get("cache") is False, out


def rewrite() -> None:
    """Write the modules that each stage uses into dvc.yaml: `python tests/stages/test_dvc_stages.py`."""
    file = PROJECT / "dvc.yaml"
    declared = yaml.safe_load(file.read_text())["stages"]
    lines: list[str] = []
    stage, written = "", False
    for line in file.read_text().splitlines():
        if line.startswith("  ") and line.strip().removesuffix(":") in ENTRIES and not line.startswith("   "):
            stage, written = line.strip().removesuffix(":"), False
        if not line.startswith("      - src/"):
            lines.append(line)
        elif not written:
            sections = {name.partition(".")[0] for name in declared[stage]["params"]}
            lines += [f"      - {module}" for module in sorted(modules_used(stage, sections))]
            written = True
    file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    rewrite()
