from dataclasses import replace

import numpy as np
import pytest

from nuclei3d.config.sections import LossParams, SamplingParams
from nuclei3d.errors import InputError
from nuclei3d.training.samples import epoch_order, nucleus_weights, plane_contrasts, sample_weights
from slices_fixture import make_planes
from volumes_fixture import make_volumes


def infos_of(*changes):
    base = make_planes(1).infos[0]
    return [replace(base, **change) for change in changes]


def test_by_default_all_planes_are_drawn_alike():
    np.testing.assert_allclose(sample_weights(make_planes(7).infos, SamplingParams(), 3), 1 / 7)


def test_views_nuclei_and_sparse_planes_are_weighted():
    infos = infos_of({"view": "xy", "nuclei": 4}, {"view": "xz", "nuclei": 16}, {"view": "xy", "nuclei": 1})
    weights = sample_weights(infos, SamplingParams(xz=0.5, nuclei_power=0.5, sparse=0.25), 3)
    np.testing.assert_allclose(weights / weights[0], [1, 0.5 * 2, 0.5 * 0.25])


def test_planes_with_faint_nuclei_can_be_drawn_more_often_within_bounds():
    infos = infos_of(*({"min_contrast": c} for c in (1.0, 2.0, 4.0, 1e6, float("nan"))))
    weights = sample_weights(infos, SamplingParams(contrast_power=1.0), 3)
    # the median of the known ones is 3
    np.testing.assert_allclose(weights / weights[4], [3, 1.5, 0.75, 0.25, 1])


def test_embryos_are_balanced_whatever_their_number_of_planes():
    infos = infos_of({"embryo": "a"}, {"embryo": "b"}, {"embryo": "b"}, {"embryo": "b"})
    np.testing.assert_allclose(
        sample_weights(infos, SamplingParams(balance="embryos"), 3), [1 / 2, 1 / 6, 1 / 6, 1 / 6]
    )


def test_nothing_left_to_draw_is_the_users_mistake():
    with pytest.raises(InputError, match="min_train_masks"):
        sample_weights(infos_of({"nuclei": 1}), SamplingParams(sparse=0), 3)


def test_an_epoch_of_equal_weights_draws_each_plane_once():
    order = epoch_order(np.full(20, 0.05), 20, seed=1, epoch=0)
    assert sorted(order) == list(range(20))
    assert not np.array_equal(order, epoch_order(np.full(20, 0.05), 20, seed=1, epoch=1))
    assert np.array_equal(order, epoch_order(np.full(20, 0.05), 20, seed=1, epoch=0))


def test_draws_keep_to_the_weights_in_every_epoch():
    weights = np.array([0.5, 0.3, 0.2, 0.0])
    for epoch in range(5):
        counts = np.bincount(epoch_order(weights, 100, seed=0, epoch=epoch), minlength=4)
        np.testing.assert_allclose(counts, 100 * weights, atol=1)
        assert counts[3] == 0


def test_contrast_is_the_rise_over_the_robust_noise():
    rng = np.random.default_rng(0)
    labels = np.zeros((80, 80), np.uint16)
    labels[10:30, 10:30] = 1
    labels[50:70, 50:70] = 3
    image = rng.normal(0, 0.1, labels.shape).astype(np.float32) + np.select(
        [labels == 1, labels == 3], [1.0, 0.3]
    )
    contrasts = plane_contrasts(image.astype(np.float32), labels)
    assert np.isnan(contrasts[[0, 2]]).all()
    assert contrasts[1] == pytest.approx(10, rel=0.15)
    assert contrasts[3] == pytest.approx(3, rel=0.2)


def test_faint_nuclei_weigh_more_and_the_background_one():
    planes = make_planes(4)
    assert nucleus_weights(planes, LossParams()) is None
    tables = nucleus_weights(planes, LossParams(weight_by="contrast", power=1.0, max_weight=3.0))
    for plane, table in enumerate(tables):
        assert table[0] == 1
        assert table.min() >= 1 / 3 - 1e-6
        assert table.max() <= 3 + 1e-6
        contrasts = plane_contrasts(planes.normalised(plane)[0], planes.read(plane).labels[0])
        known = np.flatnonzero(np.isfinite(contrasts))
        assert (np.diff(table[known][np.argsort(contrasts[known])]) <= 1e-6).all()


def test_small_nuclei_weigh_by_their_area():
    planes = make_planes(3)
    tables = nucleus_weights(planes, LossParams(weight_by="size", power=0.5, max_weight=100))
    areas = np.bincount(planes.read(0).labels.ravel()).astype(float)
    ratio = tables[0][1] / tables[0][2]
    assert ratio == pytest.approx((areas[1] / areas[2]) ** -0.5, rel=1e-4)


def test_a_volume_is_drawn_by_its_nuclei_and_frames_can_be_balanced():
    few, many = make_volumes(1, nuclei=1).infos, make_volumes(1, nuclei=6).infos
    infos = (*few, replace(many[0], frame="t001"))
    assert sample_weights(infos, SamplingParams(), 3) == pytest.approx([1 / 7, 6 / 7])
    assert sample_weights(infos, SamplingParams(balance="frames"), 3) == pytest.approx([0.5, 0.5])


def test_faint_nuclei_of_volumes_can_count_more():
    volumes = make_volumes(1, nuclei=4)
    (weights,) = nucleus_weights(volumes, LossParams(weight_by="contrast"))
    assert weights[0] == 1
    assert (np.diff(weights[1:]) < 0).all()
    assert nucleus_weights(volumes, LossParams()) is None
