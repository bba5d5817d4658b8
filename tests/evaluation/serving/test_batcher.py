"""The queue in front of the worker, without a model or HTTP."""

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from evaluation.serving.batcher import AbandonedError, Batcher, ClosedError, QueueFullError

SECONDS = 20  # timeout, much longer than any test takes


class Worker:
    """The `run` of a batcher: records each batch, and waits for `release` if it is held."""

    def __init__(self, held=False):
        self.batches, self.begun, self.release = [], threading.Event(), threading.Event()
        if not held:
            self.release.set()

    def __call__(self, jobs):
        self.batches.append([job.item for job in jobs])
        self.begun.set()
        assert self.release.wait(SECONDS)
        if "bad" in self.batches[-1]:
            raise ValueError("a bad job")
        return [f"{job.item}!" for job in jobs]


def batcher(worker, max_batch=4, max_waiting=8, window_seconds=0.0):
    return Batcher(worker, max_batch=max_batch, max_waiting=max_waiting, window_seconds=window_seconds)


def submit_while_busy(queue, worker, jobs):
    """Submits jobs while the worker runs another one, so that all of them wait."""
    first = queue.submit("first", "first")
    assert worker.begun.wait(SECONDS)
    futures = [queue.submit(key, item) for key, item in jobs]
    worker.release.set()
    first.result(SECONDS)
    return futures


def test_jobs_with_equal_keys_run_together_and_the_oldest_first():
    worker = Worker(held=True)
    queue = batcher(worker, max_batch=2)
    futures = submit_while_busy(queue, worker, [("x", 1), ("y", 2), ("x", 3), ("y", 4), ("x", 5)])
    assert [future.result(SECONDS) for future in futures] == ["1!", "2!", "3!", "4!", "5!"]
    assert worker.batches == [["first"], [1, 3], [2, 4], [5]]


def test_a_full_batch_starts_before_its_window_ends():
    worker = Worker()
    queue = batcher(worker, max_batch=2, window_seconds=10 * SECONDS)
    futures = [queue.submit("x", 1), queue.submit("x", 2)]
    assert [future.result(SECONDS) for future in futures] == ["1!", "2!"]
    assert worker.batches == [[1, 2]]


def test_a_full_queue_refuses_jobs_with_a_time_to_retry():
    worker = Worker(held=True)
    queue = batcher(worker, max_waiting=2)
    queue.submit("x", 1)
    assert worker.begun.wait(SECONDS)
    waiting = [queue.submit("x", 2), queue.submit("x", 3)]
    with pytest.raises(QueueFullError, match="try again in") as refused:
        queue.submit("x", 4)
    assert refused.value.retry_after >= 1
    waiting[0].cancel()
    after = queue.submit("x", 5)  # a cancelled job leaves the queue
    worker.release.set()
    assert after.result(SECONDS) == "5!" and worker.batches == [[1], [3, 5]]


def test_a_job_cancelled_while_waiting_never_runs():
    worker = Worker(held=True)
    queue = batcher(worker)
    first = queue.submit("x", 1)
    assert worker.begun.wait(SECONDS)
    assert queue.submit("x", 2).cancel()
    worker.release.set()
    assert queue.close(SECONDS)
    assert first.result(0) == "1!" and worker.batches == [[1]]


def test_an_error_fails_only_its_batch():
    worker = Worker(held=True)
    queue = batcher(worker)
    bad, good = submit_while_busy(queue, worker, [("x", "bad"), ("y", "good")])
    with pytest.raises(ValueError, match="a bad job"):
        bad.result(SECONDS)
    assert good.result(SECONDS) == "good!"


def test_a_batch_of_cancelled_jobs_can_stop_itself():
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


def test_closing_finishes_accepted_jobs_and_refuses_new_ones():
    worker = Worker(held=True)
    queue = batcher(worker, window_seconds=10 * SECONDS)
    futures = [queue.submit("x", 1), queue.submit("y", 2)]
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(queue.close, SECONDS)
        assert worker.begun.wait(SECONDS)
        with pytest.raises(ClosedError, match="stopping"):
            queue.submit("x", 3)
        worker.release.set()
        assert closing.result(SECONDS)
    assert [future.result(0) for future in futures] == ["1!", "2!"]


def test_jobs_unfinished_at_the_timeout_are_cancelled_and_the_worker_ends():
    worker = Worker(held=True)
    queue = batcher(worker)
    futures = [queue.submit("x", 1)]
    assert worker.begun.wait(SECONDS)
    futures.append(queue.submit("x", 2))
    assert not queue.close(0.01)
    assert all(future.cancelled() for future in futures)
    worker.release.set()
    assert queue.close(SECONDS) and worker.batches == [[1]]
