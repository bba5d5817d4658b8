"""Saves the checkpoints of a run in the background."""

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.checkpoints import checksums, entries, layout, listing, run_directory, saves, stacking, streaming
from EasyLM.checkpoints.stacking import Key, StackedArray
from EasyLM.errors import UserError, choose
from EasyLM.flags import DTYPE_ALIASES, Flag

# Flag value -> type of saved parameters, for `--checkpointer.float_dtype` and `--float_dtype`.
FLOAT_DTYPES = {
    name: np.dtype(dtype)
    for dtype, names in {
        "float32": ("fp32", "float32"),
        "bfloat16": ("bf16", "bfloat16"),
        "float16": ("fp16", "float16"),
    }.items()
    for name in names
}

CHECKPOINTER_FLAGS = {
    "float_dtype": Flag(
        "",
        "Type of the saved parameters (the optimizer's state keeps its types). Empty: in a train state unchanged, for "
        "an exact resume; bf16 for parameters alone.",
        choices=("", *FLOAT_DTYPES),
        aliases=DTYPE_ALIASES,
    ),
    "save_optimizer_state": Flag(False, "Save the whole train state, for resuming; else the parameters alone."),
}


@dataclasses.dataclass(frozen=True)
class SavedPart:
    """Which part of a train state a checkpoint holds, and in which types.

    Attributes:
      float_dtype, save_optimizer_state: see CHECKPOINTER_FLAGS.
    """

    float_dtype: str = ""
    save_optimizer_state: bool = False

    def __post_init__(self) -> None:
        choose("float_dtype", self.float_dtype, ("", *FLOAT_DTYPES))

    def of(self, state: Any) -> Any:
        """Returns the part of a train state: all of it, or the parameters."""
        return state if self.save_optimizer_state else state.params.get("params", state.params)

    def dtype_of(self, key: Key, array: Any) -> np.dtype:
        """Returns the type in which an array of the part, or a `jax.ShapeDtypeStruct`, is saved."""
        is_parameter = not self.save_optimizer_state or key[0] == "params"
        name = self.float_dtype or ("" if self.save_optimizer_state else "bf16")
        converted = name and is_parameter and jax.numpy.issubdtype(array.dtype, jax.numpy.floating)
        return FLOAT_DTYPES[name] if converted else np.dtype(array.dtype)

    def sizes(self, state: Any) -> tuple[int, int]:
        """Returns the bytes of the arrays in the file, and of their copies in the memory of process 0."""
        arrays = [(stacked.key, stacked.array) for stacked in stacking.stacked_arrays(self.of(state))]
        file = sum(array.size * self.dtype_of(key, array).itemsize for key, array in arrays)
        return file, sum(array.size * array.dtype.itemsize for _, array in arrays)


