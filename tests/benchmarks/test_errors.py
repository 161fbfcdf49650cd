"""Every error has one kind, and mending a kind is worth what counting by hand says."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from nuclei3d.scoring.matching import overlap_table

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("errors")


def test_each_error_is_sorted_and_mended_as_counted_by_hand(errors: ModuleType) -> None:
    truth, found = np.zeros((2, 1, 8, 60), np.uint32)
    # 1 found well; 2 and 3 merged by 2; 4 split into 3 and 4; 5 off; 6 to 8 missed; 6 false
    for label in range(1, 9):
        truth[0, :, 7 * label - 7 : 7 * label - 1] = label
    found[0, :, 0:6] = 1
    found[0, :, 7:20] = 2
    found[0, :, 21:24], found[0, :, 24:27] = 3, 4
    found[0, :, 28:30] = 5
    found[0, :, 55:60] = 6
    deep, faint = np.arange(8) == 5, np.arange(8) == 6
    sorted_ = errors.sort_errors(overlap_table(truth, found), deep, faint)
    assert sorted_.n_true == 8
    missed = {f"missed {where}": 1 for where in ("deep", "faint", "elsewhere")}
    assert dict(sorted_.counts) == {"merged": 2, "split": 1, "off": 1, **missed, "false": 1}
    assert dict(sorted_.faint) == {"missed faint": 1}
    assert sorted_.mended[""].tolist() == [1, 1, 6]
    assert sorted_.mended["merged"].tolist() == [3, 3, 7]
    assert sorted_.mended["split"].tolist() == [2, 2, 5]
    assert sorted_.mended["off"].tolist() == [2, 2, 6]
    assert sorted_.mended["missed faint"].tolist() == [2, 2, 7]
    assert sorted_.mended["false"].tolist() == [1, 1, 5]
    assert errors.average_precisions([sorted_], "merged") == (3 / 12, 3 / 12)


def test_deep_is_where_nuclei_are_fainter(errors: ModuleType) -> None:
    truth = np.zeros((10, 2, 2), np.uint32)
    for label, z in ((1, 0), (4, 5), (7, 9)):
        truth[z] = label
    table = overlap_table(truth, truth)
    assert errors.deep_third(truth, table, np.array([1.0, 5.0, 9.0])).tolist() == [True, False, False]
    assert errors.deep_third(truth, table, np.array([9.0, np.nan, 1.0])).tolist() == [False, False, True]
