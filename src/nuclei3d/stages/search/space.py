"""The space of a search: which parameters are tried, between which values, and what is held fixed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from optuna import Trial
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from nuclei3d.config import Params
from nuclei3d.config.loading import flat, set_dotted, validate_params
from nuclei3d.config.sections import Range
from nuclei3d.console import say
from nuclei3d.errors import InputError, hint_at

Value = bool | int | float | str | None

# Parameters of prepare would need other slices; a search never computes those again.
SEARCHED_SECTIONS = ("train", "predict")
# Parameters of these that say where and how fast, not what is computed.
_WITHOUT_EFFECT = ("name", "device", "workers", "memory_limit_gb", "memory_gb", "scheduler")


@dataclass(frozen=True)
class SearchSpace:
    """Optuna's distribution of each searched parameter by its dotted name, and the values in params.yaml."""

    distributions: Mapping[str, BaseDistribution]
    start: Mapping[str, Value]

    def draw(self, trial: Trial) -> dict[str, Value]:
        """Give a trial its values: those it was queued with, else new ones."""
        drawn: dict[str, Value] = {}
        for name, found in self.distributions.items():
            if isinstance(found, CategoricalDistribution):
                drawn[name] = trial.suggest_categorical(name, found.choices)
            elif isinstance(found, IntDistribution):
                drawn[name] = trial.suggest_int(name, found.low, found.high, log=found.log)
            elif isinstance(found, FloatDistribution):
                drawn[name] = trial.suggest_float(name, found.low, found.high, log=found.log)
        return drawn


def search_space(params: Params) -> SearchSpace:
    """Make the space from ``params.search``.

    A range that leaves out the value in params.yaml, which is the first trial, is widened to hold it.
    """
    ranges = params.search.ranges()
    if not ranges:
        raise InputError("nothing is searched: give at least one range in the section search of params.yaml")
    start = {name: _start_value(params, name) for name in ranges}
    return SearchSpace(
        {name: _distribution(params, name, found, start[name]) for name, found in ranges.items()}, start
    )


def params_with(params: Params, values: Mapping[str, Value]) -> Params:
    """Give the parameters with some values replaced, by dotted names."""
    tree = params.model_dump(mode="json")
    for name, value in values.items():
        set_dotted(tree, name, value)
    return validate_params(tree, "the search")


def fingerprint(params: Params, space: SearchSpace, slices_md5: str) -> str:
    """Describe, as JSON, all that makes trials comparable: trials of different kinds do not share a study."""
    search = params.search
    sections = params.model_dump(mode="json", include={"data", "train", "calibrate", "predict"})
    without = {f"{section}.{key}" for section in SEARCHED_SECTIONS for key in _WITHOUT_EFFECT}
    described = {
        name: value
        for name, value in flat(sections).items()
        if name not in without and name not in space.distributions
    }
    described |= {f"search.{name}": getattr(search, name) for name in ("objective", "volumes", "prune_on")}
    described |= {"search.precision": search.precision if search.objective == "faint_recall" else None}
    described |= {f"ranges.{name}": str(found) for name, found in space.distributions.items()}
    return json.dumps(described | {"slices": slices_md5, "seed": params.seed}, sort_keys=True)


def differences(known: str, wanted: str) -> str:
    """Name the settings in which two fingerprints differ."""
    old, new = json.loads(known), json.loads(wanted)
    names = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    return "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names[:3])


def _start_value(params: Params, name: str) -> Value:
    if name.split(".")[0] not in SEARCHED_SECTIONS:
        raise InputError(
            f"search.more: '{name}' cannot be searched; only parameters of the sections "
            f"{' and '.join(SEARCHED_SECTIONS)} can, because the slices are not made again"
        )
    known = flat(params.model_dump(mode="json", include=set(SEARCHED_SECTIONS)))
    if name in known and not isinstance(known[name], list):
        value: Value = known[name]
        return value
    if name in known or any(other.startswith(f"{name}.") for other in known):
        raise InputError(f"search.more: '{name}' is no single value and cannot be searched")
    raise InputError(f"search.more: there is no parameter '{name}'; {hint_at(name, known)}")


def _distribution(params: Params, name: str, found: Range, start: Value) -> BaseDistribution:
    """Make Optuna's distribution, widened to the start, if the parameter can take its ends or all choices."""
    if found.choices is not None:
        choices = found.choices
        if start not in choices:
            say(f"search: {name} is {start} in the parameters; it joins the choices {list(choices)}")
            choices = (start, *choices)
        _check_values(params, name, choices)
        return CategoricalDistribution(choices)
    assert found.low is not None
    assert found.high is not None
    if not isinstance(start, int | float) or isinstance(start, bool):
        raise InputError(
            f"{name} is {start} in the parameters and is searched from {found.low:g} to {found.high:g}; "
            "the first trial takes the value of the parameters, so give it a number"
        )
    if found.log and start <= 0:
        raise InputError(
            f"{name} is {start} in the parameters, which is outside any logarithmic range; give it a value "
            f"above 0, or search it with log: false"
        )
    # validated parameters are of the type that their section declares
    whole = isinstance(start, int)
    for value in (found.low, found.high):
        if whole and not value.is_integer():
            raise InputError(f"the range of {name} holds {value:g}, but {name} is a whole number")
    _check_values(params, name, (found.low, found.high))
    low, high = min(found.low, start), max(found.high, start)
    if (low, high) != (found.low, found.high):
        say(f"search: {name} is {start:g} in the parameters; its range becomes {low:g} to {high:g}")
    if whole:
        step = _step(params, name)
        if step > 1 and found.log:
            raise InputError(
                f"{name} is a multiple of {step}, so its range cannot have log: true; give choices"
            )
        return IntDistribution(int(low), int(high), log=found.log, step=step)
    return FloatDistribution(low, high, log=found.log)


def _step(params: Params, name: str) -> int:
    """Give what the values of a whole number are multiples of."""
    section: Any = params
    *sections, last = name.split(".")
    for each in sections:
        section = getattr(section, each)
    limits = type(section).model_fields[last].metadata
    return int(next((limit.multiple_of for limit in limits if hasattr(limit, "multiple_of")), 1))


def _check_values(params: Params, name: str, values: Iterable[Value]) -> None:
    for value in values:
        try:
            params_with(params, {name: value})
        except InputError as error:
            raise InputError(f"the range of {name} in the section search holds {value}: {error}") from None
