"""A queue in front of one worker thread: jobs with equal keys run as one batch. Independent of models and HTTP."""

import collections
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any


class QueueFullError(Exception):
    """The queue is full. `retry_after`: estimated seconds until it has room."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full: try again in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(Exception):
    """The queue accepts no more jobs."""


class AbandonedError(Exception):
    """Raised by a running batch to stop early, when all its jobs are cancelled."""


@dataclasses.dataclass(eq=False)
class Job:
    """One request.

    Attributes:
      key: jobs with equal keys may run as one batch.
      item: input of the job.
      listener: receives progress while the batch runs; None: no progress.
      future: future of the result. It stays pending while the batch runs, so that it can be cancelled at any time.
      arrived: time of arrival, in seconds of `time.monotonic`.
    """

    key: Hashable
    item: Any
    listener: Callable[[Any], None] | None = None
    future: Future = dataclasses.field(default_factory=Future)
    arrived: float = dataclasses.field(default_factory=time.monotonic)


class Batcher:
    """Runs batches of jobs in its own thread. Only this thread calls `run`."""

    def __init__(
        self, run: Callable[[Sequence[Job]], Sequence], *, max_batch: int, max_waiting: int, window_seconds: float
    ):
        """Starts the thread.

        Args:
          run: returns the results of jobs with equal keys, in order. Its exception becomes that of every job.
          max_batch: largest number of jobs in a batch.
          max_waiting: largest number of waiting jobs; running jobs do not count.
          window_seconds: longest time that a job waits for others to join its batch while the worker is idle.
        """
        self._run, self._max_batch, self._max_waiting, self._window = run, max_batch, max_waiting, window_seconds
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: Sequence[Job] = ()
        self._changed = threading.Condition()
        self._closed = False
        self._last_seconds = 0.0  # duration of the last batch
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, key: Hashable, item: Any, listener: Callable[[Any], None] | None = None) -> Future:
        """Appends a job to the queue and returns the future of its result.

        Raises:
          QueueFullError: if too many jobs wait.
          ClosedError: after `close`.
        """
        with self._changed:
            if self._closed:
                raise ClosedError("the service is stopping and accepts no more requests")
            self._waiting = collections.deque(job for job in self._waiting if not job.future.cancelled())
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(self._retry_after())
            job = Job(key, item, listener)
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def close(self, timeout: float | None = None) -> bool:
        """Stops accepting jobs and waits for the accepted ones.

        Returns whether they finished within `timeout` seconds. If not, cancels the remaining jobs.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        with self._changed:
            remaining = [*self._running, *self._waiting]
        for job in remaining:
            job.future.cancel()
        return False

    def _retry_after(self) -> int:
        batches = math.ceil(len(self._waiting) / self._max_batch)
        return min(max(math.ceil(batches * self._last_seconds), 1), 60)

    def _work(self) -> None:
        while jobs := self._next_batch():
            begin = time.monotonic()
            try:
                results = self._run(jobs)
                assert len(results) == len(jobs)
            except Exception as error:  # fails this batch only: the worker continues
                for job in jobs:
                    if job.future.set_running_or_notify_cancel():
                        job.future.set_exception(error)
            else:
                for job, result in zip(jobs, results, strict=True):
                    if job.future.set_running_or_notify_cancel():
                        job.future.set_result(result)
            self._last_seconds = time.monotonic() - begin

    def _next_batch(self) -> list[Job]:
        """Waits for the next batch: the oldest job and jobs with equal keys. Returns [] after `close`.

        A batch starts when it is full or its oldest job has waited long enough.
        """
        with self._changed:
            while True:
                self._waiting = collections.deque(job for job in self._waiting if not job.future.cancelled())
                if not self._waiting:
                    if self._closed:
                        return []
                    self._changed.wait()
                    continue
                first = self._waiting[0]
                batch = [job for job in self._waiting if job.key == first.key][: self._max_batch]
                seconds_left = first.arrived + self._window - time.monotonic()
                if len(batch) == self._max_batch or seconds_left <= 0 or self._closed:
                    self._waiting = collections.deque(job for job in self._waiting if job not in batch)
                    self._running = batch
                    return batch
                self._changed.wait(seconds_left)
