"""Reading params.yaml and ``--set section.key=value`` into validated parameters."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from nuclei3d.config.params import Params
from nuclei3d.errors import InputError


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
