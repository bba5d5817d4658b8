"""Arrays from worker processes by shared memory.

Through a pipe, the receiving process needs 0.3 ms of CPU time for the pixels of an image of 256x256, instead of 0.02.
This would limit the workers (`scripts/bench_videos.py`).
"""

import functools
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from EasyLM.process_pool import Workers

_Function = Callable[[list], Iterable[tuple[int, np.ndarray]]]


class Pending(Protocol):
    """The result of a submitted call."""

    def result(self) -> Any:
        """Waits for the result and returns it, or raises the exception of the call."""
        ...


class SharedResults:
    """A context manager that runs a function in worker processes, which leave its rows in shared memory.

    The memory has places for the rows of pending results. If too few are free, or the system has no such memory (it is
    Linux's), the rows are sent by a pipe. A worker maps the memory until it gets a call of another context.
    """

    def __init__(self, workers: Workers, function: _Function, row_shape: Sequence[int], count: int):
        """Creates the places.

        Args:
          workers: run the function.
          function: maps a list of n items to (position in the list, row) of each of them, in any order. A row is
            copied before the next one is computed. It is uint8 [*row_shape].
          row_shape: the shape of a row.
          count: the number of places.
        """
        self._workers, self._function, self._row_shape = workers, function, tuple(row_shape)
        self._file, self._inode = -1, 0
        self._memory: np.ndarray | None = None  # of the file: [count, *row_shape]
        self._free: list[int] = []  # the last ones are used first, so that the memory grows only as needed
        if workers.processes > 1 and count and hasattr(os, "memfd_create"):
            self._file = os.memfd_create("results")
            os.ftruncate(self._file, count * math.prod(row_shape))
            self._memory = _map(self._file, self._row_shape)
            self._inode = os.fstat(self._file).st_ino
            self._free.extend(range(count))

    def __enter__(self) -> "SharedResults":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._memory is not None:
            os.close(self._file)
            self._memory = None
            self._free.clear()

    def submit(self, items: list) -> Pending:
        """Submits a call of the function with a list.

        Call `result` of what it returns once, in this context. It returns an iterable of the rows in the order of the
        list. Copy each row before you take the next one.
        """
        if len(items) > len(self._free):
            return self._workers.submit(_sent_rows, self._function, items, self._row_shape)
        places = [self._free.pop() for _ in items]
        path = f"/proc/{os.getpid()}/fd/{self._file}"
        call = self._function, items, self._row_shape, path, self._inode, places
        return _SharedResult(self, self._workers.submit(_leave_rows, *call), places)

    def _take(self, rows: np.ndarray | None, places: list[int]) -> Iterator[np.ndarray]:
        """Yields the rows that a worker has left in places, or has sent by the pipe. Then the places are free."""
        assert self._memory is not None, "the context has ended"
        try:
            yield from (self._memory[place] for place in places) if rows is None else rows
        finally:
            self._release(places)

    def _release(self, places: list[int]) -> None:
        if self._memory is not None:
            self._free.extend(places)


class _SharedResult:
    def __init__(self, owner: SharedResults, sent: Pending, places: list[int]):
        self._owner, self._sent, self._places = owner, sent, places

    def result(self) -> Iterator[np.ndarray]:
        try:
            rows = self._sent.result()
        except BaseException:
            self._owner._release(self._places)
            raise
        return self._owner._take(rows, self._places)


def _map(file: int, row_shape: tuple[int, ...]) -> np.ndarray:
    """Returns the shared memory of a file: uint8 [places, *row_shape]."""
    return np.frombuffer(mmap.mmap(file, 0), np.uint8).reshape(-1, *row_shape)


@functools.lru_cache(1)  # the first access to a page of a new mapping takes longer than to write it
def _worker_memory(path: str, inode: int, row_shape: tuple[int, ...]) -> np.ndarray:
    """Returns the shared memory of another process.

    Raises:
      OSError: if the system hides it, or it is no longer there: a call can outlive its context, and the next context
        can have the same file descriptor.
    """
    file = os.open(path, os.O_RDWR)
    try:
        if os.fstat(file).st_ino != inode:
            raise FileNotFoundError(path)
        return _map(file, row_shape)
    finally:
        os.close(file)


def _leave_rows(
    function: _Function, items: list, row_shape: tuple[int, ...], path: str, inode: int, places: list[int]
) -> np.ndarray | None:
    """Writes the rows of `function(items)` to places of the memory. Returns them if it cannot be used."""
    try:
        memory = _worker_memory(path, inode, row_shape)
    except OSError:
        return _sent_rows(function, items, row_shape)
    _write_rows(function, items, memory, places)
    return None


def _sent_rows(function: _Function, items: list, row_shape: tuple[int, ...]) -> np.ndarray:
    """Returns the rows of `function(items)`: uint8 [len(items), *row_shape]."""
    rows = np.empty((len(items), *row_shape), np.uint8)
    _write_rows(function, items, rows, range(len(items)))
    return rows


def _write_rows(function: _Function, items: list, memory: np.ndarray, places: Sequence[int]) -> None:
    """Writes the rows of `function(items)` to `memory[places]`."""
    missing = set(range(len(items)))
    for position, row in function(items):
        assert row.dtype == np.uint8 and row.shape == memory.shape[1:]
        memory[places[position]] = row
        missing.remove(position)
    assert not missing, f"no rows of {sorted(missing)}"
