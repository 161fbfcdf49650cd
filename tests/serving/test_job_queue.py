"""Jobs are computed one at a time and stop if abandoned; test_app.py has the line seen from outside."""

import threading
from concurrent.futures import Future

import pytest

from nuclei3d.serve import AbandonedError, ClosedError, JobQueue


class Job:
    """Work that says when it runs, and runs until told."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self.go = threading.Event()

    def __call__(self, progress) -> str:
        self.running.set()
        while not self.go.wait(0.005):
            progress(0.5)
        return "done"


def test_one_is_computed_at_a_time_and_in_order() -> None:
    queue = JobQueue(waiting=3)
    jobs = [Job() for _ in range(3)]
    futures = [queue.compute(queue.take_place(), job) for job in jobs]
    for number, job in enumerate(jobs):
        assert job.running.wait(10)
        assert [other.running.is_set() for other in jobs[number + 1 :]] == [False] * (2 - number)
        job.go.set()
        assert futures[number].result(10) == "done"
    queue.close()


def test_an_abandoned_job_that_runs_stops_at_its_next_step() -> None:
    queue = JobQueue(waiting=0)
    job, place = Job(), queue.take_place()
    future = queue.compute(place, job)
    assert job.running.wait(10)
    queue.leave(place)
    with pytest.raises(AbandonedError):
        future.result(10)


def test_closing_finishes_what_runs_and_sends_the_others_away() -> None:
    queue = JobQueue(waiting=2)
    first, second = Job(), Job()
    running: Future[str] = queue.compute(queue.take_place(), first)
    waiting: Future[str] = queue.compute(queue.take_place(), second)
    assert first.running.wait(10)
    queue.close()
    with pytest.raises(ClosedError):
        waiting.result(10)
    with pytest.raises(ClosedError):
        queue.take_place()
    first.go.set()
    assert running.result(10) == "done"