class Checkpointer:
    """Saves a run's states asynchronously. `save` copies the state to host memory; a thread writes the copy.

    Process 0 writes the files. It keeps one host copy of the saved arrays and reuses this memory for every save.
    `prepare` allocates the memory in advance. In a multi-host run, every process must call `save` and `wait` at the
    same steps.

    Args:
      run_dir: a local path, or a remote path that fsspec supports; see `run_directory`.
      float_dtype, save_optimizer_state: see CHECKPOINTER_FLAGS.
      guard: called on process 0 before each save writes; raises UserError if another run has taken the directory.

    Raises:
      UserError: if the type is unknown or the run directory is not writable.
    """

    def __init__(
        self,
        run_dir: str,
        *,
        float_dtype: str = "",
        save_optimizer_state: bool = False,
        guard: Callable[[], None] = lambda: None,
    ):
        self._part = SavedPart(float_dtype, save_optimizer_state)
        self._guard = guard
        self._directory = run_directory.open_run_directory(run_dir)
        self._buffers: dict[Key, np.ndarray] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        if jax.process_index() == 0:
            self._directory.prepare()

    def prepare(self, state: Any) -> None:
        """Allocates host memory for a state of these shapes. Page faults are slow, so a background thread does it."""
        if jax.process_index() == 0:
            arrays = stacking.stacked_arrays(self._part.of(state))

            def touch_pages() -> None:
                for stacked in arrays:
                    self._buffer(stacked).fill(0)

            self._start(touch_pages)

    def save(self, state: Any, step: int, dataset_state: Mapping, metadata: Mapping, milestone: bool = False) -> None:
        """Saves a state (`step`, `params`, `opt_state`). The caller may donate its arrays afterwards.

        Waits for a save that is still in progress.

        Raises:
          UserError: if the previous save failed. Earlier checkpoints remain intact.
        """
        self.wait()
        tree = self._part.of(state)
        self._copy(stacking.stacked_arrays(tree))
        if jax.process_index() != 0:
            return
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tree)
        state_name = "streaming_train_state" if self._part.save_optimizer_state else "streaming_params"
        table: dict = {}
        writers: saves.Writers = {
            state_name: lambda file: table.update(self._write(file, shapes, state_name)),
            layout.CHECKSUMS: lambda file: file.write(saves.json_bytes(table)),
            layout.DATASET: saves.json_writer(dataset_state),
        }

        def write() -> None:
            self._guard()
            self._directory.write(step, writers, metadata, milestone)

        self._start(write)

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
          UserError: if the last save failed. Every process raises it.
        """
        if self._thread is not None:
            self._thread.join()
        failure, self._thread, self._failure = self._failure, None, None
        failed = failure is not None
        if jax.process_count() > 1:
            failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failed)))
        if isinstance(failure, OSError):
            reason = f"{failure.strerror or failure}" + (f": {failure.filename}" if failure.filename else "")
            newest = listing.latest_checkpoint(self._directory.path)
            remains = f"{newest.name} is intact" if newest else "there is no earlier one"
            raise UserError(f"{self._directory.path}: the checkpoint was not saved ({reason}); {remains}") from failure
        if failed:
            raise failure or UserError(f"{self._directory.path}: process 0 could not save the checkpoint")

    def close(self) -> None:
        """Blocks until the last save is written. Raises no error and does not communicate with other processes.

        Use it after an error on this process alone, while the other processes execute a step.
        """
        if self._thread is not None:
            self._thread.join()

    def _start(self, work: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as failure:  # `wait` raises the error
                self._failure = failure
                logging.error("saving a checkpoint failed: %s", failure)

        self._thread = threading.Thread(target=run, name="checkpoint writer")
        self._thread.start()

    def _buffer(self, stacked: StackedArray) -> np.ndarray:
        shape, dtype = stacked.array.shape, stacked.array.dtype
        buffer = self._buffers.get(stacked.key)
        if buffer is None or buffer.shape != shape or buffer.dtype != dtype:
            buffer = self._buffers[stacked.key] = entries.host_memory(shape, dtype)
        return buffer

    def _copy(self, arrays: list[StackedArray]) -> None:
        """Copies the arrays into the buffers. No memory is shared, so the arrays may be donated afterwards."""
        local = [stacked for stacked in arrays if getattr(stacked.array, "is_fully_addressable", True)]
        for stacked in local:
            if isinstance(stacked.array, jax.Array):
                stacked.array.copy_to_host_async()
        for stacked in local if jax.process_index() == 0 else ():
            buffer = self._buffer(stacked)
            for index, part in _local_parts(stacked.array):
                np.copyto(buffer[index], part)
        for stacked in arrays:
            if not getattr(stacked.array, "is_fully_addressable", True):
                self._gather(stacked)

    def _gather(self, stacked: StackedArray) -> None:
        """Gathers an array that is sharded over processes into the buffer of process 0, one layer at a time."""
        replicated = NamedSharding(stacked.array.sharding.mesh, P())
        for layer in range(len(stacked.file_keys)):
            index = (layer,) if stacked.is_stacked else ()
            # Every process blocks here, because two concurrent multi-process programs deadlock on CPUs (gloo).
            gathered = _gather_program(replicated)(stacked.array, *index).block_until_ready()
            if jax.process_index() == 0:
                np.copyto(self._buffer(stacked)[(*index, ...)], np.asarray(gathered.addressable_data(0)))

    def _write(self, file: BinaryIO, shapes: Any, file_name: str) -> dict:
        """Writes the arrays and returns the table of their checksums."""
        by_key = {}
        for key, stacked, layer in stacking.file_order(shapes):
            array = self._buffers[stacked.key]
            array = array if layer is None else array[layer, ...]
            array = array.astype(self._part.dtype_of(key, array), copy=False)
            streaming.write_entry(file, key, array)
            by_key[key] = checksums.array_checksum(key, array)
        return checksums.make_table(file_name, file.tell(), by_key)


def _local_parts(array: np.ndarray | jax.Array) -> Iterator[tuple[tuple, np.ndarray]]:
    """Yields (index, values) of each part of an array on this host, without replicas."""
    if not isinstance(array, jax.Array):
        yield (...,), array
        return
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            yield (*shard.index, ...), np.asarray(shard.data)


@functools.cache
def _gather_program(replicated: NamedSharding) -> Callable[..., jax.Array]:
    def take(array: jax.Array, *index: int) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(array, index[0], keepdims=False) if index else array

    return jax.jit(take, out_shardings=replicated)
