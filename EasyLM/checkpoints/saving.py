"""Checkpoints of a run: saved in the background, loaded by prefix, with the facts beside them.

The parts: `streaming` is the byte format, `stacking` the names of layers, `loading` reads `PREFIX::PATH`,
`run_directory` places files so that a kill loses nothing, `metadata` is what lies beside. Here they come together.
"""

import functools
import json
import logging
import threading
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.checkpoints import msgpack_arrays, run_directory, stacking, streaming
from EasyLM.checkpoints.loading import PREFIXES, load, open_checkpoint
from EasyLM.checkpoints.metadata import load_dataset_state, load_metadata, make_metadata
from EasyLM.checkpoints.run_directory import Saved, beside, newest
from EasyLM.errors import UserError, choose
from EasyLM.flags import Flag

__all__ = [
    "CHECKPOINTER_FLAGS",
    "FLOAT_DTYPES",
    "PREFIXES",
    "Checkpointer",
    "Saved",
    "beside",
    "load",
    "load_dataset_state",
    "load_metadata",
    "make_metadata",
    "newest",
    "open_checkpoint",
]

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
        "Type of the saved parameters (never of the optimizer's state). Empty: as they are in a train state, so that "
        "it resumes exactly; bf16 for parameters alone.",
        choices=("", *FLOAT_DTYPES),
    ),
    "save_optimizer_state": Flag(False, "Save the whole train state, to resume from; else the parameters alone."),
}


