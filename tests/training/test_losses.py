import math

import numpy as np
import pytest
import torch
from cellpose.train import _loss_fn_seg

from nuclei3d.config.sections import Full3dParams
from nuclei3d.training.losses import CELLPOSE_TERMS, FlowFigures, LossTerms, losses_of_crops, network_loss

THIRD = (1 / 3,) * 3


@pytest.fixture
def planes():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(2, 3, 16, 16, generator=generator)
    flows = torch.randn(2, 2, 16, 16, generator=generator)
    foreground = torch.rand(2, 16, 16, generator=generator) > 0.5
    return output, flows, foreground


def test_the_loss_is_that_of_cellpose(planes):
    output, flows, foreground = planes
    target = np.concatenate([foreground[:, None].float().numpy(), flows.numpy()], axis=1)
    theirs = _loss_fn_seg(target, output, torch.device("cpu"))
    assert float(network_loss(output, flows, foreground).total) == pytest.approx(float(theirs), rel=1e-6)


def test_weights_of_one_change_nothing(planes):
    output, flows, foreground = planes
    plain = network_loss(output, flows, foreground)
    weighted = network_loss(output, flows, foreground, torch.ones(2, 16, 16))
    assert float(plain.flow) == pytest.approx(float(weighted.flow), rel=1e-6)
    assert float(plain.probability) == pytest.approx(float(weighted.probability), rel=1e-6)


def test_a_pixel_of_weight_three_counts_three_times(planes):
    output, flows, foreground = planes
    weights = torch.ones(2, 16, 16)
    weights[0, 3, 4] = 3
    one = (slice(0, 1), slice(None), slice(3, 4), slice(4, 5))
    pixel = network_loss(output[one], flows[one], foreground[0:1, 3:4, 4:5])
    difference = network_loss(output, flows, foreground, weights).total - network_loss(*planes).total
    assert float(difference) == pytest.approx(2 * float(pixel.total) / (2 * 16 * 16), rel=1e-3)


def test_losses_of_crops_are_those_of_each_crop_alone():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(3, 3, 16, 16, generator=generator)
    flows = torch.randn(3, 2, 16, 16, generator=generator)
    foreground = torch.rand(3, 16, 16, generator=generator) > 0.4
    found = losses_of_crops(output, flows, foreground)
    for i in range(3):
        alone = network_loss(output[i : i + 1], flows[i : i + 1], foreground[i : i + 1])
        torch.testing.assert_close(found[i], torch.stack([alone.flow, alone.probability]))


@pytest.fixture
def volumes():
    rng = np.random.default_rng(0)
    flows = rng.normal(size=(2, 3, 4, 6, 6)) * np.array([0.1, 1.0, 1.0]).reshape(1, 3, 1, 1, 1)
    foreground = rng.random((2, 4, 6, 6)) < 0.4
    flows *= foreground[:, None]
    output = rng.normal(size=(2, 4, 4, 6, 6))
    made, true = (torch.from_numpy(a.astype(np.float32)) for a in (output, flows))
    return made, true, torch.from_numpy(foreground)


def test_the_parts_of_a_volumes_loss_are_those_of_their_formulas(volumes):
    output, flows, foreground = volumes
    params = Full3dParams(flow_weight=2.0, dice_weight=3.0, probability_weight=0.5)
    variances = (0.01, 1.0, 1.0)
    loss = network_loss(output, flows, foreground, terms=LossTerms.of_volumes(params, variances))
    o, f, m = (tensor.double().numpy() for tensor in (output, flows, foreground))
    inside = m[:, None].astype(bool) & np.ones_like(f, bool)
    error = np.where(inside, (o[:, :3] / 5 - f) ** 2, 0).sum(axis=(0, 2, 3, 4)) / m.sum()
    assert float(loss.flow) == pytest.approx(2 * (error / (3 * np.array(variances))).sum(), rel=1e-5)
    p = 1 / (1 + np.exp(-o[:, 3]))
    assert float(loss.entropy) == pytest.approx(
        -0.5 * np.where(m > 0, np.log(p), np.log(1 - p)).mean(), rel=1e-5
    )
    dice = 1 - (2 * (p * m).sum() + 1) / (p.sum() + m.sum() + 1)
    assert float(loss.dice) == pytest.approx(3 * dice, rel=1e-5)
    assert float(loss.total) == pytest.approx(float(loss.flow + loss.entropy + loss.dice))


