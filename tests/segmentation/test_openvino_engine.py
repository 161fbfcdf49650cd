import numpy as np
import pytest
import torch

from nuclei3d.errors import InputError
from nuclei3d.networks.cpnet import new_network
from nuclei3d.segmentation.network_runner import NetworkRunner
from nuclei3d.segmentation.openvino_engine import compile_cpnet, has_openvino
from oracle_network import OracleNetwork

CPU = torch.device("cpu")
needs_openvino = pytest.mark.skipif(not has_openvino(), reason="openvino is not installed (extra 'fast')")


def trained_like(seed: int, width: int = 32) -> torch.nn.Module:
    """A network whose batch normalisation has statistics other than 0 and 1."""
    network = new_network(17, seed, width)
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("running_mean"):
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        elif name.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return network.eval()


@needs_openvino
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize(("shape", "width"), [((1, 2, 32, 48), 32), ((3, 2, 64, 16), 16)])
def test_openvino_computes_what_torch_computes(precision, tolerance, shape, width):
    network = trained_like(1, width)
    stack = np.random.default_rng(0).random(shape, dtype=np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(stack))[0].numpy()
    found = compile_cpnet(network.state_dict(), precision, 1)(stack)
    assert np.abs(found - expected).max() < tolerance * max(1, np.abs(expected).max())


@needs_openvino
def test_in_int8_it_says_nearly_the_same():
    network = trained_like(1, 16)
    stack = np.random.default_rng(0).random((2, 2, 64, 48), dtype=np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(stack))[0].numpy()
    found = compile_cpnet(network.state_dict(), torch.int8, 1)(stack)
    error = np.abs(found - expected).max() / expected.std()
    # not the same: it does compute in 8 bits
    assert 1e-3 < error < 0.3


@needs_openvino
def test_new_weights_are_compiled_anew():
    plane = np.random.default_rng(0).random((1, 32, 32), dtype=np.float32)
    network = trained_like(1)
    before = NetworkRunner(network, CPU, engine="openvino")(plane)
    network.load_state_dict(trained_like(2).state_dict())
    after = NetworkRunner(network, CPU, engine="openvino")(plane)
    np.testing.assert_allclose(after, NetworkRunner(network, CPU, engine="torch")(plane), atol=1e-5)
    assert np.abs(after - before).max() > 1e-3


def test_wishes_that_cannot_be_met_are_explained(monkeypatch):
    with pytest.raises(InputError, match="unknown"):
        NetworkRunner(new_network(17, 0), CPU, engine="tensorrt")
    with pytest.raises(InputError, match="int8 is computed by OpenVINO only"):
        NetworkRunner(new_network(17, 0), CPU, engine="torch", precision=torch.int8)
    monkeypatch.setattr("nuclei3d.segmentation.openvino_engine.has_openvino", lambda: True)
    with pytest.raises(InputError, match="CNN on the CPU only"):
        NetworkRunner(OracleNetwork(separate=True), CPU, engine="openvino")
    monkeypatch.setattr("nuclei3d.segmentation.openvino_engine.has_openvino", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'nuclei3d\[fast\]'"):
        NetworkRunner(new_network(17, 0), CPU, precision=torch.int8)
