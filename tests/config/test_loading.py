"""Parameters come from defaults, file and command line; values written back change nothing else."""

from pathlib import Path

import pytest
import yaml

from nuclei3d.config import Params, load_params
from nuclei3d.config.loading import write_values
from nuclei3d.errors import InputError


def test_defaults_are_the_recipe() -> None:
    params = Params()
    assert (params.train.diameter_px, params.train.epochs, params.train.batch_size) == (30, 20, 32)
    assert (params.prepare.downsample_xy, params.prepare.step_xz, params.prepare.min_nuclei) == (2, 12, 3)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("train:\n  epochs: 3\n  batch_size: 4\n")
    params = load_params(file, ["train.epochs=7", "train.augment.dim_share=0.5"])
    assert (params.train.epochs, params.train.batch_size) == (7, 4)
    assert params.train.augment.dim_share == 0.5


def test_a_number_that_yaml_takes_for_text_is_a_number() -> None:
    assert load_params(None, ["train.weight_decay=1e-5"]).train.weight_decay == 1e-5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", "did you mean 'train.epochs'?"),
        ("data.voxel_size=[1,1,1]", "did you mean 'data.voxel_size_um'?"),
        ("predict.mode=orto", "; did you mean 'ortho'?"),
        ("data.voxel_size_um=none", "; write null for none"),
        ("predict.diameter_um=None", "; write null for none"),
        ("trian.epochs=3", "did you mean 'train'?"),
        ("train.epochs=many", "train.epochs"),
        ("train.epochs=0", "greater than or equal to 1"),
        ("train.epochs", "section.key=value"),
        ("train.augment=3", "train.augment"),
        ("train.augment.flip_z=false", "side_rotation: none"),
        ("seed.x=3", "seed"),
        ("data.voxel_size_um=[1,2]", "data.voxel_size_um"),
        ("data.voxel_size_um=[1,2,-1]", "data.voxel_size_um"),
    ],
)
def test_a_wrong_parameter_is_named(override: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        load_params(None, [override])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_each_error_names_where_the_value_came_from(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("train:\n  epochs: 0\n")
    with pytest.raises(InputError) as error:
        load_params(file, ["data.voxel_size_um=2,1,1", "train.augment.flip_z=false"])
    assert "--set: parameter 'data.voxel_size_um'" in str(error.value)
    assert "write it in brackets: [2,1,1]" in str(error.value)
    assert f"{file}: parameter 'train.epochs'" in str(error.value)


def test_none_is_no_hint_where_nothing_may_be_null() -> None:
    with pytest.raises(InputError) as error:
        load_params(None, ["train.epochs=none"])
    assert "null" not in str(error.value)


@pytest.mark.parametrize("content", ["- a\n- b\n", "train: [", "train: 3\n"])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=r"odd\.yaml"):
        load_params(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        load_params(tmp_path / "nowhere.yaml")


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
    deeper = {"train.augment.dim_min": 0.2, "predict.flip_average": True, "evaluate.bootstrap": 10}
    write_values(file, {"train.batch_size": 8, **deeper})
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
