"""Checkpoints of a training, in ``<model folder>.checkpoint``: last.pt, best_<epoch>.pt and history.csv."""

from __future__ import annotations

import csv
import hashlib
import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nuclei3d.config import params_as_dict
from nuclei3d.config.sections import TrainParams
from nuclei3d.console import say
from nuclei3d.outputs import whole_file
from nuclei3d.training.state import METRICS, EpochReport, TrainingState

_NO_INFLUENCE = ("name", "patience", "select", "workers", "memory_limit_gb", "device")
"""Parameters that decide when to stop, what to keep or where to compute, not what an epoch does."""


def training_fingerprint(params: TrainParams, seed: int, slices_digest: str, start_digest: str) -> str:
    """Digest everything that decides the weights; a checkpoint is used only if its fingerprint is the same.

    With the constant schedule the number of epochs does not count, so that a training can be prolonged.
    """
    chosen = params_as_dict(params)
    for name in _NO_INFLUENCE:
        del chosen[name]
    if params.schedule == "constant":
        del chosen["epochs"]
    text = json.dumps([chosen, seed, slices_digest, start_digest], sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def checkpoint_folder(model: Path) -> Path:
    """Give the folder of the checkpoints of a model folder."""
    return model.with_name(model.name + ".checkpoint")


def finished_file(model: Path) -> Path:
    """Give the file that says what the finished training of a model folder was made from, and its result."""
    return checkpoint_folder(model) / "finished.json"


class Checkpoints:
    """Writes and reads the checkpoints of the training of one model folder; every file appears whole."""

    def __init__(self, model: Path, fingerprint: str) -> None:
        self.folder = checkpoint_folder(model)
        self._last = self.folder / "last.pt"
        self._fingerprint = fingerprint

    def _best(self, epoch: int) -> Path:
        return self.folder / f"best_{epoch:05d}.pt"

    def save(self, state: TrainingState, is_best: bool) -> None:
        """Write a state; at any moment last.pt and the best weights that it names are there."""
        if is_best:
            with whole_file(self._best(state.best_epoch)) as path:
                torch.save(state.best, path)
        with whole_file(self._last) as path:
            torch.save({"fingerprint": self._fingerprint, "state": state.as_plain()}, path)
        for path in self.folder.glob("best_*.pt"):
            if path != self._best(state.best_epoch):
                path.unlink()
        write_history(self.folder / "history.csv", state.history)

    def load(self) -> TrainingState | None:
        """Read the last state; None if there is none or (said aloud) it is unusable or out of date."""
        if not self._last.is_file():
            return None
        try:
            saved = torch.load(self._last, map_location="cpu", weights_only=True)
            if saved["fingerprint"] != self._fingerprint:
                say(
                    f"the parameters or the slices changed since the checkpoint in {self.folder}; "
                    "training starts afresh"
                )
                return None
            best: dict[str, Any] = {}
            if saved["state"]["best_epoch"]:
                path = self._best(saved["state"]["best_epoch"])
                best = torch.load(path, map_location="cpu", weights_only=True)
            return TrainingState.from_plain(saved["state"], best)
        except (
            OSError,
            pickle.UnpicklingError,
            RuntimeError,
            EOFError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:
            reason = " ".join(str(error).split())[:200]
            say(f"the checkpoint in {self.folder} cannot be read ({reason}); training starts afresh")
            return None

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_history(path: Path, history: Sequence[EpochReport]) -> None:
    """Write one row per epoch; what was not measured stays empty."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("epoch", *METRICS), lineterminator="\n")
        writer.writeheader()
        for report in history:
            measured = {name: f"{value:.6g}" for name, value in report.metrics().items()}
            writer.writerow({"epoch": report.epoch, **measured})
