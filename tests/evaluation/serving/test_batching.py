"""The queue before the worker, without model and HTTP."""

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from evaluation.serving.batcher import AbandonedError, Batcher, ClosedError, QueueFullError

SECONDS = 20  # far more than anything here takes: a test that hangs ends


class Worker:
    """What a batcher runs: notes each batch, and waits, where it is told to, until it may go on."""

    def __init__(self, held=False):
        self.batches, self.begun, self.may_go_on = [], threading.Event(), threading.Event()
        if not held:
            self.may_go_on.set()

    def __call__(self, jobs):
        self.batches.append([job.item for job in jobs])
        self.begun.set()
        assert self.may_go_on.wait(SECONDS)
        if "bad" in self.batches[-1]:
            raise ValueError("a bad one")
        return [f"{job.item}!" for job in jobs]


def batcher(worker, max_batch=4, max_waiting=8, window_seconds=0.0):
    return Batcher(worker, max_batch=max_batch, max_waiting=max_waiting, window_seconds=window_seconds)


def submit_behind_another(queue, worker, jobs):
    """Submits while the worker is at something else, so that all of them wait."""
    first = queue.submit("first", "first")
    assert worker.begun.wait(SECONDS)
    futures = [queue.submit(key, item) for key, item in jobs]
    worker.may_go_on.set()
    first.result(SECONDS)
    return futures


def test_alike_jobs_run_together_and_the_oldest_goes_first():
    worker = Worker(held=True)
    queue = batcher(worker, max_batch=2)
    futures = submit_behind_another(queue, worker, [("x", 1), ("y", 2), ("x", 3), ("y", 4), ("x", 5)])
    assert [future.result(SECONDS) for future in futures] == ["1!", "2!", "3!", "4!", "5!"]
    assert worker.batches == [["first"], [1, 3], [2, 4], [5]]


def test_a_job_waits_for_others_that_join_it_but_not_longer_than_until_the_batch_is_full():
    worker = Worker()
    queue = batcher(worker, max_batch=2, window_seconds=10 * SECONDS)
    futures = [queue.submit("x", 1), queue.submit("x", 2)]
    assert [future.result(SECONDS) for future in futures] == ["1!", "2!"]
    assert worker.batches == [[1, 2]]


def test_one_too_many_is_refused_and_told_when_to_come_again():
    worker = Worker(held=True)
    queue = batcher(worker, max_waiting=2)
    queue.submit("x", 1)
    assert worker.begun.wait(SECONDS)
    waiting = [queue.submit("x", 2), queue.submit("x", 3)]
    with pytest.raises(QueueFullError, match="try again in") as refused:
        queue.submit("x", 4)
    assert refused.value.retry_after >= 1
    waiting[0].cancel()
    after = queue.submit("x", 5)  # who leaves makes room
    worker.may_go_on.set()
    assert after.result(SECONDS) == "5!" and worker.batches == [[1], [3, 5]]


def test_a_job_that_is_cancelled_while_it_waits_is_never_run():
    worker = Worker(held=True)
    queue = batcher(worker)
    first = queue.submit("x", 1)
    assert worker.begun.wait(SECONDS)
    assert queue.submit("x", 2).cancel()
    worker.may_go_on.set()
    assert queue.close(SECONDS)
    assert first.result(0) == "1!" and worker.batches == [[1]]


def test_an_error_is_the_batchs_own():
    worker = Worker(held=True)
    queue = batcher(worker)
    bad, good = submit_behind_another(queue, worker, [("x", "bad"), ("y", "good")])
    with pytest.raises(ValueError, match="a bad one"):
        bad.result(SECONDS)
    assert good.result(SECONDS) == "good!"


def test_a_batch_that_nobody_waits_for_can_stop_itself():
    started, stopped = threading.Event(), threading.Event()

    def run(jobs):
        started.set()
        deadline = time.monotonic() + SECONDS
        while not all(job.future.cancelled() for job in jobs):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        stopped.set()
        raise AbandonedError

    queue = batcher(run)
    future = queue.submit("x", 1)
    assert started.wait(SECONDS)
    assert future.cancel() and stopped.wait(SECONDS)
    with pytest.raises(CancelledError):
        future.result(SECONDS)
    assert queue.close(SECONDS)


def test_closing_finishes_what_was_taken_and_takes_no_more():
    worker = Worker(held=True)
    queue = batcher(worker, window_seconds=10 * SECONDS)
    futures = [queue.submit("x", 1), queue.submit("y", 2)]
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(queue.close, SECONDS)
        assert worker.begun.wait(SECONDS)
        with pytest.raises(ClosedError, match="stopping"):
            queue.submit("x", 3)
        worker.may_go_on.set()
        assert closing.result(SECONDS)
    assert [future.result(0) for future in futures] == ["1!", "2!"]


def test_what_is_not_done_in_time_is_cancelled_and_the_worker_ends():
    worker = Worker(held=True)
    queue = batcher(worker)
    futures = [queue.submit("x", 1)]
    assert worker.begun.wait(SECONDS)
    futures.append(queue.submit("x", 2))
    assert not queue.close(0.01)
    assert all(future.cancelled() for future in futures)
    worker.may_go_on.set()
    assert queue.close(SECONDS) and worker.batches == [[1]]
