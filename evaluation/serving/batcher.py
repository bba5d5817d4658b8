"""A queue before one worker: jobs that arrive together and are alike run as one batch. Knows no model and no HTTP."""

import collections
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any


class QueueFullError(Exception):
    """The queue holds as many jobs as it may. `retry_after`: seconds after which there is probably room."""

    def __init__(self, retry_after: int):
        super().__init__(f"too many requests wait already: try again in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(Exception):
    """No job is taken any more."""


class AbandonedError(Exception):
    """Raised within a batch to stop it, when nobody wants its results."""


@dataclasses.dataclass(eq=False)
class Job:
    """One request.

    Attributes:
      key: jobs with equal keys may run as one batch.
      item: what the job is about.
      listener: whatever the batch may report to on its way; None: nobody listens.
      future: of the result. It stays pending while the batch runs, so that it can be cancelled at any time.
    """

    key: Hashable
    item: Any
    listener: Any = None
    future: Future = dataclasses.field(default_factory=Future)
    arrived: float = dataclasses.field(default_factory=time.monotonic)


class Batcher:
    """Runs batches of jobs in a thread of its own, the only one that calls `run`."""

    def __init__(
        self, run: Callable[[Sequence[Job]], Sequence], *, max_batch: int, max_waiting: int, window_seconds: float
    ):
        """Starts the thread.

        Args:
          run: the jobs of a batch, of one key -> their results in order. What it raises becomes the error of each job.
          max_batch: jobs of a batch.
          max_waiting: jobs that may wait for their batch to begin; of those that run, none counts.
          window_seconds: how long a job waits at most for others to join it, while the worker is idle.
        """
        self._run, self._max_batch, self._max_waiting, self._window = run, max_batch, max_waiting, window_seconds
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: Sequence[Job] = ()
        self._changed = threading.Condition()
        self._closed = False
        self._last_seconds = 0.0  # what the last batch took
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, key: Hashable, item, listener=None) -> Future:
        """Puts a job at the end of the queue.

        Raises:
          QueueFullError, ClosedError: if it is not taken.
        """
        with self._changed:
            if self._closed:
                raise ClosedError("the service is stopping: it takes no more requests")
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

    def close(self, timeout: float | None = None) -> bool:
        """Takes no more jobs, and waits until those taken are done.

        False: they were not, within `timeout` seconds. Those that are left are cancelled: who waits need not any more.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        with self._changed:
            left = [*self._running, *self._waiting]
        for job in left:
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
            except Exception as error:  # the batch's, not the worker's: the next one may succeed
                for job in jobs:
                    if job.future.set_running_or_notify_cancel():
                        job.future.set_exception(error)
            else:
                for job, result in zip(jobs, results, strict=True):
                    if job.future.set_running_or_notify_cancel():
                        job.future.set_result(result)
            self._last_seconds = time.monotonic() - begin

    def _next_batch(self) -> list[Job]:
        """The oldest job and those like it, once they are many enough or it has waited long enough; [] at the end."""
        with self._changed:
            while True:
                self._waiting = collections.deque(job for job in self._waiting if not job.future.cancelled())
                if not self._waiting:
                    if self._closed:
                        return []
                    self._changed.wait()
                    continue
                first = self._waiting[0]
                alike = [job for job in self._waiting if job.key == first.key][: self._max_batch]
                left = first.arrived + self._window - time.monotonic()
                if len(alike) == self._max_batch or left <= 0 or self._closed:
                    self._waiting = collections.deque(job for job in self._waiting if job not in alike)
                    self._running = alike
                    return alike
                self._changed.wait(left)
