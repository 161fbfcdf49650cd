"""What a training keeps while it runs, to go on from, and when it is finished, to be recognised by."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nuclei3d.console import say
from nuclei3d.digests import digest_of
from nuclei3d.errors import reason_of
from nuclei3d.outputs import whole_file, write_json, write_table
from nuclei3d.training.loop import METRICS, EpochReport, TrainingState

_UNREADABLE = (OSError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class TrainResult:
    """What `train` made.

    `epochs` were done, those before a kill included; the weights of `epoch` were kept, whose figures
    `metrics` has, and `crops_per_second`, the mean over all epochs. `stopped` says why the training ended
    early, or is empty. `done_before`: the same training had been finished before; its model was kept.
    """

    model: Path
    epochs: int
    epoch: int
    stopped: str
    metrics: dict[str, float]
    run_id: str | None
    done_before: bool = False


class Checkpoints:
    """The checkpoints of a training, in ``<model folder>.checkpoint``; every file appears whole.

    They are last.pt, best_<epoch>.pt and history.csv. When the training is finished, finished.json says what
    it was made from, and its result.
    """

    def __init__(self, model: Path) -> None:
        home = model.resolve() if model.is_symlink() else model  # a link stays, what it leads to is replaced
        self.folder = home.with_name(home.name + ".checkpoint")
        self._model = model
        self._last = self.folder / "last.pt"
        self._finished = self.folder / "finished.json"

    def find_finished(self, cause: str) -> TrainResult | None:
        """Find the result of the training that left the model folder as it is now."""
        try:
            record = json.loads(self._finished.read_text(encoding="utf-8"))
            if record["cause"] != cause or record["model_md5"] != digest_of(self._model):
                return None
        except _UNREADABLE:
            return None
        record["result"].pop("warnings", None)  # of versions before
        return TrainResult(**{**record["result"], "model": self._model, "done_before": True})

    def note_finished(self, result: TrainResult, cause: str) -> None:
        """Write what `find_finished` looks for."""
        record = {"cause": cause, "model_md5": digest_of(self._model), "result": asdict(result)}
        write_json(self._finished, record, default=str)

    def _best(self, epoch: int) -> Path:
        return self.folder / f"best_{epoch:05d}.pt"

    def save(self, state: TrainingState, is_best: bool, fingerprint: str) -> None:
        """Write a state; at any moment last.pt and the best weights that it names are there."""
        if is_best:
            with whole_file(self._best(state.best_epoch)) as path:
                torch.save(state.best, path)
        with whole_file(self._last) as path:
            torch.save({"fingerprint": fingerprint, "state": state.as_plain()}, path)
        for path in self.folder.glob("best_*.pt"):
            if path != self._best(state.best_epoch):
                path.unlink()
        write_history(self.folder / "history.csv", state.history)

    def load(self, fingerprint: str) -> TrainingState | None:
        """Read the last state; None if there is none or (said aloud) it is unusable or out of date."""
        if not self._last.is_file():
            return None
        try:
            saved = torch.load(self._last, map_location="cpu", weights_only=True)
            if saved["fingerprint"] != fingerprint:
                say(
                    f"the parameters or the slices changed since the checkpoint in {self.folder}; "
                    "training starts afresh"
                )
                return None
            best: dict[str, Any] = {}
            if saved["state"]["best_score"] > -math.inf:
                path = self._best(saved["state"]["best_epoch"])
                best = torch.load(path, map_location="cpu", weights_only=True)
            return TrainingState.from_plain(saved["state"], best)
        except (*_UNREADABLE, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = reason_of(error, 200)
            say(f"the checkpoint in {self.folder} cannot be read ({reason}); training starts afresh")
            return None


def write_history(path: Path, history: Sequence[EpochReport]) -> None:
    """Write a row an epoch; what is not known is an empty cell."""
    rows = (
        [report.epoch, *("" if math.isnan(report[name]) else f"{report[name]:.6g}" for name in METRICS)]
        for report in history
    )
    write_table(path, ("epoch", *METRICS), rows)
