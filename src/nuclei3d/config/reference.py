"""The parameters as a page for readers, made from their classes: docs/parameters.md, `nuclei3d params`."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from pydantic import BaseModel

from nuclei3d.config.sections import Params, Section
from nuclei3d.errors import InputError

_HEAD = """# Parameters

Made from the classes in src/nuclei3d/config by `nuclei3d params`; a test holds them to each other. Each value
may stand in params.yaml or be given as `--set section.key=value`; what is left out has the default.
"""
_COLUMNS = "| parameter | default | values | meaning |\n|---|---|---|---|"
_WORDS = {"number": "number", "integer": "whole number", "string": "text", "boolean": "true or false"}
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "multipleOf": "a multiple of",
}


def describe_parameters(section: str | None = None) -> str:
    """Describe all sections in Markdown, or one such as ``train`` or ``train.augment``, or a parameter's."""
    sections = _sections("", Params)
    if section is None:
        return "\n".join([_HEAD, *(_page(name, kind) for name, kind in sections.items())])
    outer, _, name = section.rpartition(".")
    if section not in sections and outer in sections and name in sections[outer].model_fields:
        return _page(outer, sections[outer])
    if section not in sections:
        raise InputError(
            f"there is no section '{section}'; choose one of {', '.join(filter(None, sections))}"
        )
    return "\n".join(
        _page(name, kind) for name, kind in sections.items() if f"{name}.".startswith(f"{section}.")
    )


def _sections(name: str, kind: type[BaseModel]) -> dict[str, type[BaseModel]]:
    found = {name: kind}
    for key, field in kind.model_fields.items():
        if isinstance(field.default, BaseModel) and key not in field.default.model_fields_set:
            inner = type(field.default)
            if field.annotation is inner:
                found |= _sections(f"{name}.{key}".lstrip("."), inner)
    return found


def _page(name: str, kind: type[BaseModel]) -> str:
    schema = kind.model_json_schema()
    family = [each for each in reversed(kind.__mro__) if issubclass(each, Section) and each is not Section]
    prose = "\n\n".join(inspect.cleandoc(each.__doc__ or "") for each in family)
    meanings = {key: text for each in family for key, text in _meanings(each).items()}
    rows = [
        f"| `{key}` | `{_as_text(schema['properties'][key].get('default'))}` "
        f"| {_allowed(schema['properties'][key], schema)} | {meanings.get(key, '')} |"
        for key, field in kind.model_fields.items()
        if field.annotation not in _sections("", kind).values()
    ]
    title = f"## {name}" if name else "## At the top"
    return "\n".join([title, "", prose, "", _COLUMNS, *rows, ""]).replace("``", "`")


def _meanings(kind: type[BaseModel]) -> dict[str, str]:
    """Give the texts that stand below the fields of a class; pydantic would read them at every import."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _as_text(value: Any) -> str:
    return "null" if value is None else value if isinstance(value, str) else json.dumps(value)


def _allowed(node: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Say in words what a JSON schema admits."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(_allowed(each, schema) for each in node["anyOf"]))
    if "enum" in node or "const" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    if node.get("type") == "array":
        items = node.get("prefixItems") or [node["items"]]
        inner = " or ".join(dict.fromkeys(_allowed(each, schema) for each in items))
        return f"{len(items)} of: {inner}" if "prefixItems" in node else f"list of: {inner}"
    if node.get("type") == "object":
        return f"{node['title']}: {', '.join(node['properties'])}" if "properties" in node else "mapping"
    if node.get("type") == "null":
        return "null"
    words = [_WORDS[node["type"]], *(f"{word} {node[key]:g}" for key, word in _BOUNDS.items() if key in node)]
    return " ".join(words)
