import pytest
import torch
from cellpose.resnet_torch import CPnet

from nuclei3d.errors import InputError
from nuclei3d.networks.cpnet import choose_device, new_network


def test_a_new_network_is_the_one_that_cellpose_builds():
    ours = new_network(17.0, seed=0)
    theirs = CPnet([2, 32, 64, 128, 256], 3, sz=3, max_pool=True, diam_mean=17.0)
    assert {n: v.shape for n, v in ours.state_dict().items()} == {
        n: v.shape for n, v in theirs.state_dict().items()
    }
    assert ours.diam_mean.item() == 17.0
    assert 6.5e6 < sum(p.numel() for p in ours.parameters()) < 6.7e6


def test_a_narrow_network_has_its_part_of_the_weights():
    def kernels(width):
        return sum(p.numel() for p in new_network(17.0, 0, width).parameters() if p.ndim == 4)

    assert new_network(17.0, 0, 16).nbase == [2, 16, 32, 64, 128]
    assert kernels(16) / kernels(32) == pytest.approx(0.25, abs=0.01)
    assert kernels(24) / kernels(32) == pytest.approx(0.5625, abs=0.01)


def test_the_seed_decides_and_the_global_generator_stays():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = new_network(30, 1), new_network(30, 1), new_network(30, 2)
    assert torch.equal(torch.rand(3), expected)
    name = "downsample.down.res_down_0.conv.conv_0.2.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_devices():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="unknown"):
        choose_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_absent_cuda_is_an_input_error():
    with pytest.raises(InputError, match="no CUDA device"):
        choose_device("cuda")
