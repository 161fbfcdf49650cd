"""Thresholds are chosen for what predicts: a model alone, or with a 3D model beside it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nuclei3d.config import load_params
from nuclei3d.config.sections import CalibrateParams, PredictParams
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import Model, ModelInfo, load_model, save_model
from nuclei3d.segmentation.settings import segmentation_settings
from nuclei3d.segmentation.thresholds import Thresholds
from nuclei3d.stages.calibrate import calibrate, choose_for
from oracle_network import load_oracle, save_oracle
from volumes_fixture import draw_volume

INFO = ModelInfo(name="silent", diameter_px=12, nucleus_diameter_um=12)
SIZE = VoxelSize(2.0, 1.0, 1.0)


class Silent(nn.Module):
    """Sees nothing anywhere: no flow, a low logit."""

    def forward(self, stack: torch.Tensor) -> torch.Tensor:
        output = torch.zeros(len(stack), 3, *stack.shape[2:])
        output[:, 2] = -3
        return output


@pytest.fixture
def embryos(tmp_path: Path) -> Path:
    for embryo in ("a", "b"):
        folder = tmp_path / "data" / embryo
        labels = draw_volume(np.random.default_rng(0), SIZE, (24, 56, 56), 4)[1]
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True)
        # apart from one another: the oracle takes what hangs together for one nucleus
        image = 100 + 400 * (labels == 1)
        write_image(folder / "images" / "t1.tif", image.astype(np.uint16), SIZE)
        write_labels(folder / "labels" / "t1.tif", (labels == 1).astype(np.uint32), SIZE)
    return tmp_path / "data"


def test_a_least_volume_found_at_another_diameter_is_kept_for_the_models_own(monkeypatch):
    found = Thresholds(0.0, -0.5, -1.0, 0.4, 80.0, 0.9, 0.8)
    monkeypatch.setattr("nuclei3d.stages.calibrate.choose_thresholds", lambda *_: found)
    wishes = PredictParams(diameter_um=24)
    info, _ = choose_for(INFO, CalibrateParams(), segmentation_settings(INFO, wishes), [])
    assert info.min_volume_um3 == 10
    assert segmentation_settings(info, wishes).masks.min_volume_um3 == 80


def test_thresholds_with_a_3d_model_beside_are_those_of_both(embryos, tmp_path, monkeypatch):
    save_model(tmp_path / "flat", new_network(12, 0), INFO, "silent")
    save_oracle(tmp_path / "solid")

    def load(path: Path) -> Model:
        return load_oracle(path) if path.name == "solid" else Model(Silent(), INFO, path / "silent")

    monkeypatch.setattr("nuclei3d.networks.folder.load_model", load)
    split = ["data.split.train=[a]", "data.split.validation=[b]", "calibrate.volumes=1"]
    alone = calibrate(load_params(None, split), tmp_path / "flat", embryos)
    both = calibrate(
        load_params(None, [*split, f"predict.volume_model={tmp_path / 'solid'}"]), tmp_path / "flat", embryos
    )
    assert alone.thresholds.ap == 0
    # three views say -3, the 3D network 6: their mean is -0.75 inside the nucleus and -3.75 elsewhere
    assert both.thresholds.ap == 1
    assert -3.75 < both.thresholds.cellprob < -0.75
    kept = json.loads((tmp_path / "flat" / "model.json").read_text())
    assert kept["cellprob_threshold"] == both.thresholds.cellprob
    assert load_model(tmp_path / "flat").info.diameter_px == 12