def test_balanced_a_flow_of_zero_costs_the_same_on_every_axis(volumes):
    _, flows, foreground = volumes
    m = foreground[:, None]
    variances = tuple(float((flows[:, a : a + 1].square() * m).sum() / m.sum()) for a in range(3))
    terms = LossTerms.of_volumes(Full3dParams(), variances)
    output = torch.cat([5 * flows, torch.zeros(2, 1, 4, 6, 6)], dim=1)
    costs = []
    for axis in range(3):
        wrong = output.clone()
        wrong[:, axis] = 0
        costs.append(float(network_loss(wrong, flows, foreground, terms=terms).flow))
    assert costs == pytest.approx([5 / 3] * 3, rel=1e-4)
    plain = LossTerms.of_volumes(Full3dParams(balance_axes=False), variances)
    wrong = output.clone()
    wrong[:, 0] = 0
    assert float(network_loss(wrong, flows, foreground, terms=plain).flow) < 0.1


def test_flows_outside_nuclei_cost_nothing_and_weights_multiply(volumes):
    output, flows, foreground = volumes
    terms = LossTerms.of_volumes(Full3dParams(), THIRD)
    base = network_loss(output, flows, foreground, terms=terms)
    moved = output.clone()
    moved[:, :3] += torch.where(foreground[:, None], 0.0, 7.0)
    assert float(network_loss(moved, flows, foreground, terms=terms).flow) == pytest.approx(float(base.flow))
    double = network_loss(output, flows, foreground, torch.full(foreground.shape, 2.0), terms)
    assert float(double.flow) == pytest.approx(2 * float(base.flow))
    assert float(double.entropy) == pytest.approx(2 * float(base.entropy))


@pytest.mark.parametrize("axes", [2, 3])
def test_where_nobody_looked_there_is_no_loss(axes):
    generator = torch.Generator().manual_seed(0)
    shape = (2, *(8,) * axes)
    output = torch.randn(2, axes + 1, *shape[1:], generator=generator, requires_grad=True)
    foreground = torch.rand(shape, generator=generator) > 0.5
    weights = torch.ones(shape)
    weights[:, :4] = 0
    foreground[:, :4] = False
    flows = torch.randn(2, axes, *shape[1:], generator=generator) * foreground[:, None]
    terms = CELLPOSE_TERMS if axes == 2 else LossTerms(dice=1.0, flow_axes=(1.0, 1.0, 1.0))
    network_loss(output, flows, foreground, weights, terms).total.backward()
    assert not output.grad[:, :, :4].any()
    assert output.grad[:, :, 4:].any()


def test_a_patch_without_nuclei_has_a_finite_loss(volumes):
    output, flows, foreground = volumes
    terms = LossTerms.of_volumes(Full3dParams(), THIRD)
    loss = network_loss(output, flows * 0, foreground & False, terms=terms)
    assert math.isfinite(float(loss.total))
    assert float(loss.flow) == 0


def test_figures_tell_each_axis_and_do_not_depend_on_batches(volumes):
    output, flows, foreground = volumes
    output = torch.cat([5 * flows, 10 * (foreground[:, None].float() - 0.5)], dim=1)
    output[:, 0] = torch.randn(output[:, 0].shape, generator=torch.Generator().manual_seed(0))
    output[:, 2] *= 0.5
    whole, parts = FlowFigures(), FlowFigures()
    assert whole.figures() == {}
    whole.add(output, flows, foreground)
    for i in range(2):
        parts.add(output[i : i + 1], flows[i : i + 1], foreground[i : i + 1])
    figures = whole.figures()
    assert figures == pytest.approx(parts.figures(), abs=1e-6)
    assert abs(figures["flow_cosine_z"]) < 0.2
    assert figures["flow_cosine_y"] == pytest.approx(1)
    assert figures["flow_mse_y"] == pytest.approx(0, abs=1e-9)
    # half as long: the direction is right, the length is not
    assert figures["flow_cosine_x"] == pytest.approx(1)
    assert figures["flow_mse_x"] > 0.1
    assert figures["dice"] == pytest.approx(1)
