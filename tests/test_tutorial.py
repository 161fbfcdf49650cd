"""The tutorial's commands run as they are typed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml

from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import ModelInfo, save_model
from pages_fixture import BLOCK, ROOT, environment


@pytest.mark.slow  # a dozen processes that import torch: about a minute on two quiet cores
def test_the_commands_of_the_tutorial_run(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text()
    (parameters,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    tree = yaml.safe_load(parameters)
    tree["train"].update(crops_per_epoch=8, validation_crops=2)
    tree["train"]["fine_tune"].update(epochs=1)
    tree["evaluate"].update(bootstrap=50)
    tree["simulate"].update(frames=1, shape=[16, 56, 56], nuclei=6)
    folder = tmp_path / "tutorial"
    folder.mkdir()
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))
    info = ModelInfo(diameter_px=12.0, nucleus_diameter_um=9.0)
    save_model(tmp_path / "out" / "models" / "nuclei_3d", new_network(12.0, 0), info, "")
    lines = [body for kind, body in BLOCK.findall(page) if kind == "bash"]
    # as typed: the shell's loops and copies too
    script = "\n".join(['nuclei3d() { "$PYTHON" -m nuclei3d "$@"; }', *lines])
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=folder,
        env=environment() | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for embryo in tree["simulate"]["embryos"]:
        (truth,) = (folder / "lab" / embryo / "labels").glob("*.tif")
        (taken,) = (folder / "data" / embryo / "labels").glob("*.tif")
        assert np.array_equal(tifffile.imread(taken), tifffile.imread(truth))
    compared = json.loads((folder / "compare.json").read_text())
    assert compared["volumes"] == 1
    assert compared["start_models"]["b"]["name"] == "start model (../out/models/nuclei_3d)"
