"""The recipe for volumes larger than a node's memory (docs/slurm/blocks.py), with a stand-in for Slurm."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

RECIPE = Path(__file__).parents[1] / "docs" / "slurm" / "blocks.py"


@pytest.fixture
def blocks() -> ModuleType:
    pytest.importorskip("dask_jobqueue", reason="the extra 'slurm' is not installed")
    spec = importlib.util.spec_from_file_location("blocks", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_job_runs_one_block_at_a_time_on_all_its_processors(blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = "--memory 60 --cpus 8 --gres gpu:1 -- a.ome.zarr --model m --out o"
    with blocks.start_cluster(blocks.read_arguments(given.split())) as cluster:
        script = cluster.job_script()
    for part in ("--cpus-per-task=8", "--gres=gpu:1", "--nthreads 1 ", "OMP_NUM_THREADS=8", "--mem=70G"):
        assert part in script


@pytest.mark.slow(reason="starts a scheduler and a worker process")
def test_the_recipe_submits_its_jobs_and_predicts_with_them(blocks, tmp_path, monkeypatch):
    """The stand-in for sbatch runs the job at once, that for predict asks the scheduler for its workers."""
    monkeypatch.chdir(tmp_path)
    # like Slurm it keeps a copy: the script is gone as soon as it is submitted
    runs_it = 'cp "$1" job.sh\nbash job.sh >/dev/null 2>&1 &\necho "Submitted batch job $!"'
    for name, body in (("sbatch", runs_it), ("scancel", "kill $1")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    seen = []

    def runs(command: list[str], check: bool) -> object:
        from distributed import Client

        with Client(command[command.index("--scheduler") + 1]) as client:
            client.wait_for_workers(1, timeout=60)
            seen.append((command, client.submit(sum, [1, 2]).result()))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(blocks, "subprocess", SimpleNamespace(run=runs))
    given = "--jobs 1 --memory 1 --cpus 1 -- a.ome.zarr --model m --out o --set predict.mode=stitch"
    monkeypatch.setattr(sys, "argv", ["blocks.py", *given.split()])
    assert blocks.main() == 0
    ((command, answer),) = seen
    assert answer == 3
    assert command[3:10] == ["predict", "a.ome.zarr", "--model", "m", "--out", "o", "--set"]
    assert command[-2:] == ["--memory", "1.0"]
