"""`map` over processes, for work on data files."""

import contextlib
import multiprocessing
import sys
import types
from concurrent.futures import ProcessPoolExecutor


class Workers:
    """A context whose `map` gives results in order: in this process, or from several.

    What they run lies in modules that do not import JAX, so that the processes start fast.
    """

    def __init__(self, processes: int):
        spawn = multiprocessing.get_context("spawn")  # forking would copy JAX's threads and locks
        self._pool = ProcessPoolExecutor(processes, mp_context=spawn) if processes > 1 else None

    def __enter__(self):
        return self

    def map(self, function, *arguments, chunksize: int = 1):
        if self._pool is None:
            return map(function, *arguments)
        with _hidden_main():
            return self._pool.map(function, *arguments, chunksize=chunksize)

    def __exit__(self, *exception):
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _hidden_main():
    """Processes started in here do not import the main module: it may import JAX, or, without a guard, run again."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
