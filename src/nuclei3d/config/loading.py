"""Changing values in a YAML file and nothing else: comments, order and spacing stay.

Reading params.yaml and ``--set section.key=value`` into validated parameters.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from nuclei3d.config.sections import Params
from nuclei3d.errors import InputError
from nuclei3d.outputs import whole_file


def load_params(path: Path | None, overrides: Iterable[str] = ()) -> Params:
    """Load parameters from a YAML file, apply overrides, validate.

    Parameters
    ----------
    path
        The file; None means all defaults (the recipe's).
    overrides
        Texts such as ``train.epochs=5``; the value is read as YAML.

    Raises
    ------
    InputError
        If the file is missing or no YAML mapping, or a name or value is wrong. The message names the
        parameter, what was found, and the nearest known name.
    """
    tree = _read_yaml(path) if path is not None else {}
    for override in overrides:
        _apply_override(tree, override)
    source = str(path) if path is not None else "the command line"
    return validate_params(tree, source)


def validate_params(tree: Mapping[str, Any], source: str) -> Params:
    """Validate a nested mapping; `source` is named in the error."""
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{source}: " + "; ".join(_explain(error))) from None


def params_as_dict(params: BaseModel) -> dict[str, Any]:
    """Give the parameters as plain nested data, ready for YAML or JSON."""
    return params.model_dump(mode="json")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the parameter file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first_line = " ".join(str(error).split())
        raise InputError(f"{path} is not valid YAML: {first_line}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold sections such as 'train:', found a {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
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
    node = tree
    for key in keys[:-1]:
        child = node.get(key)
        if child is None:
            child = {}
            node[key] = child
        if not isinstance(child, dict):
            raise InputError(f"--set {name}: '{key}' is a value, not a section")
        node = child
    node[keys[-1]] = value


def _number_or_text(text: str) -> float | str:
    """Read 1e-5, which YAML takes for text, as a number."""
    try:
        return float(text)
    except ValueError:
        return text


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _known_names(problem["loc"][:-1])
            close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
            lines.append(f"unknown parameter '{name}'; {hint}")
        else:
            lines.append(f"parameter '{name}' is {problem['input']!r}: {problem['msg']}")
    return lines


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
    """Set values in a parameter file by dotted names; a name that is not in the file is added to its section.

    The file is replaced as a whole, and only if it then reads as the old one with these values.

    Raises
    ------
    InputError
        If the file cannot be read or written, or is written in a way that cannot be edited.
    """
    load_params(path)
    path = path.resolve()
    text = path.read_text(encoding="utf-8")
    expected = _unshared(yaml.safe_load(text) or {})
    for name, value in values.items():
        text = _with_value(text, name.split("."), _as_yaml(value))
        _set(expected, name.split("."), value)
    if yaml.safe_load(text) != expected:
        raise InputError(
            f"{path} is written in a way that cannot be edited safely (anchors?); write the values yourself: "
            f"{json.dumps(dict(values))}"
        )
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8")
        new.chmod(path.stat().st_mode & 0o777)


def _with_value(text: str, keys: list[str], value: str) -> str:
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is None:
        return text + _block(keys, value, 0)
    for depth, key in enumerate(keys):
        if not isinstance(node, yaml.MappingNode):
            return text
        found = next((inner for name, inner in node.value if name.value == key), None)
        if found is None:
            return _inserted(text, node, keys[depth:], value)
        if depth == len(keys) - 1:
            return _replaced(text, found, value)
        node = found
    return text


def _replaced(text: str, node: yaml.Node, value: str) -> str:
    start, end = node.start_mark.index, node.end_mark.index
    if start == end:
        # "key:" without a value
        value = f" {value}"
    return text[:start] + value + text[end:]


def _inserted(text: str, section: yaml.MappingNode, keys: list[str], value: str) -> str:
    """Add a value as the last one of a section."""
    if section.flow_style:
        body = f"{keys[0]}: " + "".join(f"{{{key}: " for key in keys[1:]) + value + "}" * (len(keys) - 1)
        end = section.end_mark.index - 1
        return text[:end] + (", " if section.value else "") + body + text[end:]
    last = section.value[-1][1]
    end = last.end_mark.index
    # the end of a block may lie behind comments and empty lines; go back to what is really its last line
    content = text[:end].rstrip()
    while content.rsplit("\n", 1)[-1].lstrip().startswith("#"):
        content = content.rsplit("\n", 1)[0].rstrip()
    line_end = text.find("\n", len(content))
    line_end = len(text) if line_end < 0 else line_end
    return (
        text[:line_end] + "\n" + _block(keys, value, section.start_mark.column).rstrip("\n") + text[line_end:]
    )


def _block(keys: list[str], value: str, indent: int) -> str:
    lines = [" " * (indent + 2 * depth) + f"{key}:" for depth, key in enumerate(keys)]
    lines[-1] += f" {value}"
    return "\n".join(lines) + "\n"


def _as_yaml(value: bool | int | float | str | None) -> str:
    """Write a value so that YAML reads the same back: PyYAML takes 1e-05 for text, 1.0e-05 for a number."""
    if isinstance(value, float):
        text = repr(value)
        mantissa, exponent, power = text.partition("e")
        return f"{mantissa}.0{exponent}{power}" if exponent and "." not in mantissa else text
    return json.dumps(value)


def _set(tree: dict[str, Any], keys: list[str], value: bool | int | float | str | None) -> None:
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
    tree[keys[-1]] = value


def _unshared(tree: Any) -> Any:
    """Copy a tree so that what an alias repeats can change on its own."""
    return {key: _unshared(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