class Checkpointer:
    """Saves a run's states. `save` copies the state to host memory and returns; a thread writes the copy.

    The host memory is kept from save to save: one copy of what is saved, on process 0 alone. `prepare`, called while
    something else is slow, keeps the first save from waiting for that memory.
    Every process of a multi-host run calls every method at the same step; process 0 writes.

    Args:
      run_dir: local, or remote through fsspec (see `run_directory`).
      config: values of CHECKPOINTER_FLAGS.

    Raises:
      UserError: if the run directory cannot be written.
    """

    def __init__(self, run_dir: str, config):
        self._whole = config.save_optimizer_state
        name = choose("checkpointer.float_dtype", config.float_dtype, CHECKPOINTER_FLAGS["float_dtype"].choices)
        self._dtype = FLOAT_DTYPES.get(name, None if self._whole else FLOAT_DTYPES["bf16"])
        self._directory = run_directory.open_run_directory(run_dir)
        self._buffers: dict[tuple[str, ...], np.ndarray] = {}
        self._thread = self._failure = None
        if jax.process_index() == 0:
            self._directory.prepare()

    def prepare(self, state) -> None:
        """Takes the host memory for a state of these shapes, in the background: fresh memory is slow to come by."""
        if jax.process_index() == 0:
            self._start(lambda: [self._buffer(leaf).fill(0) for leaf in stacking.leaves(self._saved_part(state))])

    def save(self, state, step: int, dataset_state: Mapping, metadata: Mapping, milestone: bool = False) -> None:
        """Saves a state (`step`, `params`, `opt_state`). On return its arrays may be given away.

        A save still in progress is waited for.

        Raises:
          UserError: if the save before this one failed. What was saved before is untouched.
        """
        self.wait()
        tree = self._saved_part(state)
        self._copy(stacking.leaves(tree))
        if jax.process_index() != 0:
            return
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tree)
        facts = {run_directory.DATASET: _json(dataset_state), run_directory.METADATA: _json(metadata)}
        writers = {
            "streaming_train_state" if self._whole else "streaming_params": lambda file: self._write(file, shapes),
            **{name: functools.partial(_write_bytes, data) for name, data in facts.items()},
        }
        self._start(lambda: self._directory.write(step, writers, milestone))

    def wait(self) -> None:
        """Returns when all is on disk.

        Raises:
          UserError: on every process, if the last save failed.
        """
        if self._thread is not None:
            self._thread.join()
        failure, self._thread, self._failure = self._failure, None, None
        failed = failure is not None
        if jax.process_count() > 1:
            failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failed)))
        if isinstance(failure, OSError):
            raise UserError(
                f"{self._directory.path}: the checkpoint was not saved ({failure.strerror or failure}); the one before "
                "it is untouched"
            ) from failure
        if failed:
            raise failure or UserError(f"{self._directory.path}: process 0 could not save the checkpoint")

    def close(self) -> None:
        """Returns when what is being written is written. Asks no other process, as `wait` does: after an error of this
        one alone the others are in the middle of a step, and would never answer."""
        if self._thread is not None:
            self._thread.join()

    def _saved_part(self, state):
        return state if self._whole else state.params.get("params", state.params)

    def _start(self, work) -> None:
        def run():
            try:
                work()
            except BaseException as failure:  # raised where the loop asks, by `wait`
                self._failure = failure
                logging.error("saving a checkpoint failed: %s", failure)

        self._thread = threading.Thread(target=run, name="checkpoint writer")
        self._thread.start()

    def _buffer(self, leaf: stacking.Leaf) -> np.ndarray:
        shape, dtype = leaf.array.shape, leaf.array.dtype
        found = self._buffers.get(leaf.key)
        if found is None or found.shape != shape or found.dtype != dtype:
            found = self._buffers[leaf.key] = msgpack_arrays.host_memory(shape, dtype)
        return found

    def _copy(self, leaves: list[stacking.Leaf]) -> None:
        """Fills the buffers. A real copy: the next step overwrites the arrays."""
        local = [leaf for leaf in leaves if getattr(leaf.array, "is_fully_addressable", True)]
        for leaf in local:
            if isinstance(leaf.array, jax.Array):
                leaf.array.copy_to_host_async()
        for leaf in local if jax.process_index() == 0 else ():
            buffer = self._buffer(leaf)
            for index, part in _parts(leaf.array):
                np.copyto(buffer[index], part)
        for leaf in leaves:
            if not getattr(leaf.array, "is_fully_addressable", True):
                self._gather(leaf)

    def _gather(self, leaf: stacking.Leaf) -> None:
        """Brings an array that is spread over processes to process 0, one layer at a time."""
        replicated = NamedSharding(leaf.array.sharding.mesh, P())
        for layer in range(len(leaf.file_keys)):
            index = (layer,) if leaf.stacked else ()
            # On every process: programs of several processes on CPUs (gloo) hang if two are under way at a time.
            whole = _take(replicated)(leaf.array, *index).block_until_ready()
            if jax.process_index() == 0:
                np.copyto(self._buffer(leaf)[(*index, ...)], np.asarray(whole.addressable_data(0)))

    def _write(self, file, shapes) -> None:
        for key, leaf, layer in stacking.file_order(shapes):
            array = self._buffers[leaf.key]
            array = array if layer is None else array[layer, ...]
            if self._dtype is not None and _is_parameter(key, self._whole) and _is_float(array.dtype):
                array = array.astype(self._dtype)
            streaming.write_entry(file, key, array)


def _is_parameter(key: tuple[str, ...], whole: bool) -> bool:
    return not whole or key[0] == "params"


def _is_float(dtype) -> bool:
    return jax.numpy.issubdtype(dtype, jax.numpy.floating)


def _parts(array):
    """(index, values) of each part of an array on this host, each part once."""
    if not isinstance(array, jax.Array):
        return [((...,), array)]
    return [((*s.index, ...), np.asarray(s.data)) for s in array.addressable_shards if s.replica_id == 0]


@functools.cache
def _take(replicated: NamedSharding):
    def take(array, *index):
        return jax.lax.dynamic_index_in_dim(array, index[0], keepdims=False) if index else array

    return jax.jit(take, out_shardings=replicated)


def _json(value: Mapping) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write_bytes(data: bytes, file) -> None:
    file.write(data)
