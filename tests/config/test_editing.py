"""Values change in a parameter file, and nothing else does."""

from pathlib import Path

import pytest
import yaml

from nuclei3d.config.loading import write_values
from nuclei3d.errors import InputError

TEXT = """\
# our embryos
seed: 3   # of all generators
train:
  epochs: 20        # the recipe's
  learning_rate: 0.001
  # how crops are changed
  augment: {flips: true, dim_share: 0.05}  # nothing else

# where nuclei are looked for
predict:
  mode: ortho
"""


def test_only_the_values_change(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(TEXT)
    write_values(file, {"train.epochs": 35, "train.learning_rate": 2e-5, "train.augment.dim_share": 0.25})
    expected = (
        TEXT.replace("epochs: 20 ", "epochs: 35 ").replace("0.001", "2.0e-05").replace("0.05}", "0.25}")
    )
    assert file.read_text() == expected


def test_values_that_are_not_there_join_their_section(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(TEXT)
    write_values(
        file,
        {
            "train.batch_size": 8,
            "train.augment.dim_min": 0.2,
            "predict.flip_average": True,
            "evaluate.bootstrap": 10,
        },
    )
    tree = yaml.safe_load(TEXT)
    tree["train"]["batch_size"] = 8
    tree["train"]["augment"]["dim_min"] = 0.2
    tree["predict"]["flip_average"] = True
    tree["evaluate"] = {"bootstrap": 10}
    assert yaml.safe_load(file.read_text()) == tree
    lines = file.read_text().splitlines()
    assert [line for line in TEXT.splitlines() if "#" in line and "augment:" not in line] == [
        line for line in lines if "#" in line and "augment:" not in line
    ]


@pytest.mark.parametrize("text", ["", "train:\n", "train:\npredict:\n  mode: stitch", "# nothing but this\n"])
def test_empty_files_and_sections_are_filled(tmp_path: Path, text: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    if text.startswith("train:"):
        # a section without a value is no valid parameter file, so there is nothing to keep
        with pytest.raises(InputError):
            write_values(file, {"train.epochs": 5})
        return
    write_values(file, {"train.epochs": 5})
    assert yaml.safe_load(file.read_text()) == {"train": {"epochs": 5}}
    assert file.read_text().startswith(text)


def test_a_file_that_cannot_be_edited_safely_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    text = "search:\n  epochs: &range {low: 5, high: 9}\n  more:\n    train.augment.dim_min: *range\n"
    file.write_text(text)
    with pytest.raises(InputError, match="cannot be edited safely"):
        write_values(file, {"search.epochs.low": 7})
    assert file.read_text() == text
