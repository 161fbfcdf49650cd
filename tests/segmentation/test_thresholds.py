"""Thresholds are chosen as a search by hand would choose them."""

from dataclasses import replace

import numpy as np
import pytest

from nuclei3d.flows import flows_3d
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.matching import average_precision, overlap_table
from nuclei3d.segmentation.dynamics import label_flows
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.settings import SegmentationSettings
from nuclei3d.segmentation.thresholds import LabelledFlow, Thresholds, choose_thresholds
from oracle_network import ball_labels

VOXEL_SIZE = VoxelSize(1.0, 1.0, 1.0)
SETTINGS = SegmentationSettings(diameter_px=10.0, nucleus_diameter_um=10.0)


def balls(centres: list[tuple[int, int, int]], radius: float, shape: tuple[int, int, int]) -> np.ndarray:
    """Give balls around voxels, whose faces are part of them."""
    return ball_labels(shape, np.add(centres, 0.5), np.full(len(centres), radius + 1e-6), (1, 1, 1))


@pytest.fixture(scope="module")
def volume() -> LabelledFlow:
    """Two true nuclei; the network sees them too large at logit 0, and believes half in a third one."""
    shape = (20, 20, 60)
    truth = balls([(10, 10, 10), (10, 10, 30)], 4.0, shape)
    seen = balls([(10, 10, 10), (10, 10, 30), (10, 10, 50)], 6.0, shape)
    logit = np.full(shape, -6.0, np.float32)
    logit[seen > 0] = 0.2
    logit[(seen > 0) & (balls([(10, 10, 10), (10, 10, 30), (10, 10, 50)], 4.5, shape) > 0)] = 4.0
    logit[seen == 3] = 0.6
    return LabelledFlow(FlowField.of(flows_3d(seen, VOXEL_SIZE), logit, VOXEL_SIZE), truth, VOXEL_SIZE)


def labelled(volume: LabelledFlow, chosen: Thresholds) -> np.ndarray:
    masks = replace(
        SETTINGS.masks,
        cellprob_threshold=chosen.cellprob,
        outline_threshold=chosen.outline,
        outline_threshold_z=chosen.outline_z,
        score_threshold=chosen.score,
        min_volume_um3=chosen.min_volume_um3,
    )
    return label_flows(volume.flows, volume.truth.shape, replace(SETTINGS, masks=masks))[0]


def test_the_false_nucleus_goes_and_the_true_ones_get_their_size(volume: LabelledFlow) -> None:
    chosen = choose_thresholds([volume], SETTINGS, (0.0, 0.4), (0.0, 0.4), (0.5, 0.6), (0.0,))
    assert chosen.cellprob == 0.4
    assert chosen.ap == 1.0
    assert chosen.ap_default < 0.5
    assert labelled(volume, chosen).max() == 2


def test_counting_agrees_with_segmenting_again(volume: LabelledFlow) -> None:
    chosen = choose_thresholds([volume], SETTINGS, (0.4,), (0.0, 0.4), (0.5, 0.6, 0.7), (0.0, 0.05))
    table = overlap_table(volume.truth, labelled(volume, chosen))
    assert average_precision(table, (0.5, 0.6, 0.7)).mean() == pytest.approx(chosen.ap)


def test_defaults_stay_where_nothing_is_better_but_debris_is_still_left_out() -> None:
    truth = balls([(10, 10, 10)], 5.0, (20, 20, 20))
    logit = np.where(truth > 0, 8.0, -8.0).astype(np.float32)
    exact = LabelledFlow(FlowField.of(flows_3d(truth, VOXEL_SIZE), logit, VOXEL_SIZE), truth, VOXEL_SIZE)
    chosen = choose_thresholds([exact], SETTINGS, (-1.0, 0.0, 1.0), (-1.0, 0.0), (0.5,), (0.0, 0.1))
    assert (chosen.cellprob, chosen.outline, chosen.outline_z) == (0.0, 0.0, 0.0)
    assert chosen.score == 0.35  # nor does it of scores
    # no debris here says nothing of other embryos: the largest volume that costs no nucleus stays
    assert chosen.min_volume_um3 == pytest.approx(0.1 * np.pi / 6 * 10**3)


def test_a_least_volume_that_costs_nuclei_is_not_taken() -> None:
    truth = balls([(10, 10, 10), (10, 10, 30), (10, 10, 50)], 3.0, (20, 20, 60))
    logit = np.where(truth > 0, 8.0, -8.0).astype(np.float32)
    exact = LabelledFlow(FlowField.of(flows_3d(truth, VOXEL_SIZE), logit, VOXEL_SIZE), truth, VOXEL_SIZE)
    chosen = choose_thresholds([exact], SETTINGS, (0.0,), (0.0,), (0.5,), (0.0, 0.1, 0.5))
    assert chosen.min_volume_um3 == pytest.approx(0.1 * np.pi / 6 * 10**3)


def test_outlines_are_chosen_by_overlap_in_the_plane_and_along_z() -> None:
    shape, centre = (32, 32, 32), np.full(3, 15.5)
    away = centre[:, None, None, None] - np.indices(shape)
    radius = np.maximum(np.linalg.norm(away, axis=0), 1e-6)
    flow = (away / radius).astype(np.float32)
    # the logit falls by 1 a voxel from 0 at a radius of 5; the nucleus reaches 1 further, along z 3
    truth = (radius < 6 + 2 * flow[0] ** 2).astype(np.uint32)
    logit = (5 - radius).astype(np.float32)
    seen = LabelledFlow(FlowField.of(flow, logit, VOXEL_SIZE), truth, VOXEL_SIZE)
    tried = (-4.0, -3.0, -2.0, -1.0, 0.0)
    chosen = choose_thresholds([seen], SETTINGS, (0.0,), tried, (0.5, 0.9), (0.0,))
    assert (chosen.cellprob, chosen.outline, chosen.outline_z) == (0.0, -1.0, -3.0)
    assert chosen.ap == 1 > chosen.ap_default
    assert (labelled(seen, chosen) == truth).mean() > 0.999
