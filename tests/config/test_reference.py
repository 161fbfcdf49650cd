from pathlib import Path

import pytest

from nuclei3d.config.reference import describe_parameters
from nuclei3d.errors import InputError

PAGE = Path(__file__).parents[2] / "docs" / "parameters.md"


def test_the_page_of_the_docs_is_that_of_the_classes() -> None:
    assert PAGE.read_text() == describe_parameters(), "run: nuclei3d params > docs/parameters.md"


def test_a_section_brings_those_within_it() -> None:
    page = describe_parameters("train")
    assert "| `epochs` | `20` | whole number at least 1 |" in page
    assert "## train.augment" in page
    assert "## predict" not in page


def test_a_parameter_brings_its_section() -> None:
    assert "| `mode` |" in describe_parameters("predict.mode")
    assert "| `flips` |" not in describe_parameters("train.epochs")
    assert "| `seed` |" in describe_parameters("seed")


def test_an_unknown_section_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"'trian'.*train\.augment"):
        describe_parameters("trian")
