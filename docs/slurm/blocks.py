"""Segment volumes larger than a node's memory: one Slurm job per worker, started and ended by this script.

    python docs/slurm/blocks.py --jobs 20 --memory 60 -- embryo.ome.zarr --model models/nuclei_3d --out masks

What stands behind `--` goes to `nuclei3d predict`. The script itself needs little and runs where it may stay
for as long as the work takes: on a login node, or as a job of its own. Started again it goes on with the
blocks that are missing.
"""

import argparse
import subprocess
import sys

from dask_jobqueue import SLURMCluster


def start_cluster(arguments: argparse.Namespace) -> SLURMCluster:
    """Describe the jobs; `scale` submits them."""
    extra = [text for text in (arguments.gres and f"--gres={arguments.gres}", "--requeue") if text]
    return SLURMCluster(
        # One block at a time in each job: it computes with all the processors of the job.
        cores=1,
        processes=1,
        job_cpu=arguments.cpus,
        # What blocks are planned for is an estimate.
        memory=f"{1.25 * arguments.memory:.1f}GB",
        walltime=arguments.walltime,
        queue=arguments.partition,
        account=arguments.account,
        job_extra_directives=extra,
        job_script_prologue=[f"export OMP_NUM_THREADS={arguments.cpus} NUMBA_NUM_THREADS={arguments.cpus}"],
        interface=arguments.interface,
        log_directory="logs",
    )


def read_arguments(given: list[str]) -> argparse.Namespace:
    """Read the options of this script; the others are for predict."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=8, help="workers, each a Slurm job")
    parser.add_argument("--memory", type=float, default=30, help="GB for a block")
    parser.add_argument("--cpus", type=int, default=8, help="processors of a job")
    parser.add_argument("--gres", help="such as gpu:1")
    parser.add_argument("--walltime", default="08:00:00")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--interface", help="network that all nodes share, such as ib0")
    parser.add_argument("predict", nargs="+", help="-- INPUT... --model MODEL --out DIR [options of predict]")
    return parser.parse_args(given)


def main() -> int:
    """Start the workers, predict, end the workers."""
    arguments = read_arguments(sys.argv[1:])
    with start_cluster(arguments) as cluster:
        cluster.scale(jobs=arguments.jobs)
        options = ["--scheduler", cluster.scheduler_address, "--memory", str(arguments.memory)]
        command = [sys.executable, "-m", "nuclei3d", "predict", *arguments.predict, *options]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
