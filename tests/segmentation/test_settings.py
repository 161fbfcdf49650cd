from dataclasses import fields
from pathlib import Path

import pytest

from nuclei3d.config.sections import PredictParams, SegmentationParams
from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.folder import ModelInfo
from nuclei3d.networks.planning import plan_architecture
from nuclei3d.networks.unet3d import VolumeSpec
from nuclei3d.segmentation.settings import SegmentationSettings, segmentation_settings

INFO = ModelInfo(
    diameter_px=17, nucleus_diameter_um=12, cellprob_threshold=-0.5, score_threshold=0.4, min_volume_um3=50
)
THRESHOLDS = ("cellprob_threshold", "score_threshold", "min_volume_um3")


@pytest.mark.parametrize(
    ("wishes", "diameter_um", "thresholds"),
    [
        ({}, 12, (-0.5, 0.4, 50)),
        ({"diameter_um": 9, **dict.fromkeys(THRESHOLDS, 0.0)}, 9, (0, 0, 0)),
    ],
)
def test_the_model_decides_what_the_user_leaves_open(wishes, diameter_um, thresholds):
    settings = segmentation_settings(INFO, PredictParams(**wishes))
    assert settings.nucleus_diameter_um == diameter_um
    assert tuple(getattr(settings.masks, name) for name in THRESHOLDS) == thresholds


def test_an_unknown_diameter_is_asked_for():
    with pytest.raises(
        InputError, match=r"predict\.diameter_um=NUMBER \(17 voxels of this volume are 8\.5 um"
    ):
        segmentation_settings(ModelInfo(diameter_px=17), PredictParams(), VoxelSize(2, 0.5, 0.5))


SPEC = VolumeSpec(plan_architecture(2.2, "small"), 2.2, (32, 64, 64))


SOLID = ModelInfo(
    name="solid",
    kind="full3d",
    full3d=SPEC,
    diameter_px=20.5,
    nucleus_diameter_um=14,
    upper_percentile=99.0,
    score_threshold=0.9,
)


@pytest.mark.parametrize(("info", "mode"), [(INFO, "ortho"), (SOLID, "full3d")])
def test_mode_auto_is_that_of_the_model(info, mode):
    assert segmentation_settings(info, PredictParams()).mode == mode
    assert segmentation_settings(info, PredictParams(mode=mode)).as_parameters()["mode"] == mode


@pytest.mark.parametrize(
    ("info", "mode", "hint"),
    [(INFO, "full3d", "ortho"), (SOLID, "ortho", "full3d"), (SOLID, "stitch", "full3d")],
)
def test_modes_must_fit_the_kind_of_model(info, mode, hint):
    with pytest.raises(InputError, match=rf"is not for the model.*use {hint}") as raised:
        segmentation_settings(info, PredictParams(mode=mode))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("mode", ["auto", "mixed"])
def test_a_3d_model_beside_a_2d_one_is_seen_in_its_own_way(mode):
    wishes = PredictParams(mode=mode, volume_model=Path("solid"), engine="openvino", volume_weight=2.0)
    settings = segmentation_settings(INFO, wishes, volume=SOLID)
    assert (settings.mode, settings.volume_weight, settings.masks.score_threshold) == ("mixed", 2.0, 0.4)
    assert settings.passes == (settings, settings.volume)
    solid = settings.volume
    assert (solid.mode, solid.diameter_px, solid.upper_percentile) == ("full3d", 20.5, 99.0)
    # the size of the nuclei is the volume's, as the 2D model or the user says it; OpenVINO is for planes
    assert solid.nucleus_diameter_um == settings.nucleus_diameter_um == 12
    assert (settings.engine, solid.engine) == ("openvino", "auto")


@pytest.mark.parametrize(
    ("info", "mode", "volume", "message"),
    [
        (SOLID, "mixed", SOLID, "takes a 2D model and, beside it, a 3D one .* 'solid' is of kind 'full3d'"),
        (SOLID, "auto", SOLID, "takes a 2D model"),
        (INFO, "mixed", None, "give both or neither"),
        (INFO, "ortho", SOLID, "give both or neither"),
    ],
)
def test_mixed_is_a_2d_model_and_a_3d_one(info, mode, volume, message):
    wishes = PredictParams().model_copy(update={"mode": mode})
    with pytest.raises(InputError, match=message) as raised:
        segmentation_settings(info, wishes, volume=volume)
    assert "\n" not in str(raised.value)


def test_one_network_alone_is_not_mixed():
    wishes = PredictParams(mode="mixed", volume_model=Path("solid"), fusion="consensus").of_one_network()
    assert wishes == PredictParams(fusion="consensus")
    assert segmentation_settings(INFO, wishes).mode == "ortho"
    assert PredictParams(mode="stitch").of_one_network().mode == "stitch"


def test_effective_parameters_say_what_is_used():
    used = segmentation_settings(INFO, PredictParams(score_threshold=0.2, views=("xy",))).as_parameters()
    assert used["score_threshold"] == 0.2
    assert used["min_volume_um3"] == 50
    assert used["views"] == ["xy"]
    assert list(used) == [*SegmentationParams.model_fields, "diameter_px"]


def test_settings_and_parameters_have_the_same_names_and_defaults():
    """What is not resolved with the model goes by one name and one default, so it need not be listed."""
    shared = set(PredictParams.model_fields) & {each.name for each in fields(SegmentationSettings)}
    assert shared - {"mode"} == {
        *("views", "view_weights", "volume_weight", "fusion", "orthogonal_step", "flip_average"),
        *("precision", "engine", "stitch_min_iou", "stitch_max_gap", "flow3d_smooth"),
    }
    for name in shared - {"mode"}:
        assert getattr(SegmentationSettings(), name) == getattr(PredictParams(), name)
