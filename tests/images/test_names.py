"""Names of laboratories tell embryo and frame."""

import doctest

import pytest

from nuclei3d.images import names
from nuclei3d.images.names import split_names


@pytest.mark.parametrize(
    ("name", "embryo", "frame"),
    [
        ("t001", "", "t001"),
        ("Emb11_t001", "Emb11", "t001"),
        ("embryo_c_t000", "embryo_c", "t000"),
        ("000", "", "000"),
        ("mouse12", "mouse", "12"),
        ("E9 frame 451", "E9", "frame 451"),
        ("embryo 7 t=451 (488nm)", "embryo 7 (488nm)", "t=451"),
        ("emb A t=000 (488nm)", "emb A (488nm)", "t=000"),
        ("E7t451_ch0", "E7_ch0", "t451"),
        ("Pos3_T0012_C1", "Pos3_C1", "T0012"),
        ("wt #2 time 3.5h", "wt #2", "time 3.5h"),
        ("movie t=5_t003", "movie t=5", "t003"),
        ("test_run", "test_run", "test_run"),
        ("set3 DAPI", "set3 DAPI", "set3 DAPI"),
        ("2024-03-01 kit4b", "2024-03-01 kit4b", "2024-03-01 kit4b"),
    ],
)
def test_a_name_by_itself(name: str, embryo: str, frame: str) -> None:
    assert split_names([name]) == [(embryo, frame)]


def test_names_that_differ_in_one_number_are_of_one_film() -> None:
    film = [f"emb A {n:03d} (488nm)" for n in range(3)]
    assert split_names([*film, "emb B 000 (488nm)"]) == [
        ("emb A (488nm)", "000"),
        ("emb A (488nm)", "001"),
        ("emb A (488nm)", "002"),
        ("emb B 000 (488nm)", "emb B 000 (488nm)"),
    ]
    # of several numbers that differ the last counts
    two = split_names([f"e{e}_{n}_GFP" for e in (1, 2) for n in (7, 8)])
    assert [embryo for embryo, _ in two] == ["e1_GFP", "e1_GFP", "e2_GFP", "e2_GFP"]


def test_the_examples_of_the_docstring_hold() -> None:
    assert doctest.testmod(names).failed == 0
