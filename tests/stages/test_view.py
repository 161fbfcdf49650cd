"""The way to napari: what is shown together, and what is said where napari is missing."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from nuclei3d.config import Params
from nuclei3d.errors import InputError
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.view import choose_layers, view

SIZE = VoxelSize(2.0, 0.5, 0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    volume = np.zeros((5, 6, 7), dtype=np.uint16)
    for frame in ("t1", "t2"):
        write_image(tmp_path / f"Emb/images/{frame}.tif", volume, SIZE)
        write_labels(tmp_path / f"Emb/labels/{frame}.tif", volume, SIZE)
    write_labels(tmp_path / "pred/t2_masks.ome.tif", volume, SIZE)
    write_labels(tmp_path / "pred/t3_masks.ome.tif", volume, SIZE)
    return tmp_path


def test_the_first_image_that_all_masks_know_is_shown(folder: Path) -> None:
    entry, layers = choose_layers(folder / "Emb", [folder / "Emb", folder / "pred"])
    assert entry.frame.path == folder / "Emb/images/t2.tif"
    assert [(name, layer.frame.path.name) for name, layer in layers] == [
        ("Emb", "t2.tif"),
        ("pred", "t2_masks.ome.tif"),
    ]


def test_masks_of_other_images_are_refused(folder: Path) -> None:
    write_labels(folder / "other/t7_masks.ome.tif", np.zeros((5, 6, 7), np.uint16), SIZE)
    write_labels(folder / "other/t8_masks.ome.tif", np.zeros((5, 6, 7), np.uint16), SIZE)
    with pytest.raises(InputError, match="no volume of"):
        choose_layers(folder / "Emb", [folder / "other"])


def test_without_napari_the_user_is_told_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"nuclei3d\[view\]"):
        view(Params(), folder / "Emb")
