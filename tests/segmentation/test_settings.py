from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import pytest

from nuclei3d.config.loading import validate_params
from nuclei3d.config.sections import PredictParams, SegmentationParams
from nuclei3d.errors import InputError, TooLargeError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.folder import ModelInfo
from nuclei3d.networks.planning import plan_architecture
from nuclei3d.networks.unet3d import VolumeSpec
from nuclei3d.segmentation.settings import SegmentationSettings, check_scale, segmentation_settings

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


@pytest.mark.parametrize(("diameter_um", "least_um3"), [(12, 50), (6, 50 / 8), (24, 400)])
def test_the_volume_of_the_model_goes_with_the_cube_of_the_diameter(diameter_um, least_um3):
    masks = segmentation_settings(INFO, PredictParams(diameter_um=diameter_um)).masks
    assert masks.min_volume_um3 == least_um3
    masks = segmentation_settings(INFO, PredictParams(diameter_um=diameter_um, min_volume_um3=7)).masks
    assert masks.min_volume_um3 == 7


@pytest.mark.parametrize("value", ["large", 0, -3, float("inf"), True, [9]])
def test_a_diameter_is_a_length_or_auto(value):
    with pytest.raises(InputError, match="give the diameter in um, above 0, or auto") as raised:
        validate_params({"predict": {"diameter_um": value}}, "here")
    assert str(raised.value).count("predict.diameter_um") == 1


def test_auto_wants_an_image():
    with pytest.raises(InputError, match="auto is for 'nuclei3d predict'; give a number"):
        segmentation_settings(INFO, PredictParams(diameter_um="auto"))


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
    wishes = PredictParams(
        mode=mode, volume_model=Path("solid"), engine="openvino", precision="int8", volume_weight=2.0
    )
    settings = segmentation_settings(INFO, wishes, volume=SOLID)
    assert (settings.mode, settings.volume_weight, settings.masks.score_threshold) == ("mixed", 2.0, 0.4)
    assert settings.passes == (settings, settings.volume)
    solid = settings.volume
    assert (solid.mode, solid.diameter_px, solid.upper_percentile) == ("full3d", 20.5, 99.0)
    # the size of the nuclei is the volume's, as the 2D model or the user says it; OpenVINO is for planes
    assert solid.nucleus_diameter_um == settings.nucleus_diameter_um == 12
    assert (settings.engine, solid.engine) == ("openvino", "auto")
    assert (settings.precision, solid.precision) == ("int8", "auto")


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


# Voxels of the network's grid: 2**11 along each axis, the most there may be.
LARGEST = SegmentationSettings(mode="ortho", diameter_px=16, nucleus_diameter_um=8)


@pytest.mark.parametrize(
    ("shape", "edges_um", "diameter_um", "diameter_px"),
    [
        ((513, 2048, 2048), (2.0, 0.5, 0.5), 8, 16),
        ((512, 2049, 2048), (2.0, 0.5, 0.5), 8, 16),
        ((512, 2048, 2048), (2.01, 0.5, 0.5), 8, 16),
        ((512, 2048, 2048), (2.0, 0.51, 0.51), 8, 16),
        ((512, 2048, 2048), (2.0, 0.5, 0.5), 7.9, 16),
        ((512, 2048, 2048), (2.0, 0.5, 0.5), 8, 16.2),
    ],
    ids=["depth", "height", "voxel depth", "voxel width", "diameter", "network diameter"],
)
def test_what_makes_a_volume_too_large_for_one_piece_is_told(shape, edges_um, diameter_um, diameter_px):
    check_scale((512, 2048, 2048), VoxelSize(2.0, 0.5, 0.5), LARGEST)
    settings = replace(LARGEST, nucleus_diameter_um=diameter_um, diameter_px=diameter_px)
    with pytest.raises(TooLargeError, match=r"would grow to .*predict\.diameter_um.*predict\.memory_gb"):
        check_scale(shape, VoxelSize(*edges_um), settings)
    # what the message advises: each block is a volume by itself
    check_scale((shape[0], shape[1] // 2, shape[2]), VoxelSize(*edges_um), settings)


@pytest.mark.parametrize(
    ("shape", "diameter_um", "message"),
    [((4, 16, 200), 16, None), ((4, 14, 200), 16, "shrink to 7 x 100"), ((4, 64, 64), 1.4, "too few")],
)
def test_the_smallest_scale_that_is_looked_at(shape, diameter_um, message):
    settings = replace(LARGEST, nucleus_diameter_um=diameter_um)
    with pytest.raises(InputError, match=message) if message else nullcontext():
        check_scale(shape, VoxelSize(2.0, 0.5, 0.5), settings)
