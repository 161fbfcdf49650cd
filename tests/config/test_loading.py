from pathlib import Path

import pytest

from nuclei3d.config import Params, load_params
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
        ("train.epoch=3", "did you mean 'epochs'?"),
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


@pytest.mark.parametrize("content", ["- a\n- b\n", "train: [", "train: 3\n"])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=r"odd\.yaml"):
        load_params(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        load_params(tmp_path / "nowhere.yaml")
