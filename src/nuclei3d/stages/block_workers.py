"""Where blocks run: in this process, in processes of this machine, or on a Dask cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nuclei3d.console import say
from nuclei3d.core.label_boxes import available_threads
from nuclei3d.errors import InputError, MachineError
from nuclei3d.stages.block_plan import BlockRun
from nuclei3d.stages.block_tasks import BlockTask, segment_block

if TYPE_CHECKING:
    from distributed import Client

_ANSWER_S = 10
"""How long a scheduler may take to answer at first."""


def run_tasks(tasks: Sequence[BlockTask], run: BlockRun) -> Iterator[int]:
    """Run the tasks, giving the number of nuclei of each as it is done."""
    if not tasks:
        return
    if run.workers == 1 and run.scheduler is None:
        for task in tasks:
            yield segment_block(task)
        return
    from distributed import CancelledError, as_completed
    from distributed.comm.core import CommClosedError
    from distributed.scheduler import KilledWorker

    with _client(run) as client:
        futures = client.map(segment_block, tasks, pure=False)
        try:
            for future in as_completed(futures):  # type: ignore[no-untyped-call]
                yield future.result()
        except KilledWorker:
            raise MachineError(
                "a worker died several times over the same block, most likely for want of memory; run again "
                "with fewer workers (finished blocks are kept), or with less memory (predict.memory_gb) so "
                "that blocks are smaller"
            ) from None
        except (CancelledError, CommClosedError):
            raise MachineError(
                "the Dask scheduler is gone; start it and run the same command again: finished blocks are "
                "kept"
            ) from None
        finally:
            client.cancel(futures)  # type: ignore[no-untyped-call]


@contextmanager
def _client(run: BlockRun) -> Iterator[Client]:
    import logging

    import dask
    from distributed import Client, LocalCluster

    # A worker that is told to end is no news.
    logging.getLogger("distributed").setLevel(logging.ERROR)
    if run.scheduler is not None:
        try:
            client = Client(  # type: ignore[no-untyped-call]
                run.scheduler, timeout=f"{_ANSWER_S}s"
            )
        except (OSError, ValueError, TimeoutError) as error:
            reason = " ".join(str(error).split()) or f"no answer within {_ANSWER_S} s"
            raise InputError(
                f"no Dask scheduler at {run.scheduler} ({reason}); start one with: dask scheduler"
            ) from None
        with client:
            _look_at_workers(run.scheduler, client)
            yield client
        return
    with (
        dask.config.set({"distributed.worker.daemon": True, "distributed.scheduler.allowed-failures": 2}),
        LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=run.workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address=None,
        ) as cluster,
        Client(cluster) as client,  # type: ignore[no-untyped-call]
    ):
        yield client


def _look_at_workers(scheduler: str, client: Client) -> None:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    if not workers:
        say(f"{scheduler} has no workers yet; waiting for the first")
    threads = max((worker["nthreads"] for worker in workers), default=1)
    if threads > 1:
        say(
            f"workers of {scheduler} run up to {threads} blocks at once, each of which may take "
            "predict.memory_gb; start them with --nthreads 1"
        )


def threads_per_worker(run: BlockRun) -> int | None:
    """How many threads a worker may use; None for all."""
    if run.scheduler is not None or run.workers == 1:
        return None
    return max(1, available_threads() // run.workers)
