"""Kill commands (SIGKILL) at random times, start them again each time, and compare what they made.

    python benchmarks/kills.py [--kills 20] [--commands prepare train predict run search] [--seed 0] [--json]

Each command works on a tiny simulated data set. It is run once without a kill; then, in a folder of its
own, it is killed, alone or with all its children, and started again with the same words, until it was killed
so often and has ended. Both must have made the same: samples, weights, thresholds, masks, tables and scores,
trials and their values. No process may be left over, and no temporary file beside the results.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import tifffile
import yaml

from nuclei3d.config import load_params
from nuclei3d.console import emit_json, say
from nuclei3d.networks.folder import load_model
from nuclei3d.stages.simulate import simulate
from shared import new_parser

PARAMS: dict[str, Any] = {
    # seconds per run: every stage does all that it does, on as little as it can
    "train": {
        "epochs": 3,
        "batch_size": 4,
        "crop_px": 64,
        "crops_per_epoch": 8,
        "validation_crops": 4,
        "diameter_px": 12,
        "device": "cpu",
    },
    # after so short a training, these find nuclei to compare
    "predict": {"cellprob_threshold": -1.0, "min_volume_um3": 0.0},
    "evaluate": {"bootstrap": 50},
    "search": {"epochs": {"low": 2, "high": 3}, "heartbeat_s": 1, "grace_s": 4, "max_retries": 50},
}
SAMPLE = ("simulate.frames=3", "simulate.shape=[10,48,48]", "simulate.nuclei=6")
TRAIN = "train --slices slices --data data --out model"
COMMANDS = {
    "prepare": "prepare --data data --out slices",
    "train": TRAIN,
    "predict": "predict data/embryo_c/images --model model --out masks --track",
    "run": "run --data data --out out",
    "search": "search --slices slices --data data --trials 3 --out found",
}
NEEDS = {"train": ("prepare",), "predict": ("prepare", "train"), "search": ("prepare",)}
#: What may differ: seconds, and the words of the machine and the run.
TIMES = frozenset(
    (
        *("seconds", "crops_per_second", "waited_seconds", "duration_s", "started", "ended", "created"),
        *("run_id", "attempts", "lineage", "versions", "provenance"),
    )
)


def digests_of(folder: Path) -> dict[str, str]:
    """Digest what a command made under a folder, each kind of file by what it says."""
    made: dict[str, str] = {}
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = path.relative_to(folder).as_posix()
        if ".checkpoint" in name or name.startswith(("data/", "mlflow", "mlartifacts")):
            continue
        content: Any = None
        if path.suffix in (".bin", ".npy"):
            content = path.read_bytes()
        elif path.suffix == ".tif":
            content = tifffile.imread(path).tobytes()
        elif path.suffix == ".csv":
            with path.open(newline="") as file:
                content = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
        elif path.name == "metrics.json":
            made |= _by_key(name, json.loads(path.read_text()))
        elif path.name == "model.json":
            model = load_model(path.parent)
            made |= _by_key(name, model.info.model_dump(mode="json"))
            weights = model.network.state_dict()
            made[f"{name}:weights"] = _md5(
                b"".join(weights[key].numpy().tobytes() for key in sorted(weights))
            )
        if content is not None:
            made[name] = _md5(content if isinstance(content, bytes) else repr(content).encode())
    return made


def _by_key(name: str, tree: dict[str, Any]) -> dict[str, str]:
    """Digest the entries of a JSON object one by one, so that a difference has a name."""

    def timeless(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: timeless(inner) for key, inner in value.items() if key not in TIMES}

    return {f"{name}:{key}": _md5(repr(value).encode()) for key, value in timeless(tree).items()}


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def temporary_of(folder: Path) -> Path:
    """Give the folder beside another one that takes the temporary files of its commands."""
    temporary = folder.with_name(f"{folder.name}_tmp")
    temporary.mkdir(exist_ok=True)
    return temporary


def start(words: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, so that a kill takes its children too."""
    command = [sys.executable, "-m", "nuclei3d", *words.split()]
    log = (folder / "log.txt").open("ab")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary_of(folder))}
    return subprocess.Popen(command, cwd=folder, env=environment, process_group=0, stdout=log, stderr=log)


