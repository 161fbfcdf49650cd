"""The space of a search: which parameters are tried, and between which values."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

from nuclei3d.config import Params, params_as_dict
from nuclei3d.config.loading import validate_params
from nuclei3d.config.sections import Range
from nuclei3d.console import say
from nuclei3d.errors import InputError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = bool | int | float | str | None

# Parameters of prepare would need other slices; a search never computes those again.
SEARCHED_SECTIONS = ("train", "predict")


@dataclass(frozen=True)
class SearchSpace:
    """The searched parameters.

    Attributes
    ----------
    distributions
        Optuna's distribution of each parameter by its dotted name.
    start
        Their values in params.yaml: the first trial.
    """

    distributions: Mapping[str, BaseDistribution]
    start: Mapping[str, Value]


def search_space(params: Params) -> SearchSpace:
    """Make the space from ``params.search``.

    A range that leaves out the value in params.yaml, which is the first trial, is widened to hold it.

    Raises
    ------
    InputError
        If a name is unknown or of another section, or a range holds values that the parameter cannot take.
    """
    ranges = params.search.ranges()
    if not ranges:
        raise InputError("nothing is searched: give at least one range in the section search of params.yaml")
    distributions = {}
    start = {}
    for name, found in ranges.items():
        kind, value = _look_up(params, name)
        widened = _widened(name, found, value)
        _check_ends(params, name, widened, kind)
        distributions[name] = _distribution(widened, kind)
        start[name] = value
    return SearchSpace(distributions, start)


def params_with(params: Params, values: Mapping[str, Value]) -> Params:
    """Give the parameters with some values replaced, by dotted names.

    Raises
    ------
    InputError
        If the values together are not allowed.
    """
    tree = params_as_dict(params)
    for name, value in values.items():
        *sections, key = name.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[key] = value
    return validate_params(tree, "the search")


def _look_up(params: Params, name: str) -> tuple[type, Value]:
    """Give the type of a parameter (int, float, bool or str) and its value."""
    section: BaseModel = params
    keys = name.split(".")
    if keys[0] not in SEARCHED_SECTIONS:
        raise InputError(
            f"search.more: '{name}' cannot be searched; only parameters of the sections "
            f"{' and '.join(SEARCHED_SECTIONS)} can, because the slices are not made again"
        )
    for key in keys[:-1]:
        inner = getattr(section, key, None)
        if not isinstance(inner, BaseModel):
            raise InputError(f"search.more: there is no parameter '{name}'; '{key}' is no section")
        section = inner
    fields = type(section).model_fields
    if keys[-1] not in fields:
        close = difflib.get_close_matches(keys[-1], fields, n=1)
        hint = (
            f"did you mean '{'.'.join([*keys[:-1], close[0]])}'?" if close else f"known: {', '.join(fields)}"
        )
        raise InputError(f"search.more: there is no parameter '{name}'; {hint}")
    value = getattr(section, keys[-1])
    if isinstance(value, BaseModel | tuple):
        raise InputError(f"search.more: '{name}' is no single value and cannot be searched")
    return _kind(fields[keys[-1]].annotation), value


def _kind(annotation: Any) -> type:
    if isinstance(annotation, type) and issubclass(annotation, bool | int | float):
        return annotation
    inner = [
        _kind(part) for part in get_args(annotation) if part is not NoneType and not isinstance(part, str)
    ]
    return next((kind for kind in inner if kind is not str), str)


def _widened(name: str, found: Range, value: Value) -> Range:
    if found.choices is not None:
        if value in found.choices:
            return found
        say(f"search: {name} is {value} in the parameters; it joins the choices {list(found.choices)}")
        return Range(choices=(value, *found.choices))
    assert found.low is not None
    assert found.high is not None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(
            f"{name} is {value} in the parameters and is searched from {found.low:g} to {found.high:g}; "
            "the first trial takes the value of the parameters, so give it a number"
        )
    if found.low <= value <= found.high:
        return found
    if found.log and value <= 0:
        raise InputError(
            f"{name} is {value} in the parameters, which is outside any logarithmic range; give it a value "
            f"above 0, or search it with log: false"
        )
    wider = Range(low=min(found.low, value), high=max(found.high, value), log=found.log)
    say(f"search: {name} is {value:g} in the parameters; its range becomes {wider.low:g} to {wider.high:g}")
    return wider


def _check_ends(params: Params, name: str, found: Range, kind: type) -> None:
    for value in found.choices if found.choices is not None else (found.low, found.high):
        if kind is int and isinstance(value, float) and not value.is_integer():
            raise InputError(f"the range of {name} holds {value:g}, but {name} is a whole number")
        try:
            params_with(params, {name: int(value) if kind is int and isinstance(value, float) else value})
        except InputError as error:
            raise InputError(f"the range of {name} in the section search holds {value}: {error}") from None


def _distribution(found: Range, kind: type) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if found.choices is not None:
        return CategoricalDistribution(found.choices)
    assert found.low is not None
    assert found.high is not None
    if kind is int:
        return IntDistribution(int(found.low), int(found.high), log=found.log)
    return FloatDistribution(found.low, found.high, log=found.log)
