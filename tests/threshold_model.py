"""A model that needs no network: it thresholds, and waits where a test says so. Workers open it by name."""

import base64
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from nuclei3d.config import Params
from nuclei3d.config.sections import PredictParams
from nuclei3d.experiment.invocation import Admission, RequestParams, VolumeLimits, open_frame, read_volume
from nuclei3d.images.tiff import write_labels
from nuclei3d.networks.folder import ModelInfo

INFO = ModelInfo(diameter_px=40, nucleus_diameter_um=4)
VERSION = {"name": "threshold", "registered_name": "threshold", "version": "3", "weights_sha256": "0"}


class Gate:
    """Files by which a test and the model in another process know of each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held = folder / "held"
        self._begun = folder / "begun"
        self._deed = folder / "deed"
        folder.mkdir(exist_ok=True)

    def hold(self) -> None:
        self._held.touch()

    def release(self) -> None:
        self._held.unlink(missing_ok=True)

    def bid(self, deed: str) -> None:
        """Have the model do something in place of its work: raise, die, eat."""
        self._deed.write_text(deed)

    @property
    def begun(self) -> int:
        return self._begun.stat().st_size if self._begun.exists() else 0

    def pass_through(self) -> None:
        with self._begun.open("ab") as file:
            file.write(b".")
        while self._held.exists():
            time.sleep(0.005)
        deed = self._deed.read_text() if self._deed.exists() else ""
        if deed == "raise":
            raise RuntimeError(f"secret path {self.folder}")
        if deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "eat":
            eaten = [np.ones(30_000_000) for _ in range(8)]
            time.sleep(30)
            del eaten


class ThresholdModel:
    """Labels what is brighter than 100."""

    def __init__(
        self, gate: Path, limits: VolumeLimits, score: float | None, version: dict[str, str]
    ) -> None:
        self.gate = Gate(gate)
        self.version = version
        self.limits = limits
        self.score = score

    def segment_file(self, file: Path, asked: RequestParams, folder: Path) -> dict[str, Any]:
        self.gate.pass_through()
        frame, voxel_size = open_frame(file, asked, self.limits.max_voxels)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            out = Path(temporary) / "labels.tif"
            write_labels(out, (read_volume(frame) > 100).astype(np.uint32), voxel_size)
            labels = base64.b64encode(out.read_bytes()).decode()
        return {
            "labels": labels,
            "nuclei": [
                {"label": 1, "z_um": 1.0, "y_um": 2.0, "x_um": 3.0, "volume_um3": 4.0, "mean_intensity": 5.0}
                | {"score": self.score}
            ],
            "parameters": asked.model_dump(mode="json", exclude_unset=True),
            "model": self.version,
            "seconds": {"network": 0.0},
        }


def open_threshold(
    gate: Path, params: Params, score: float | None, version: dict[str, str]
) -> ThresholdModel:
    return ThresholdModel(gate, VolumeLimits.of(params.serve.model_dump()), score, version)


def open_admission(params: Params) -> Admission:
    return Admission(VolumeLimits.of(params.serve.model_dump()), INFO, PredictParams())