def run_whole(words: str, folder: Path) -> float:
    """Run a command to its end; give its seconds."""
    began = time.monotonic()
    if start(words, folder).wait() != 0:
        raise SystemExit(f"{words}: " + (folder / "log.txt").read_text()[-2000:])
    return time.monotonic() - began


def run_with_kills(words: str, folder: Path, kills: int, longest: float, draw: random.Random) -> int:
    """Kill and start a command again until it was killed so often, or ended; give the number of kills."""
    done = 0
    while done < kills:
        process = start(words, folder)
        try:
            code = process.wait(draw.uniform(0, longest))
        except subprocess.TimeoutExpired:
            if draw.random() < 0.5:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                # the parent alone: its workers must end by themselves
                process.kill()
            process.wait()
            done += 1
            continue
        if code != 0:
            raise SystemExit(f"{words}: " + (folder / "log.txt").read_text()[-2000:])
        return done
    run_whole(words, folder)
    return done


def left_over(folder: Path) -> Iterator[str]:
    """Name processes that work in a folder still, a few seconds later."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and (found := list(_working_in(folder))):
        time.sleep(0.5)
    yield from found if (found := list(_working_in(folder))) else ()


def _working_in(folder: Path) -> Iterator[str]:
    for process in psutil.process_iter(["cwd", "cmdline"]):
        if process.info["cwd"] == str(folder):
            yield " ".join(process.info["cmdline"] or ())[:100]


def new_folder(scratch: Path, name: str, fill: Callable[[Path], None]) -> Path:
    folder = scratch / name
    folder.mkdir()
    fill(folder)
    return folder


def compare(name: str, scratch: Path, ready: Path, options: Any, draw: random.Random) -> dict[str, Any]:
    """Run a command without and with kills from the same start."""
    words = COMMANDS[name]

    def fill(folder: Path) -> None:
        shutil.copytree(ready, folder, dirs_exist_ok=True)

    plain = new_folder(scratch, f"{name}_plain", fill)
    seconds = run_whole(words, plain)
    wanted = digests_of(plain)
    kills = wrong = rounds = 0
    leftovers: list[str] = []
    while kills < options.kills:
        folder = new_folder(scratch, f"{name}_{rounds}", fill)
        kills += run_with_kills(words, folder, options.kills - kills, seconds, draw)
        found = digests_of(folder)
        differing = sorted(
            path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path)
        )
        if differing:
            say(f"{name}: differs in {', '.join(differing[:5])}")
        wrong += len(differing)
        leftovers += left_over(folder)
        leftovers += [path.name for path in folder.rglob("*") if ".partial-" in path.name]
        leftovers += [path.name for path in temporary_of(folder).iterdir()]
        rounds += 1
        shutil.rmtree(folder)
    of = f"{kills} kills in {rounds} runs, {len(wanted)} results"
    say(f"{name}: {of}, {wrong} differ, {len(leftovers)} left over")
    return {"kills": kills, "runs": rounds, "results": len(wanted), "wrong": wrong, "left_over": leftovers}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--commands", nargs="+", choices=tuple(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    report = {}
    with tempfile.TemporaryDirectory(prefix="nuclei3d_kills_") as temporary:
        scratch = Path(temporary).resolve()
        base = scratch / "base"
        base.mkdir()
        simulate(load_params(None, SAMPLE), base / "data")
        (base / "params.yaml").write_text(yaml.safe_dump(PARAMS))
        for name in options.commands:
            ready = scratch / f"{name}_ready"
            shutil.copytree(base, ready)
            for before in NEEDS.get(name, ()):
                run_whole(COMMANDS[before], ready)
            report[name] = compare(name, scratch, ready, options, draw)
    bad = sum(each["wrong"] + len(each["left_over"]) for each in report.values())
    if options.json:
        emit_json({**report, "passed": not bad})
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
