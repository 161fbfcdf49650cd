"""Kill a search at random times, start it again each time, and check that nothing was lost.

    python benchmarks/search_kills.py --kills 20 --json

A search with a quick stand-in for the training is killed (SIGKILL, with its workers) at random times and
started again with the same command. Once it ends, the study must hold exactly the wanted number of finished
and pruned trials and no other ones, MLflow one run for each in the right state and none left open.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import Any

from nuclei3d.config import load_params
from nuclei3d.stages.search.objective import TrialJob
from nuclei3d.stages.search.study import search
from shared import new_parser

_STATUS_OF = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True)
class ToyReport:
    """What the search reads of an epoch."""

    epoch: int
    validation_loss: float
    volume_ap: float = float("nan")

    def metrics(self) -> dict[str, float]:
        """Give what MLflow is to have of it."""
        return {"validation_loss": self.validation_loss}


def toy_training(job: TrialJob, on_epoch: Callable[[Any], None]) -> float:
    """Stand in for a training: the loss falls with the epochs to a floor that the parameters set."""
    chosen = job.params.train
    floor = 0.2 + (log10(chosen.learning_rate) + 3) ** 2 + 0.1 * abs(log10(chosen.weight_decay) + 4)
    epoch_s = float(os.environ.get("TOY_EPOCH_S", "0.1"))
    for epoch in range(1, chosen.epochs + 1):
        time.sleep(epoch_s)
        on_epoch(ToyReport(epoch, floor + 1 / epoch))
    return 1 / (1 + floor + 1 / chosen.epochs)


def start(folder: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--child", str(folder), "--trials", str(options.trials)]
    command += ["--workers", str(options.workers)]
    command += ["--storage", options.storage] if options.storage else []
    # a session of its own, so that a kill takes the workers too
    return subprocess.Popen(command, start_new_session=True, stderr=(folder / "log.txt").open("ab"))


def run_child(folder: Path, options: argparse.Namespace) -> None:
    (folder / "slices").mkdir(exist_ok=True)
    overrides = [f"tracking.uri=sqlite:///{folder}/mlflow.db", f"search.study={folder.name}"]
    overrides += ["search.heartbeat_s=1", "search.grace_s=4", "search.max_retries=50"]
    params = load_params(None, overrides)
    search(
        params,
        folder / "slices",
        folder / "search",
        trials=options.trials,
        storage=options.storage,
        workers=options.workers,
        objective=toy_training,
    )


def dies_in_time(process: subprocess.Popen[bytes], log: Path, draw: random.Random, longest: float) -> bool:
    """Wait a random time, mostly from when trials run, else from the very start; tell if it ended."""
    deadline = time.monotonic() + draw.uniform(0, longest)
    if draw.random() < 2 / 3:
        size = log.stat().st_size
        while process.poll() is None and log.stat().st_size == size:
            time.sleep(0.05)
        deadline = time.monotonic() + draw.uniform(0, longest / 4)
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    return process.poll() is not None


def check(folder: Path, trials: int) -> dict[str, int]:
    """Count what is wrong with a search that has ended."""
    import mlflow

    rows = json.loads((folder / "search" / "study.json").read_text())["trials"]
    states = Counter(row["state"] for row in rows)
    runs: dict[str, list[str]] = {}
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiments = [found.experiment_id for found in client.search_experiments()]
    parents = 0
    for run in client.search_runs(experiments, max_results=1000):
        key = run.data.tags.get("nuclei3d.trial")
        if key is None:
            # one that was killed before the study could remember it is closed as KILLED
            parents += run.info.status == "RUNNING"
        else:
            runs.setdefault(key, []).append(run.info.status)
    with (folder / "search" / "study.csv").open() as file:
        in_table = sum(1 for _ in csv.DictReader(file))
    return {
        "finished": states["finished"],
        "pruned": states["pruned"],
        "killed_trials": sum(row["attempts"] - 1 for row in rows),
        "failed": states["failed"],
        "miscounted": abs(states["finished"] + states["pruned"] - trials),
        "wrong_runs": sum(runs.get(row["trial"]) != [_STATUS_OF.get(row["state"], "")] for row in rows),
        "extra_runs": len(set(runs) - {row["trial"] for row in rows}),
        "open_parents": parents,
        "left_over": states["running"] + states["waiting"],
        "not_in_table": len(rows) - in_table,
    }


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--storage", help="postgresql://... ; a journal file if left out")
    parser.add_argument("--longest", type=float, default=15.0, help="seconds before a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        run_child(options.child, options)
        return
    draw = random.Random(options.seed)
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="search_kills_") as scratch:
        while totals["kills"] < options.kills:
            folder = Path(scratch) / f"search{totals['searches']}_{os.getpid()}"
            folder.mkdir()
            totals["searches"] += 1
            ended = False
            while not ended:
                process = start(folder, options)
                may_kill = totals["kills"] < options.kills
                if may_kill and not dies_in_time(process, folder / "log.txt", draw, options.longest):
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    totals["kills"] += 1
                elif process.wait() != 0:
                    raise SystemExit((folder / "log.txt").read_text()[-4000:])
                else:
                    ended = True
            totals.update(check(folder, options.trials))
    right = ("kills", "searches", "finished", "pruned", "killed_trials")
    result = {**totals, "wrong": sum(count for name, count in totals.items() if name not in right)}
    print(json.dumps(result) if options.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
