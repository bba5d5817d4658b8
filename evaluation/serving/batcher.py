"""A fair queue in front of worker threads: jobs with equal keys run as one batch. Independent of models and HTTP.

Each worker thread is a lane, so that short jobs do not wait for long ones or for the compiler:

  short      jobs of low cost whose program is compiled
  long       other jobs whose program is compiled
  first use  jobs whose program is not compiled yet

In a lane, the next job is the one that would finish first if each client had the lane for itself: see `Job.order`.
"""

import collections
import dataclasses
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, NoReturn

LANES = ("short", "long", "first use")


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
      program: what has to be compiled to run the job; the size of the batch is added to it.
      cost: how long the job takes, relative to others, at least 1.
      client: who sent the job.
      copies: the number of jobs of a batch that it stands for.
      rehearsal: whether it only compiles a program. It takes no place in the queue.
      future: future of the result. It stays pending while the batch runs, so that it can be cancelled at any time.
      arrived: time of arrival, in seconds of `time.monotonic`.
      order: jobs of a lane run in this order; see `Batcher.submit`.
    """

    key: Hashable
    item: Any
    listener: Callable[[Any], None] | None = None
    program: Hashable = None
    cost: int = 1
    client: str = ""
    copies: int = 1
    rehearsal: bool = False
    future: Future = dataclasses.field(default_factory=Future)
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    order: float = 0.0


class Batcher:
    """Runs batches of jobs in its own threads, one per lane."""

    def __init__(
        self,
        run: Callable[[Sequence[Job]], Sequence],
        *,
        max_batch: int,
        max_waiting: int,
        window_seconds: float,
        short_cost: int = 1,
        max_batch_cost: int = 2**31,
    ):
        """Starts the threads.

        Args:
          run: returns the results of jobs with equal keys, in order. Its exception becomes that of every job. Several
            threads call it. It pads batches to a power of two: each of these sizes has its own programs.
          max_batch: largest number of jobs in a batch.
          max_waiting: largest number of waiting jobs; running jobs do not count.
          window_seconds: longest time that a job waits for others to join its batch while its lane is idle.
          short_cost: largest cost of a job of the short lane.
          max_batch_cost: largest total cost of a batch of several jobs.
        """
        self._run, self._max_batch, self._max_waiting, self._window = run, max_batch, max_waiting, window_seconds
        self._short_cost, self._max_batch_cost = short_cost, max_batch_cost
        self._waiting: list[Job] = []
        self._running: dict[str, Sequence[Job]] = {}
        self._compiled: set[tuple[Hashable, int]] = set()  # programs, each with a size of batches
        self._changed = threading.Condition()
        self._closed = False
        self._last_seconds = 0.0  # duration of the last batch whose program had been compiled before
        self._seconds_per_cost = 1.0  # of that batch
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"batcher: {lane}", daemon=True) for lane in LANES
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: Hashable, item: Any, listener: Callable[[Any], None] | None = None, **options: Any) -> Future:
        """Puts a job into the queue and returns the future of its result. `options` are further attributes of `Job`.

        Its place in the queue is the time at which it would finish if each client had the service for itself and the
        jobs of a client ran side by side: a waiting job of the same client delays it by no more than its own cost.
        A cheap job therefore passes expensive ones and those of busy clients, until these have waited long enough.

        Raises:
          QueueFullError: if too many jobs wait.
          ClosedError: after `close`.
        """
        job = Job(key, item, listener, **options)
        with self._changed:
            if self._closed:
                raise ClosedError("the service is stopping and accepts no more requests")
            self._drop_cancelled()
            if not job.rehearsal and self.num_waiting >= self._max_waiting:
                raise QueueFullError(self.retry_after)
            ahead = sum(min(other.cost, job.cost) for other in self._waiting if other.client == job.client)
            job.order = job.arrived + self._seconds_per_cost * (ahead + job.cost)
            self._waiting.append(job)
            self._changed.notify_all()
        return job.future

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def num_waiting(self) -> int:
        """Waiting jobs, without rehearsals."""
        return sum(not job.rehearsal for job in self._waiting)

    @property
    def retry_after(self) -> int:
        """Estimated seconds until the waiting jobs are done, 1..60."""
        batches = math.ceil(self.num_waiting / self._max_batch)
        return min(max(math.ceil(batches * self._last_seconds), 1), 60)

    def is_compiled(self, program: Hashable, size: int = 1) -> bool:
        """Whether a batch of this program and size has run before. Jobs without a program are always compiled."""
        return program is None or (program, size) in self._compiled

    def close(self, timeout: float | None = None) -> bool:
        """Stops accepting jobs and waits for the accepted ones.

        Returns whether they finished within `timeout` seconds. If not, cancels the remaining jobs.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(None if deadline is None else max(deadline - time.monotonic(), 0))
        if not any(thread.is_alive() for thread in self._threads):
            return True
        with self._changed:
            remaining = [*self._waiting, *(job for jobs in self._running.values() for job in jobs)]
        for job in remaining:
            job.future.cancel()
        return False

    def _drop_cancelled(self) -> None:
        self._waiting = [job for job in self._waiting if not job.future.cancelled()]

    def _work(self, lane: str) -> None:
        while jobs := self._next_batch(lane):
            begin = time.monotonic()
            copies = [job for job in jobs for _ in range(job.copies)]
            try:
                results = self._run(copies)
                assert len(results) == len(copies)
            except Exception as error:  # fails this batch only: the worker continues
                for job in jobs:
                    if job.future.set_running_or_notify_cancel():
                        job.future.set_exception(error)
            else:
                with self._changed:  # before the results: the next job of a client finds its program compiled
                    self._compiled.add((jobs[0].program, power_of_two(len(copies))))
                for job, result in zip(copies, results, strict=True):
                    if not job.future.done() and job.future.set_running_or_notify_cancel():
                        job.future.set_result(result)
            if lane != "first use":
                self._last_seconds = time.monotonic() - begin
                self._seconds_per_cost = self._last_seconds / max(job.cost for job in jobs)

    def _next_batch(self, lane: str) -> list[Job]:
        """Waits for the next batch of a lane: its first job and jobs with equal keys. Returns [] after `close`.

        A batch starts when it is full or its first job has waited long enough.
        """
        with self._changed:
            self._running.pop(lane, None)
            self._changed.notify_all()  # jobs may have moved to other lanes, or the last job may have finished
            while True:
                self._drop_cancelled()
                batch, limit = self._first_batch(lane)
                if not batch:
                    if self._closed and not self._waiting:
                        return []
                    self._changed.wait()
                    continue
                seconds_left = batch[0].arrived + self._window - time.monotonic()
                if len(batch) == limit or seconds_left <= 0 or self._closed:
                    self._waiting = [job for job in self._waiting if job not in batch]
                    self._running[lane] = batch
                    self._changed.notify_all()  # for lanes that end once no job waits
                    return batch
                self._changed.wait(seconds_left)

    def _first_batch(self, lane: str) -> tuple[list[Job], int]:
        """Returns the jobs that would run next in a lane, and how many jobs a full batch has."""
        by_key: dict[Hashable, list[Job]] = collections.defaultdict(list)
        for job in sorted(self._waiting, key=lambda job: job.order):
            by_key[job.key].append(job)
        rehearsal = None
        for jobs in by_key.values():  # in the order of their first jobs
            first = jobs[0]
            limit = min(self._max_batch, _floor_power_of_two(self._max_batch_cost // first.cost))
            count = min(len(jobs), limit)
            sizes = [2**n for n in range(limit.bit_length()) if self.is_compiled(first.program, 2**n)]
            usable = [size for size in sizes if size <= power_of_two(count)]
            if first.rehearsal or not usable:
                job_lane, batch, full = "first use", jobs[:limit], limit
            else:
                job_lane = "short" if first.cost <= self._short_cost else "long"
                batch, full = jobs[: usable[-1]], sizes[-1]
                if 2 * usable[-1] <= count:
                    rehearsal = rehearsal or dataclasses.replace(
                        first, listener=None, copies=2 * usable[-1], rehearsal=True, future=Future()
                    )
            if job_lane == lane:
                return batch, full
        # Jobs wait whose larger batches are not compiled. A copy of one compiles the next size while they run.
        return ([rehearsal], 1) if rehearsal and lane == "first use" and not self._closed else ([], 0)


def power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def _floor_power_of_two(count: int) -> int:
    """Returns the largest power of two that is at most `count`; 1 for 0."""
    return 1 << max(count.bit_length() - 1, 0)


def exit_process(code: int, is_idle: bool) -> NoReturn:
    """Ends the process with an exit code.

    Args:
      is_idle: what `Batcher.close` returned. If False, a batch still runs in its thread, and the interpreter's shutdown
        would abort the process; it is left out.
    """
    if is_idle:
        sys.exit(code)
    sys.stdout.flush()
    os._exit(code)
