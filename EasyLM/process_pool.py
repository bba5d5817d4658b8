"""Work on data files in processes of their own."""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from EasyLM.errors import UserError


class Workers:
    """A context that runs functions in this process, or, if there are to be several, in processes of their own.

    What they run lies in modules that do not import JAX, so that the processes start fast. When one of them dies (the
    machine killed it, or a library crashed), all that was submitted and has not ended is lost with it, and run again,
    one after the other, in one further process: what kills that one, too, is at fault.
    """

    def __init__(self, processes: int):
        self._processes, self._single = processes, None
        self._pool = _pool(processes) if processes > 1 else None

    def __enter__(self):
        return self

    def map(self, function, *arguments, chunksize: int = 1):
        """`function` of all arguments, which are taken at once; results in order."""
        if self._pool is None:
            return map(function, *arguments)
        with _hidden_main():
            return self._pool.map(function, *arguments, chunksize=chunksize)

    def submit(self, function, *arguments) -> "Future | _Repeatable":
        """`function` of these arguments, begun now: in this process it has ended when this returns."""
        if self._pool is not None:
            try:
                future = _submitted(self._pool, function, arguments)
            except BrokenProcessPool:
                self._pool.shutdown(wait=False)
                self._pool = _pool(self._processes)
                future = _submitted(self._pool, function, arguments)
            return _Repeatable(future, functools.partial(self._again, function, arguments))
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # whoever asks for the result gets it
            future.set_exception(error)
        return future

    def _again(self, function, arguments: tuple):
        """The result of what was lost, or BrokenProcessPool."""
        self._single = self._single or _pool(1)
        try:
            return _submitted(self._single, function, arguments).result()
        except BrokenProcessPool:
            self._single.shutdown(wait=False)
            self._single = None
            raise

    def __exit__(self, *exception):
        for pool in (self._pool, self._single):
            if pool is not None:
                pool.shutdown(cancel_futures=True)


@dataclasses.dataclass
class _Repeatable:
    """What was submitted to a pool, and how to run it again if it is lost with the pool."""

    future: Future
    again: Callable

    def result(self):
        try:
            return self.future.result()
        except BrokenProcessPool:
            return self.again()


def result(future, subject: str):
    """What became of a submitted function that is at work on `subject`.

    Raises:
      UserError: naming the subject, if it killed its process twice; else what the function raised.
    """
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(f"{subject}: the process that reads it dies (out of memory, or a crash in a library)") from None


def _pool(processes: int) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")  # forking would copy JAX's threads and locks
    return ProcessPoolExecutor(processes, spawn, end_with_parent)


def _submitted(pool: ProcessPoolExecutor, function, arguments: tuple) -> Future:
    with _hidden_main():
        return pool.submit(function, *arguments)


def end_with_parent() -> None:
    """In a worker: ends it when the process that started it is gone, which a kill gives no chance to say so."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _hidden_main():
    """Processes started in here do not import the main module: it may import JAX, or, without a guard, run again."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
