from dataclasses import replace

import numpy as np
import pytest
import torch

from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import IntensityRange
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import ModelInfo, save_model
from nuclei3d.scoring.matching import average_precision, overlap_table
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.segmentation.settings import SegmentationSettings
from oracle_network import OracleNetwork, ball_labels, separate_balls

CPU = torch.device("cpu")
CUBIC = VoxelSize(1, 1, 1)
RAW = IntensityRange(0.0, 1.0)


def ap(truth: np.ndarray, labels: np.ndarray, threshold: float) -> float:
    return float(average_precision(overlap_table(truth, labels), (threshold,))[0])


@pytest.fixture(scope="module")
def touching() -> np.ndarray:
    """Nine touching balls of unequal size, about 14 voxels across, on cubic voxels of 1 um."""
    rng = np.random.default_rng(0)
    centres = np.array([(z, y, x) for z in (18,) for y in (12, 25, 38) for x in (12, 25, 38)], float)
    return ball_labels(
        (36, 50, 50), centres + rng.uniform(-1, 1, centres.shape), rng.uniform(6.5, 8, 9), (1, 1, 1)
    )


@pytest.fixture(scope="module")
def settings() -> SegmentationSettings:
    return SegmentationSettings(
        diameter_px=14, nucleus_diameter_um=14.0, intensity_range=RAW, precision="float32"
    )


@pytest.mark.parametrize("fusion", ["mean", "consensus"])
def test_exact_flows_give_back_every_touching_nucleus(touching, settings, fusion):
    result = Segmenter(OracleNetwork(separate=False), replace(settings, fusion=fusion), CPU).segment(
        touching.astype(np.uint16), CUBIC
    )
    assert ap(touching, result.labels, 0.9) == 1.0
    assert [n.label for n in result.nuclei] == list(range(1, 10))


@pytest.mark.parametrize(("anisotropy", "step"), [(1.0, 1), (2.2, 1), (5.75, 1), (2.2, 3)])
@pytest.mark.parametrize("scale", [0.7, 1.0])
def test_anisotropic_frames_at_any_network_scale(anisotropy, step, scale):
    """The network's scale need not be the frame's: planes are resampled there and labels back."""
    edges = (anisotropy, 1.0, 1.0)
    truth = separate_balls(edges)
    result = Segmenter(
        OracleNetwork(separate=True),
        SegmentationSettings(
            diameter_px=22 * scale, nucleus_diameter_um=22.0, intensity_range=RAW, orthogonal_step=step
        ),
        CPU,
    ).segment((truth > 0).astype(np.float32), VoxelSize.of(edges))
    assert ap(truth, result.labels, 0.75) == 1.0


def test_stitching_gives_back_separate_nuclei(settings):
    centres = np.array([(18, 14, 14), (18, 14, 40), (15, 38, 24)], float)
    truth = ball_labels((36, 52, 54), centres, np.array([9.0, 10, 8]), (1, 1, 1))
    result = Segmenter(OracleNetwork(separate=True), replace(settings, mode="stitch"), CPU).segment(
        (truth > 0).astype(np.uint8) * 1, CUBIC
    )
    assert ap(truth, result.labels, 0.9) == 1.0


def test_labels_have_no_gaps_and_nuclei_are_measured_in_um(settings):
    truth = ball_labels((30, 40, 40), np.array([(15, 20, 20.0)]), np.array([8.0]), (1, 1, 1))
    result = Segmenter(OracleNetwork(separate=False), settings, CPU).segment(truth.astype(np.uint8), CUBIC)
    (nucleus,) = result.nuclei
    assert nucleus.volume_um3 == pytest.approx(4 / 3 * np.pi * 8**3, rel=0.05)
    assert (nucleus.z_um, nucleus.y_um, nucleus.x_um) == pytest.approx((14.5, 19.5, 19.5), abs=0.3)
    assert nucleus.mean_intensity == pytest.approx(1.0, abs=0.01)
    assert nucleus.score > 0.8


@pytest.mark.parametrize("value", [0, 255])
def test_empty_and_saturated_volumes_hold_no_nuclei(value):
    image = np.full((12, 32, 32), value, np.uint8)
    network = new_network(10, seed=0)
    result = Segmenter(network, SegmentationSettings(diameter_px=10, nucleus_diameter_um=10), CPU).segment(
        image, CUBIC
    )
    assert result.labels.shape == image.shape
    assert not result.labels.any()
    assert result.nuclei == []


def test_the_score_threshold_drops_what_the_flow_does_not_support(touching, settings):
    strict = replace(settings, masks=replace(settings.masks, score_threshold=1.0))
    result = Segmenter(OracleNetwork(separate=False), strict, CPU).segment(touching.astype(np.uint8), CUBIC)
    assert not result.labels.any()


