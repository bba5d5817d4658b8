"""Arrays from worker processes by shared memory.

Through a pipe, the receiving process needs 0.3 ms of CPU time for the pixels of an image of 256x256, instead of 0.03.
This would limit the workers (`scripts/bench_videos.py`).
"""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from EasyLM.process_pool import Workers

_Function = Callable[[Any], np.ndarray]


class Pending(Protocol):
    """The result of a submitted call."""

    def result(self) -> Any:
        """Waits for the result and returns it, or raises the exception of the call."""
        ...


class SharedResults:
    """A context manager that runs a function in worker processes, which leave its arrays in shared memory.

    The memory has places for the rows of pending results. If too few are free, or the system has no such memory (it is
    Linux's), the array is sent by a pipe.
    """

    def __init__(self, workers: Workers, function: _Function, row_shape: Sequence[int], count: int):
        """Creates the places.

        Args:
          workers: run the function.
          function: maps a list of n items to a uint8 array [n, *row_shape].
          row_shape: the shape of a row.
          count: the number of places.
        """
        self._workers, self._function, self._row_shape = workers, function, tuple(row_shape)
        self._memory: int | None = None  # file descriptor
        self._inode = 0
        self._free: list[int] = []  # the last ones are used first, so that the memory grows only as needed
        if workers.processes > 1 and hasattr(os, "memfd_create"):
            self._memory = os.memfd_create("results")
            self._inode = os.fstat(self._memory).st_ino
            self._free.extend(range(count))

    def __enter__(self) -> "SharedResults":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None
            self._free.clear()

    def submit(self, items: list) -> Pending:
        """Submits a call of the function with a list. Call `result` of what it returns once, in this context."""
        if len(items) > len(self._free):
            return self._workers.submit(self._function, items)
        places = [self._free.pop() for _ in items]
        path = f"/proc/{os.getpid()}/fd/{self._memory}"
        sent = self._workers.submit(_leave_rows, self._function, items, path, self._inode, places)
        return _SharedResult(self, sent, places)

    def _take(self, rows: np.ndarray | None, places: list[int]) -> np.ndarray:
        """Returns the rows that a worker has left in places, or has sent by the pipe."""
        if rows is not None:
            return rows
        assert self._memory is not None, "the context has ended"
        rows = np.empty((len(places), *self._row_shape), np.uint8)
        for row, place in zip(rows, places, strict=True):
            size = os.preadv(self._memory, [row], place * row.nbytes)
            assert size == row.nbytes, f"{size} of {row.nbytes} bytes"
        return rows

    def _release(self, places: list[int]) -> None:
        if self._memory is not None:
            self._free.extend(places)


class _SharedResult:
    def __init__(self, owner: SharedResults, sent: Pending, places: list[int]):
        self._owner, self._sent, self._places = owner, sent, places

    def result(self) -> np.ndarray:
        try:
            return self._owner._take(self._sent.result(), self._places)
        finally:
            self._owner._release(self._places)


def _leave_rows(function: _Function, items: list, path: str, inode: int, places: list[int]) -> np.ndarray | None:
    """Writes the rows of `function(items)` to places of a file.

    Returns the rows if the file cannot be opened, or is another one: a call can outlive its context, and the next
    context can have the same file descriptor.
    """
    rows = np.ascontiguousarray(function(items))
    assert rows.dtype == np.uint8 and len(rows) == len(places)
    with contextlib.suppress(OSError):  # the system hides the files of other processes
        memory = os.open(path, os.O_WRONLY)
        try:
            if os.fstat(memory).st_ino != inode:
                return rows
            size = math.prod(rows.shape[1:])
            for row, place in zip(rows, places):
                if os.pwrite(memory, row, place * size) != size:
                    return rows
        finally:
            os.close(memory)
        return None
    return rows
