import numpy as np
import pytest
import torch
from cellpose.train import _loss_fn_seg

from nuclei3d.training.losses import cellpose_loss, losses_of_crops


@pytest.fixture
def example():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(2, 3, 16, 16, generator=generator)
    flows = torch.randn(2, 2, 16, 16, generator=generator)
    foreground = torch.rand(2, 16, 16, generator=generator) > 0.5
    return output, flows, foreground


def test_the_loss_is_that_of_cellpose(example):
    output, flows, foreground = example
    target = np.concatenate([foreground[:, None].float().numpy(), flows.numpy()], axis=1)
    theirs = _loss_fn_seg(target, output, torch.device("cpu"))
    assert float(cellpose_loss(output, flows, foreground).total) == pytest.approx(float(theirs), rel=1e-6)


def test_weights_of_one_change_nothing(example):
    output, flows, foreground = example
    plain = cellpose_loss(output, flows, foreground)
    weighted = cellpose_loss(output, flows, foreground, torch.ones(2, 16, 16))
    assert float(plain.flow) == pytest.approx(float(weighted.flow), rel=1e-6)
    assert float(plain.probability) == pytest.approx(float(weighted.probability), rel=1e-6)


def test_a_pixel_of_weight_three_counts_three_times(example):
    output, flows, foreground = example
    weights = torch.ones(2, 16, 16)
    weights[0, 3, 4] = 3
    one = (slice(0, 1), slice(None), slice(3, 4), slice(4, 5))
    pixel = cellpose_loss(output[one], flows[one], foreground[0:1, 3:4, 4:5])
    difference = cellpose_loss(output, flows, foreground, weights).total - cellpose_loss(*example).total
    assert float(difference) == pytest.approx(2 * float(pixel.total) / (2 * 16 * 16), rel=1e-3)


def test_losses_of_crops_are_those_of_each_crop_alone():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(3, 3, 16, 16, generator=generator)
    flows = torch.randn(3, 2, 16, 16, generator=generator)
    foreground = torch.rand(3, 16, 16, generator=generator) > 0.4
    found = losses_of_crops(output, flows, foreground)
    for i in range(3):
        alone = cellpose_loss(output[i : i + 1], flows[i : i + 1], foreground[i : i + 1])
        torch.testing.assert_close(found[i], torch.stack([alone.flow, alone.probability]))
