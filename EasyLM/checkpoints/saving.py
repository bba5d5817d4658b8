"""Saves the checkpoints of a run in the background."""

import collections
import dataclasses
import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import jax
import numpy as np

from EasyLM.checkpoints import layout, listing, run_directory, saves, stacking
from EasyLM.checkpoints.host_copy import HostCopy
from EasyLM.checkpoints.stacking import Key
from EasyLM.checkpoints.state_file import StateFile
from EasyLM.errors import UserError, choose, error_line
from EasyLM.flags import DTYPE_ALIASES, Flag
from EasyLM.parallel import Channel, PeerError

_checkpointers = itertools.count()  # all processes create them in the same order

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
        """Returns the bytes of the arrays in the file, and of their copies in host memory, over all processes."""
        arrays = [(stacked.key, stacked.array) for stacked in stacking.stacked_arrays(self.of(state))]
        file = sum(array.size * self.dtype_of(key, array).itemsize for key, array in arrays)
        return file, sum(array.size * array.dtype.itemsize for _, array in arrays)


class Checkpointer:
    """Saves a run's states asynchronously. `save` copies the state to host memory; a thread writes the copy.

    In a run of several processes, each copies a share of the rows of each array and writes them at their places in the
    one file. Process 0 then adds the other files. If the run directory is on an object store, or not on a disk that all
    processes share, process 0 gathers and writes all rows. The host memory for the copy is reused for every save;
    `prepare` allocates it in advance. Every process must call the methods at the same steps, except `close`.

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
        self._name, self._channels = f"checkpointer/{next(_checkpointers)}", collections.deque[Channel]()
        self._number = 0
        self._others = range(1, jax.process_count())
        self._is_shared = self._prepare_directory(self._next_channel())
        self._copy = HostCopy(split=self._is_shared)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def prepare(self, state: Any) -> None:
        """Allocates host memory for a state of these shapes, in a background thread."""
        self._start(functools.partial(self._copy.allocate, stacking.stacked_arrays(self._part.of(state))))

    def save(self, state: Any, step: int, dataset_state: Mapping, metadata: Mapping, milestone: bool = False) -> None:
        """Saves a state (`step`, `params`, `opt_state`). The caller may donate its arrays afterwards.

        Waits for a save that is still in progress.

        Raises:
          UserError: if the previous save failed. Earlier checkpoints remain intact.
        """
        self.wait()
        tree = self._part.of(state)
        self._copy.update(stacking.stacked_arrays(tree))
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tree)
        name = "streaming_train_state" if self._part.save_optimizer_state else "streaming_params"
        channel = self._next_channel()

        def write() -> None:
            with channel.failing_together():
                state_file = StateFile(name, shapes, self._part.dtype_of, self._copy)
                if jax.process_index() != 0:
                    self._write_share(state_file, channel)
                    return
                table: dict = {}
                writers: saves.Writers = {
                    name: lambda file: table.update(self._write_state(state_file, file, channel)),
                    layout.CHECKSUMS: lambda file: file.write(saves.json_bytes(table)),
                    layout.DATASET: saves.json_writer(dataset_state),
                }
                self._guard()
                self._directory.write(step, writers, metadata, milestone)
                channel.send("saved")

        self._start(write)

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
          UserError: if the last save failed. Every process raises it.
        """
        if self._thread is not None:
            self._thread.join()
        failure, self._thread, self._failure = self._failure, None, None
        if isinstance(failure, OSError | PeerError):
            newest = listing.latest_checkpoint(self._directory.path)
            remains = f"{newest.name} is intact" if newest else "there is no earlier one"
            raise UserError(
                f"{self._directory.path}: the checkpoint was not saved ({error_line(failure)}); {remains}"
            ) from failure
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Blocks until the last save is written. Raises no error.

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

    def _next_channel(self) -> Channel:
        """Returns a channel for the messages of one save. Deletes those of the save before the last one."""
        self._channels.append(Channel(f"{self._name}/{self._number}"))
        self._number += 1
        if len(self._channels) > 2:
            # The last save is complete. Each process took part in it after it had received all messages of the save
            # before.
            self._channels.popleft().delete()
        return self._channels[-1]

    def _prepare_directory(self, channel: Channel) -> bool:
        """Prepares the run directory on process 0. Returns whether all processes see its files."""
        with channel.failing_together():
            if jax.process_index() != 0:
                path = channel.receive(0)
                channel.send(path is not None and self._directory.sees(path))
                return channel.receive(0)
            self._directory.prepare()
            with self._directory.visible_file() as path:
                channel.send(path)
                seen = [channel.receive(process) for process in self._others]
            is_shared = all(seen)
            channel.send(is_shared)
            if path is not None and not is_shared:
                logging.warning(
                    "%s: not all processes see this directory: process 0 gathers and writes all of a checkpoint",
                    self._directory.path,
                )
            return is_shared

    def _write_state(self, state_file: StateFile, file: BinaryIO, channel: Channel) -> dict:
        """On process 0, writes the state file with the other processes. Returns the table of checksums."""
        path = None
        if self._others and self._is_shared:
            # The others open a file of the final size. A client of NFS writes zeros into the rest of a page beyond the
            # end that it knows, even where another client has written.
            file.truncate(state_file.num_bytes)
            path = os.path.relpath(file.name, self._directory.path)
        channel.send(path)
        shares = [functools.partial(channel.receive, process) for process in self._others]
        parts, failures = [], []
        for share in (functools.partial(state_file.write_local_rows, file), *shares):
            try:
                parts += share()
            except Exception as failure:
                # The others finish first. A process whose file is deleted would report that instead of the cause.
                failures.append(failure)
        if failures:
            raise failures[0]
        return state_file.checksums(parts)

    def _write_share(self, state_file: StateFile, channel: Channel) -> None:
        """On the other processes, writes their rows into the file of process 0, and waits for the end of the save."""
        path, parts = channel.receive(0), []
        if path is not None:
            # Write-only: a client of NFS that may also read a file writes whole pages, with the rows of other clients
            # in them as it has read them.
            descriptor = os.open(os.path.join(self._directory.path, path), os.O_WRONLY)
            with os.fdopen(descriptor, "wb", buffering=1 << 16) as file:
                parts = state_file.write_local_rows(file)
                file.flush()
                os.fsync(file.fileno())
        channel.send(parts)
        channel.receive(0)
