"""A pool of worker processes that recovers when a worker dies."""

import contextlib
import ctypes
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from EasyLM.errors import UserError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)


class Workers:
    """A context manager that runs functions in worker processes, or in this process if `processes` is 1.

    Define the functions in modules that do not import JAX, so that workers start fast. When a worker dies (out of
    memory, or a crash in a library), every submitted call that has not finished is lost. Lost calls run again, one at a
    time, in a separate process. A call that kills this process too fails with BrokenProcessPool.

    Attributes:
      processes: the number of processes.
    """

    def __init__(self, processes: int):
        self.processes = processes
        self._pool = _make_pool(processes) if processes > 1 else None
        self._retry_pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def map(self, function: Callable, *arguments: Iterable, chunksize: int = 1) -> Iterator:
        """Applies `function` to all arguments and yields the results in order.

        With worker processes, all arguments are read before the first result.
        """
        if self._pool is None:
            return map(function, *arguments)
        with _hidden_main_module():
            return self._pool.map(function, *arguments, chunksize=chunksize)

    def submit(self, function: Callable, *arguments: Any) -> "Future | _RetriedFuture":
        """Submits a call of `function`. Without worker processes, runs it before returning."""
        if self._pool is not None:
            try:
                future = _submit(self._pool, function, arguments)
            except BrokenProcessPool:
                self._pool.shutdown(wait=False)
                self._pool = _make_pool(self.processes)
                future = _submit(self._pool, function, arguments)
            return _RetriedFuture(future, functools.partial(self._retry, function, arguments))
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # `result` raises it
            future.set_exception(error)
        return future

    def _retry(self, function: Callable, arguments: tuple) -> Any:
        """Runs a lost call again. Returns its result, or raises BrokenProcessPool."""
        self._retry_pool = self._retry_pool or _make_pool(1)
        try:
            return _submit(self._retry_pool, function, arguments).result()
        except BrokenProcessPool:
            self._retry_pool.shutdown(wait=False)
            self._retry_pool = None
            raise

    def __exit__(self, *exception: object) -> None:
        for pool in (self._pool, self._retry_pool):
            if pool is not None:
                pool.shutdown(cancel_futures=True)


@dataclasses.dataclass
class _RetriedFuture:
    """The future of a submitted call. If the call is lost, `retry` runs it again."""

    future: Future
    retry: Callable[[], Any]

    def result(self) -> Any:
        try:
            return self.future.result()
        except BrokenProcessPool:
            return self.retry()


def result(future: "Future | _RetriedFuture", subject: str) -> Any:
    """Returns the result of a submitted call, or raises its exception.

    Args:
      subject: the file that the call reads, for the message.

    Raises:
      UserError: naming the subject, if the call killed its process twice.
    """
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(f"{subject}: the process that read it died (out of memory, or a crash in a library)") from None


def available_cores() -> int:
    """Returns the number of cores that this process may use. A batch system can allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def exit_with_parent() -> None:
    """Makes a worker exit when its parent dies, even by SIGKILL, and leave Ctrl-C to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the workers too

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_pool(processes: int) -> ProcessPoolExecutor:
    _keep_freed_memory()  # this process receives the results
    spawn = multiprocessing.get_context("spawn")  # forking would copy JAX's threads and locks
    return ProcessPoolExecutor(processes, spawn, _start_worker)


def _start_worker() -> None:
    exit_with_parent()
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Makes the C library keep up to 128 MB of freed memory for the next results.

    By default, glibc returns freed blocks of a few megabytes to the kernel, which must clear their pages when they are
    allocated again. For workers that return the frames of a video, this takes a fifth of the time of reading them
    (`scripts/bench_videos.py`).
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 128 << 20)
        mallopt(_MMAP_THRESHOLD, 32 << 20)


def _submit(pool: ProcessPoolExecutor, function: Callable, arguments: tuple) -> Future:
    with _hidden_main_module():
        return pool.submit(function, *arguments)


@contextlib.contextmanager
def _hidden_main_module() -> Iterator[None]:
    """Keeps worker processes that start inside from importing the main module.

    A spawned process imports the parent's main module, because submitted functions may be defined there. Here they are
    not, and the import would load JAX, or run a script without a main guard again. `multiprocessing` has no option to
    skip the import. It looks the module up in `sys.modules`, so an empty module replaces it there. The executor starts
    its processes on submission, not in its constructor, so every submission happens inside this context.
    """
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
