"""A 3D model over HTTP: the masks of this process, and one line for what it cannot do."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nuclei3d.config import Params, load_params
from nuclei3d.errors import InputError
from nuclei3d.images.tiff import write_image
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.serve import Service
from nuclei3d.stages.predict import predict
from nuclei3d.worker import Worker
from oracle_network import load_oracle, save_oracle

Running = Callable[[Service], AbstractContextManager[Any]]
PARAMS = load_params(None, ["predict.device=cpu", "serve.port=0"])


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("nuclei3d.networks.folder.load_model", load_oracle)
    return save_oracle(tmp_path / "solid")


@pytest.fixture
def service(model: Path, tmp_path: Path) -> Service:
    segmenter = Worker("model", "oracle_network:serve_oracle", str(model), PARAMS, memory_gb=4)
    reader = Worker("reader", "nuclei3d.experiment.invocation:open_admission", model, PARAMS, memory_gb=4)
    segmenter.start()
    reader.start()
    _, version = segmenter.call("nuclei3d.experiment.serving_model:describe")
    return Service(PARAMS.serve, reader, segmenter, version, tmp_path)


@pytest.fixture
def frame(tmp_path: Path) -> Path:
    """Nine balls of 12 um in a noisy volume."""
    image = np.random.default_rng(0).integers(95, 105, (12, 60, 60))
    z, y, x = np.mgrid[:12, :60, :60]
    for number in range(9):
        cy, cx = 10 + 20 * (number // 3), 10 + 20 * (number % 3)
        image[(2 * (z - 6)) ** 2 + (y - cy) ** 2 + (x - cx) ** 2 < 36] += 300
    write_image(tmp_path / "embryo.tif", image.astype(np.uint16), VoxelSize(2.0, 1.0, 1.0))
    return tmp_path / "embryo.tif"


def test_a_service_gives_the_files_of_prediction_here(
    run_service: Running, service: Service, model: Path, frame: Path, tmp_path: Path
) -> None:
    local = predict(PARAMS, [frame], str(model), tmp_path / "local").frames[0]
    with run_service(service) as running:
        remote = predict(Params(), [frame], running.url, tmp_path / "remote").frames[0]
    assert remote.nuclei == local.nuclei == 9
    assert remote.masks.read_bytes() == local.masks.read_bytes()
    assert remote.table.read_bytes() == local.table.read_bytes()


@pytest.mark.parametrize("mode", ["ortho", "stitch", "cellpose"])
def test_a_mode_of_planes_is_refused_in_one_line(
    run_service: Running, service: Service, frame: Path, tmp_path: Path, mode: str
) -> None:
    wishes = load_params(None, [f"predict.mode={mode}"])
    with (
        run_service(service) as running,
        pytest.raises(InputError, match=rf"\(400\): mode '{mode}' is not for .* use full3d$") as raised,
    ):
        predict(wishes, [frame], running.url, tmp_path / "remote")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("remote/*_masks*"))
