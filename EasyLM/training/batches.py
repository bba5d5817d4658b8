"""Global batches on the mesh from any row source, and the state from which a run continues: one integer, rows consumed.

A row source has `rows(start, count) -> {name: array [count, ...]}`, a pure function; `metrics(rows_consumed) -> {name:
number}`; and `identity`, JSON values that must be found again for a run to continue exactly.
"""

import contextlib
import functools
import queue
import threading
import time

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.errors import UserError


def dataset_state(source, rows_consumed: int) -> dict:
    """What a run needs to continue with the row after `rows_consumed`, as JSON values."""
    return {"rows_consumed": rows_consumed, "source": source.identity}


def rows_consumed(state: dict, source) -> int:
    """The row at which `source` continues from a state: one of `dataset_state`, or a `dataset.pkl` of the LVM release.

    Of the release's, `total_tokens` counts, which is exact: its file position is that of its reader, ahead of training.

    Raises:
      UserError: if the data, its order or the length of a row has changed such that no row continues exactly.
    """
    now = source.identity
    length = now.get("seq_length", 1)
    if "rows_consumed" in state:
        saved = state["source"]
        changed = [name for name in now if name != "seq_length" and saved.get(name) != now[name]]
        if changed:
            raise UserError(
                f"the saved data state is of other data, or of another order ({', '.join(changed)} changed): it "
                "cannot be continued exactly; to begin on this data anew, load the checkpoint without its data state, "
                "under another --logger.experiment_id"
            )
        saved_length = saved.get("seq_length", 1)
        tokens = state["rows_consumed"] * saved_length
    else:
        if "total_tokens" not in state:
            raise UserError("the saved data state is none: it has neither rows_consumed nor total_tokens")
        saved = state.get("config", {})
        saved_length = None
        tokens = state["total_tokens"] - saved.get("tokens_count_at_start", 0)
    if saved_length != length and (now.get("shuffle_seed", -1) >= 0 or tokens % length):
        raise UserError(
            f"the saved data state ends after token {tokens} of the data in rows of "
            f"{saved_length or saved.get('seq_length', 'unknown')}; no row of seq_length={length}, "
            f"shuffle_seed={now.get('shuffle_seed', -1)} continues it exactly"
        )
    return tokens // length


class Batches:
    """Endless iterator of global batches {name: jax.Array [batch_size, ...]}, made ahead by a thread.

    Each process reads the rows of its own devices, and no others. The thread's exceptions are raised by `next`.

    Attributes:
      position: rows consumed by the batches that were yielded: where to start again.
      wait_seconds: how long `next` has waited for the thread so far, in total.
    """

    def __init__(self, source, batch_size: int, sharding: NamedSharding, start_row: int = 0, ahead: int = 2):
        """Begins to read at once; `ahead`: batches kept ready. Call `close` when done."""
        self.position, self.wait_seconds = start_row, 0.0
        self._source, self._batch_size, self._sharding = source, batch_size, sharding
        self._runs = _local_runs(batch_size, sharding)
        self._ready = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start_row,), name="batches", daemon=True)
        self._thread.start()

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, jax.Array]:
        assert not self._stop.is_set(), "closed"
        begin = time.perf_counter()
        batch = self._ready.get()
        self.wait_seconds += time.perf_counter() - begin
        if isinstance(batch, BaseException):
            self._ready.put(batch)  # the thread has ended: every further call raises it again
            raise batch
        self.position += self._batch_size
        return batch

    def close(self) -> None:
        """Stops the thread and drops the batches made ahead."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)  # it may be waiting for room

    def _work(self, row):
        try:
            while not self._stop.is_set():
                self._ready.put(self._batch(row))
                row += self._batch_size
        except BaseException as error:
            self._ready.put(error)

    def _batch(self, row):
        runs = {begin: self._source.rows(row + begin, end - begin) for begin, end in self._runs}

        def part(name, index):
            """The rows of one device: a slice of the run that they lie in."""
            begin, end, _ = index[0].indices(self._batch_size)
            first = max(start for start in runs if start <= begin)
            return runs[first][name][(slice(begin - first, end - first), *index[1:])]

        return {
            name: jax.make_array_from_callback(
                (self._batch_size, *array.shape[1:]), self._sharding, functools.partial(part, name)
            )
            for name, array in runs[self._runs[0][0]].items()
        }


def _local_runs(batch_size: int, sharding: NamedSharding) -> list[tuple[int, int]]:
    """The rows [begin, end) that this process's devices hold, runs that touch merged."""
    rows = NamedSharding(sharding.mesh, P(*sharding.spec[:1]))
    indices = rows.addressable_devices_indices_map((batch_size,)).values()
    runs = []
    for begin, end, _ in sorted({index[0].indices(batch_size) for index in indices}):
        if runs and runs[-1][1] == begin:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((begin, end))
    return runs
