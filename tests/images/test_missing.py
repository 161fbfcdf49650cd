"""A path that DVC tracks but that was not fetched yet says how to fetch it."""

import pytest

from nuclei3d.errors import InputError, missing
from nuclei3d.images.embryos import find_embryos
from nuclei3d.images.frames import find_frames


@pytest.mark.parametrize(
    ("read", "path"),
    [
        (find_embryos, "data"),
        (find_frames, "data/embryo_c/images"),
        (find_frames, "data/embryo_c/images/t000.tif"),
    ],
)
def test_what_is_still_in_dvc_says_how_to_get_it(tmp_path, monkeypatch, read, path):
    (tmp_path / "data.dvc").write_text("outs: []")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as raised:
        read(path)
    assert str(raised.value) == f"{path} is tracked by DVC but not here yet; get it with: dvc pull data.dvc"


def test_a_wrong_name_in_a_folder_that_was_fetched_is_just_missing(tmp_path):
    (tmp_path / "data.dvc").write_text("outs: []")
    (tmp_path / "data").mkdir()
    assert str(missing(tmp_path / "data" / "embryo_z", "no embryo_z")) == "no embryo_z"


def test_without_dvc_the_message_is_that_of_the_reader(tmp_path):
    with pytest.raises(InputError, match="absent does not exist"):
        find_frames(tmp_path / "absent")
