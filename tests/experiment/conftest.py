import pytest

from nuclei3d.config import Params, load_params


@pytest.fixture
def params(own_store: str) -> Params:
    """Parameters with a store of this test's own."""
    return load_params(None, [own_store, "train.device=cpu", "predict.device=cpu"])
