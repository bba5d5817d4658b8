"""Work on data files in processes of their own."""

import contextlib
import multiprocessing
import os
import sys
import threading
import types
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from EasyLM.errors import UserError


class WorkerDiedError(UserError):
    """A worker process ended before its work: the machine killed it, or a library crashed."""


class Workers:
    """A context that runs functions in this process, or, if there are to be several, in processes of their own.

    What they run lies in modules that do not import JAX, so that the processes start fast.
    """

    def __init__(self, processes: int):
        spawn = multiprocessing.get_context("spawn")  # forking would copy JAX's threads and locks
        self._pool = ProcessPoolExecutor(processes, spawn, _end_with_parent) if processes > 1 else None

    def __enter__(self):
        return self

    def map(self, function, *arguments, chunksize: int = 1):
        """`function` of all arguments, which are taken at once; results in order."""
        if self._pool is None:
            return map(function, *arguments)
        with _hidden_main():
            return self._pool.map(function, *arguments, chunksize=chunksize)

    def submit(self, function, *arguments) -> Future:
        """`function` of these arguments, begun now: in this process it has ended when this returns."""
        future: Future = Future()
        try:
            if self._pool is not None:
                with _hidden_main():
                    return self._pool.submit(function, *arguments)
            future.set_result(function(*arguments))
        except Exception as error:  # whoever asks for the result gets it
            future.set_exception(error)
        return future

    def __exit__(self, *exception):
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def result(future: Future, subject: str):
    """What became of a submitted function that is at work on `subject`.

    Raises:
      WorkerDiedError: naming the subject; else what the function raised.
    """
    try:
        return future.result()
    except BrokenProcessPool:
        raise WorkerDiedError(
            f"a worker process died at or near {subject} (out of memory?); --workers=1 has none"
        ) from None


def _end_with_parent() -> None:
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
