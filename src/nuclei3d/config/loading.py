"""Reading params.yaml and ``--set section.key=value`` into validated parameters, and writing values back."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from nuclei3d.config.sections import Params
from nuclei3d.errors import InputError, closest, hint_at, reason_of
from nuclei3d.outputs import whole_file


def load_params(path: Path | None, overrides: Iterable[str] = ()) -> Params:
    """Load parameters from a YAML file (None: the defaults, the recipe's), apply overrides, validate.

    Overrides are texts such as ``train.epochs=5``; the value is read as YAML.
    """
    tree = _read_yaml(path) if path is not None else {}
    changed = [_apply_override(tree, override) for override in overrides]
    return validate_params(tree, str(path) if path is not None else "the defaults", changed)


def validate_params(tree: Mapping[str, Any], source: str, changed: Sequence[str] = ()) -> Params:
    """Validate a nested mapping; `source` is named in the error, or --set for the names that it `changed`."""
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        raise InputError("; ".join(_explain(error, source, changed))) from None


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give nested parameters under dotted names, such as ``train.augment.flips``."""
    flattened: dict[str, Any] = {}
    for name, value in tree.items():
        flattened |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        )
    return flattened


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the parameter file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {reason_of(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold sections such as 'train:', found a {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> str:
    """Put one override into the tree, and give its dotted name."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set wants section.key=value, got '{override}'")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {name}: cannot read the value '{text}'") from None
    if isinstance(value, str):
        value = _number_or_text(value)
    try:
        set_dotted(tree, name.strip(), value)
    except TypeError as error:
        raise InputError(f"--set {name}: '{error}' is a value, not a section") from None
    return name.strip()


def set_dotted(tree: MutableMapping[str, Any], name: str, value: object) -> None:
    """Set a value in nested mappings by its dotted name; TypeError names a part that is no mapping."""
    *sections, key = name.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, MutableMapping):
            raise TypeError(section)
    tree[key] = value


def _number_or_text(text: str) -> float | str:
    """Read 1e-5, which YAML takes for text, as a number."""
    try:
        return float(text)
    except ValueError:
        return text


def _explain(error: ValidationError, source: str, changed: Sequence[str]) -> list[str]:
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        # the rule of a section concerns whatever was changed in it
        concerned = [
            each for each in changed if f"{name}.".startswith(f"{each}.") or f"{each}.".startswith(f"{name}.")
        ]
        origin = "--set" if concerned else source
        if problem["type"] == "extra_forbidden":
            known = _known_names(problem["loc"][:-1])
            *sections, wrong = map(str, problem["loc"])
            # on the command line names are dotted
            prefix = "".join(f"{section}." for section in sections) if concerned else ""
            hint = hint_at(wrong, known, prefix)
            lines.append(f"{origin}: unknown parameter '{name}'; {hint}")
        else:
            reason = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{origin}: parameter '{name}' is {problem['input']!r}: {reason}{_mend(problem)}")
    return lines


def _mend(problem: ErrorDetails) -> str:
    """Say what may have been meant by a text that is no value of its parameter; nothing if unknown."""
    text = problem["input"]
    if not isinstance(text, str):
        return ""
    if text.lower() == "none" and _may_be_null(problem["loc"]):
        return "; write null for none"
    if problem["type"] == "tuple_type":
        return f"; write it in brackets: [{text.strip('()')}]"
    if problem["type"] == "literal_error":
        meant = closest(text, re.findall("'([^']*)'", problem["ctx"]["expected"]))
        return "" if meant is None else f"; did you mean '{meant}'?"
    return ""


def _may_be_null(location: tuple[int | str, ...]) -> bool:
    section: Any = Params
    for part in location:
        section = section.model_fields[str(part)].annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            break
    return type(None) in get_args(section)


def _known_names(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Params
    for part in location:
        field = section.model_fields.get(str(part))
        # the key of a mapping, such as a parameter's name in search.more, is no field; its section stays
        section = _section_within(field.annotation) if field is not None else section
    return sorted(section.model_fields)


def _section_within(annotation: Any) -> type[BaseModel]:
    """Find the section in an annotation such as ``Range | None`` or ``Mapping[str, Range]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        if inner is not type(None) and inner is not str:
            return _section_within(inner)
    return Params


def write_values(path: Path, values: Mapping[str, bool | int | float | str | None]) -> None:
    """Set values in a parameter file by dotted names; comments and order stay.

    The file is replaced as a whole, and only if it then reads as the old one with these values.
    """
    load_params(path)
    path = path.resolve()
    text = path.read_text(encoding="utf-8")
    editor = YAML()
    editor.width = 4096
    editor.representer.add_representer(float, _represent_float)
    tree, expected = editor.load(text), _unshared(yaml.safe_load(text) or {})
    edited = {} if tree is None else tree
    for name, value in values.items():
        for each in (edited, expected):
            set_dotted(each, name, value)
    out = io.StringIO(text if tree is None else "")
    out.seek(0, io.SEEK_END)
    editor.dump(edited, out)
    if yaml.safe_load(out.getvalue()) != expected:
        raise InputError(
            f"{path} is written in a way that cannot be edited safely (anchors?); write the values yourself: "
            f"{json.dumps(dict(values))}"
        )
    with whole_file(path) as new:
        new.write_text(out.getvalue(), encoding="utf-8")
        new.chmod(path.stat().st_mode & 0o777)


def _represent_float(representer: RoundTripRepresenter, value: float) -> ScalarNode:
    """Write 1e-05 as 1.0e-05: PyYAML takes the former for text."""
    mantissa, exponent, power = repr(value).partition("e")
    dotted = f"{mantissa}.0" if exponent and "." not in mantissa else mantissa
    return representer.represent_scalar("tag:yaml.org,2002:float", f"{dotted}{exponent}{power}")


def _unshared(tree: Any) -> Any:
    """Copy a tree so that what an alias repeats can change on its own."""
    return {key: _unshared(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
