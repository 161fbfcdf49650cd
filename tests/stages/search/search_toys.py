"""Stand-ins for a training, quick enough to search with; in a module so that workers can be sent them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import log10, nan
from pathlib import Path
from typing import Any

from nuclei3d.errors import InputError
from nuclei3d.stages.search.objective import TrialJob

HERE = Path(__file__).parent

Report = Callable[[Any], None]


@dataclass(frozen=True)
class ToyEpoch:
    epoch: int
    validation_loss: float
    volume_ap: float = nan

    def __getitem__(self, name: str) -> float:
        return getattr(self, name)

    def metrics(self) -> dict[str, float]:
        return {"validation_loss": self.validation_loss}


def start_elsewhere(code: str, *arguments: object, epoch_s: float = 0.05) -> subprocess.Popen[bytes]:
    """Run code that may import the tests in a process of its own, with trainings that take time."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        "TOY_EPOCH_S": str(epoch_s),
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)


def distance(job: TrialJob) -> float:
    """How far the learning rate is from its best value, 1e-3, in factors of ten."""
    return abs(log10(job.params.train.learning_rate) + 3)


def bowl(job: TrialJob, report: Report) -> float:
    """Best at a learning rate of 1e-3; the loss falls with the epochs; writes a model folder."""
    pause = float(os.environ.get("TOY_EPOCH_S", "0"))
    for epoch in range(1, job.params.train.epochs + 1):
        time.sleep(pause)
        report(ToyEpoch(epoch, distance(job) + 1 / epoch))
    model = job.folder / job.params.train.name
    model.mkdir(parents=True, exist_ok=True)
    (model / "model.json").write_text("{}")
    return 1 - distance(job)


def by_seed(job: TrialJob, report: Report) -> float:
    """With seed 0 the trial at 1e-2 seems the better one, with every other seed it is not."""
    lucky = job.params.seed == 0 and job.params.train.learning_rate > 1e-3
    return 2.0 if lucky else 1 - distance(job)


def annealed(job: TrialJob, report: Report) -> float:
    """A loss that falls to 1/epochs with an annealed rate, and stays high as long as the rate is high."""
    epochs = job.params.train.epochs
    for epoch in range(1, epochs + 1):
        rate = 1 - epoch / epochs
        report(ToyEpoch(epoch, rate + 1 / epochs))
    return 1 - 1 / epochs


def memory_hungry(job: TrialJob, report: Report) -> float:
    if job.params.train.batch_size > 16:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    return 1.0


def broken_for_large_batches(job: TrialJob, report: Report) -> float:
    if job.params.train.batch_size > 16:
        raise ZeroDivisionError("a real fault")
    return 1.0


def unusable_input(job: TrialJob, report: Report) -> float:
    raise InputError("there are no slices")


def dies_once(job: TrialJob, report: Report) -> float:
    """Kill the own process the first time, as the system does where memory is short."""
    job.folder.mkdir(parents=True, exist_ok=True)
    mark = job.folder / "was here"
    if job.folder.name == "0002" and not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), 9)
    return 1 - distance(job)


def stopped_by_user(job: TrialJob, report: Report) -> float:
    report(ToyEpoch(1, 1.0))
    raise KeyboardInterrupt
