"""Jobs wait in a line of limited length, are computed one at a time, and not at all if abandoned."""

import threading
from concurrent.futures import Future

import pytest

from nuclei3d.serve import AbandonedError, ClosedError, JobQueue, QueueFullError


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


def test_a_full_line_says_when_to_come_again() -> None:
    queue = JobQueue(waiting=1)
    places = [queue.take_place(), queue.take_place()]
    assert not queue.accepting
    with pytest.raises(QueueFullError) as caught:
        queue.take_place()
    assert caught.value.retry_after_s >= 1
    queue.leave(places[0])
    assert queue.accepting
    queue.take_place()


def test_an_abandoned_job_is_never_begun() -> None:
    queue = JobQueue(waiting=2)
    first, second, third = Job(), Job(), Job()
    queue.compute(queue.take_place(), first)
    place = queue.take_place()
    queue.compute(place, second)
    last = queue.compute(queue.take_place(), third)
    assert first.running.wait(10)
    queue.leave(place)
    first.go.set()
    third.go.set()
    assert last.result(10) == "done"
    assert not second.running.is_set()


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


def test_a_job_that_fails_does_not_stop_the_next() -> None:
    queue = JobQueue(waiting=1)

    def broken(_progress) -> None:
        raise RuntimeError("out of memory")

    job = Job()
    job.go.set()
    failed = queue.compute(queue.take_place(), broken)
    after = queue.compute(queue.take_place(), job)
    with pytest.raises(RuntimeError, match="memory"):
        failed.result(10)
    assert after.result(10) == "done"
