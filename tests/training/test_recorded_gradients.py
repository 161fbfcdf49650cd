import numpy as np
import pytest
import torch

from nuclei3d.training.examples import Batch
from nuclei3d.training.learner import RecordedGradients
from nuclei3d.training.losses import network_loss

pytestmark = pytest.mark.gpu


def random_batch(count: int, seed: int, *, weighted: bool) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    foreground = torch.rand(count, 32, 32, generator=generator) > 0.5
    batch = Batch(
        torch.randn(count, 2, 32, 32, generator=generator),
        foreground,
        torch.randn(count, 2, 32, 32, generator=generator),
        torch.rand(count, 32, 32, generator=generator) if weighted else None,
        foreground.int().numpy(),
        np.zeros(count, np.int64),
    )
    return batch.copied(torch.Tensor.pin_memory).to(torch.device("cuda"))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_replayed_step_has_the_gradients_of_an_eager_one_also_after_a_smaller_batch(weighted):
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 1)).cuda()

    def compute(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        for parameter in network.parameters():
            parameter.grad = None
        output = network(batch.images)
        loss = network_loss(output, batch.flows, batch.foreground, batch.weights)
        loss.total.backward()
        return output.detach(), torch.stack([loss.flow.detach(), loss.probability.detach()])

    recorded = RecordedGradients(compute, network)
    for step, count in enumerate([4, 4, 4, 4, 4, 3, 4, 4]):
        batch = random_batch(count, step, weighted=weighted)
        found = [value.clone() for value in recorded(batch)]
        found += [parameter.grad.clone() for parameter in network.parameters()]
        expected = list(compute(batch)) + [parameter.grad for parameter in network.parameters()]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
