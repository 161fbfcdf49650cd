"""Benchmarks compare two sides by turns, so that the load of the machine is the same for both."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("shared")


@pytest.mark.parametrize(
    ("repeats", "order"),
    [
        ({"ours": 3, "stock": 1}, ["ours", "ours", "stock", "ours"]),
        ({"ours": 3, "stock": 2}, ["ours", "stock", "ours", "stock", "ours"]),
        ({"ours": 2, "stock": 2}, ["ours", "stock", "ours", "stock"]),
    ],
)
def test_the_runs_of_two_sides_take_turns(timing, repeats, order):
    done: list[str] = []

    def work(name: str) -> int:
        done.append(name)
        return done.count(name)

    both = timing.measure_in_turns({name: (lambda n=name: work(n), many) for name, many in repeats.items()})
    assert done == order
    for name, many in repeats.items():
        one, last = both[name]
        assert len(one.seconds) == len(one.cpu_seconds) == last == many


def test_a_ratio_tells_its_spread(timing: ModuleType) -> None:
    assert timing.ratio_of([8.0, 12.0], [1.0, 2.0, 4.0]) == {"median": 5.0, "least": 2.0, "most": 12.0}
