"""Changing values in a YAML file and nothing else: comments, order and spacing stay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nuclei3d.config.loading import load_params
from nuclei3d.errors import InputError
from nuclei3d.volumes.whole import whole_file


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
