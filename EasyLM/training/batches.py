"""Global batches on the mesh, and the data state: the number of rows consumed, at which a run continues exactly."""

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.errors import UserError
from EasyLM.storage import same_contents

PREFETCHED_BATCHES = 2


class RowSource(Protocol):
    """Rows of training data by their number.

    Attributes:
      fingerprint: JSON values that determine every row. A run continues exactly only on the same fingerprint.
    """

    fingerprint: dict[str, Any]

    def rows(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Returns rows start..start+count-1 as {name: array [count, ...]}; a pure function."""

    def metrics(self, rows_consumed: int) -> dict[str, float]:
        """Returns the metrics of the data after `rows_consumed` rows."""


def dataset_state(source: RowSource, rows_consumed: int) -> dict[str, Any]:
    """Returns the data state, JSON values."""
    return {"rows_consumed": rows_consumed, "source": source.fingerprint}


def rows_consumed(state: Mapping[str, Any], source: RowSource) -> int:
    """Returns the row of `source` that continues a data state exactly.

    Args:
      state: from `dataset_state`, or from a `dataset.pkl` of the LVM release. Of the latter only `total_tokens` is
        used: its file position is that of the reader, which is ahead of training.

    Raises:
      UserError: if the data or its order has changed, or no row of the new length continues the state exactly.
    """
    current = source.fingerprint
    length = current.get("seq_length", 1)
    if "rows_consumed" in state:
        saved = state["source"]
        names = dict.fromkeys(name for name in (*saved, *current) if name != "seq_length")
        changed = [name for name in names if not same_contents(saved.get(name), current.get(name))]
        if changed:
            raise UserError(
                f"the saved data state belongs to other data or another order: {', '.join(changed)} changed"
            )
        saved_length = saved.get("seq_length", 1)
        tokens = state["rows_consumed"] * saved_length
    elif "total_tokens" in state:
        saved = state.get("config", {})
        saved_length = None
        tokens = state["total_tokens"] - saved.get("tokens_count_at_start", 0)
    else:
        raise UserError("not a data state: it has neither rows_consumed nor total_tokens")
    if saved_length != length and (current.get("shuffle_seed", -1) >= 0 or tokens % length):
        raise UserError(
            f"the saved data state ends after token {tokens}, in rows of "
            f"{saved_length or saved.get('seq_length', 'unknown')}; no row of seq_length={length}, "
            f"shuffle_seed={current.get('shuffle_seed', -1)} continues it exactly"
        )
    return tokens // length


class Batches:
    """Endless iterator of global batches {name: jax.Array [batch_size, ...]}, prefetched by a thread.

    Each process reads only the rows of its own devices. `next` raises the thread's exceptions.

    Attributes:
      position: rows consumed by the batches so far, where a resumed run continues.
      wait_seconds: seconds that `next` has waited for the thread so far.
    """

    def __init__(self, source: RowSource, batch_size: int, sharding: NamedSharding, start_row: int = 0):
        self.position, self.wait_seconds = start_row, 0.0
        self._source, self._batch_size, self._sharding = source, batch_size, sharding
        self._ranges = _local_ranges(batch_size, sharding)
        self._ready: queue.Queue = queue.Queue(maxsize=PREFETCHED_BATCHES)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start_row,), name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, jax.Array]:
        assert not self._stop.is_set(), "closed"
        begin = time.perf_counter()
        batch = self._ready.get()
        self.wait_seconds += time.perf_counter() - begin
        if isinstance(batch, BaseException):
            self._ready.put(batch)  # the thread has ended: every later call raises this again
            raise batch
        self.position += self._batch_size
        return batch

    def close(self) -> None:
        """Stops the thread and discards prefetched batches."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)  # the thread may be blocked on a full queue

    def _work(self, row: int) -> None:
        try:
            while not self._stop.is_set():
                self._ready.put(self._batch(row))
                row += self._batch_size
        except BaseException as error:
            self._ready.put(error)

    def _batch(self, row: int) -> dict[str, jax.Array]:
        parts = {begin: self._source.rows(row + begin, end - begin) for begin, end in self._ranges}

        def rows_of_device(name, index):
            begin, end, _ = index[0].indices(self._batch_size)
            first = max(start for start in parts if start <= begin)
            return parts[first][name][(slice(begin - first, end - first), *index[1:])]

        return {
            name: jax.make_array_from_callback(
                (self._batch_size, *array.shape[1:]), self._sharding, functools.partial(rows_of_device, name)
            )
            for name, array in parts[self._ranges[0][0]].items()
        }


def _local_ranges(batch_size: int, sharding: NamedSharding) -> list[tuple[int, int]]:
    """Returns the rows [begin, end) of this process's devices. Adjacent ranges are merged."""
    rows = NamedSharding(sharding.mesh, P(*sharding.spec[:1]))
    indices = rows.addressable_devices_indices_map((batch_size,)).values()
    ranges: list[tuple[int, int]] = []
    for begin, end, _ in sorted({index[0].indices(batch_size) for index in indices if index is not None}):
        if ranges and ranges[-1][1] == begin:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((begin, end))
    return ranges