def test_progress_rises_to_one(touching, settings):
    seen: list[float] = []
    Segmenter(OracleNetwork(separate=False), settings, CPU).segment(
        touching.astype(np.uint8), CUBIC, seen.append
    )
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert max(seen[:-1]) == pytest.approx(0.99)


def test_training_mode_is_left_as_it_was(settings):
    network = OracleNetwork(separate=True).train()
    Segmenter(network, settings, CPU).segment(np.zeros((4, 32, 32)), CUBIC)
    assert network.training


@pytest.mark.parametrize(
    ("shape", "diameter_um", "mode", "message"),
    [
        ((1, 64, 64), 10.0, "ortho", "single plane"),
        ((10, 64, 64), 200.0, "ortho", "would shrink"),
        ((10, 64, 64), 1.0, "ortho", "too few"),
        ((10, 64, 64), 10.0, "full3d", "3D network"),
        ((64, 64), 10.0, "ortho", "volume"),
    ],
)
def test_impossible_scales_and_modes_are_explained(shape, diameter_um, mode, message):
    settings = SegmentationSettings(mode=mode, diameter_px=10, nucleus_diameter_um=diameter_um)
    with pytest.raises(InputError, match=message):
        Segmenter(OracleNetwork(separate=True), settings, CPU).segment(np.zeros(shape), CUBIC)


def test_mode_cellpose_is_stock_cellpose_with_the_same_weights():
    """Compared with a model that Cellpose made by itself, all else at its defaults."""
    from cellpose.models import CellposeModel

    truth = ball_labels((20, 40, 44), np.array([(10, 12, 12), (10, 28, 30.0)]), np.array([7.0, 8]), (1, 1, 1))
    image = (100 + 500 * (truth > 0)).astype(np.uint16)
    network = new_network(15.0, seed=0)
    settings = SegmentationSettings(
        mode="cellpose", diameter_px=15, nucleus_diameter_um=15, lower_percentile=1, upper_percentile=99
    )
    # An untrained network's logit is about 0 everywhere: take half of the voxels as foreground.
    stock = CellposeModel(gpu=False, pretrained_model=False, diam_mean=15.0)
    stock.net.load_state_dict(network.state_dict())
    stock.net_ortho = None
    options = {"channels": [0, 0], "z_axis": 0, "do_3D": True, "diameter": 15.0, "anisotropy": 1.0}
    _, flows, _ = stock.eval(image, compute_masks=False, **options)
    threshold = float(np.median(flows[2]))
    expected, _, _ = stock.eval(image, cellprob_threshold=threshold, **options)
    masks = replace(settings.masks, cellprob_threshold=threshold / 3)
    result = Segmenter(network, replace(settings, masks=masks), CPU).segment(image, CUBIC)
    np.testing.assert_array_equal(result.labels, expected)
    assert all(np.isnan(nucleus.score) for nucleus in result.nuclei)


def test_mode_cellpose_refuses_a_network_that_cellpose_does_not_load(tmp_path):
    info = ModelInfo(diameter_px=15, nucleus_diameter_um=9, width=16)
    save_model(tmp_path / "thin", new_network(15, 0, 16), info, "")
    with pytest.raises(InputError, match=r"does not load its width of 16"):
        Segmenter(tmp_path / "thin", {"mode": "cellpose"})


def test_other_thresholds_need_no_network(touching, settings):
    network = OracleNetwork(separate=False)
    segmenter = Segmenter(network, settings, CPU)
    flows = segmenter.flows(touching.astype(np.uint8), CUBIC)
    labels, scores = segmenter.label(flows, touching.shape)
    result = segmenter.segment(touching.astype(np.uint8), CUBIC)
    np.testing.assert_array_equal(labels, result.labels)
    np.testing.assert_array_equal(scores, result.scores)
    seen = len(network.shapes)
    strict = replace(settings.masks, score_threshold=1.0)
    assert not segmenter.label(flows, touching.shape, strict)[0].any()
    assert len(network.shapes) == seen


def test_a_model_opens_with_parameters_by_name(tmp_path):
    save_model(tmp_path / "model", new_network(15, 0), ModelInfo(name="mine", diameter_px=15), "a card")
    segmenter = Segmenter(str(tmp_path / "model"), {"diameter_um": 9.5, "mode": "stitch"}, "cpu")
    assert (segmenter.settings.nucleus_diameter_um, segmenter.settings.mode) == (9.5, "stitch")
    assert segmenter.segment(np.zeros((3, 40, 40)), (2.0, 0.5, 0.5)).nuclei == []
    with pytest.raises(InputError, match="did you mean 'diameter_um'"):
        Segmenter(tmp_path / "model", {"diametre_um": 9.5})
    with pytest.raises(InputError, match="need SegmentationSettings"):
        Segmenter(new_network(15, 0), {"diameter_um": 9.5})
