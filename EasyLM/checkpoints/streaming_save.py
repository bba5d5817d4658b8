"""Saves the state of a run as one streaming file, which all processes write together."""

import functools
import os
from typing import Any, BinaryIO

import jax

from EasyLM.checkpoints import layout, stacking
from EasyLM.checkpoints.host_copy import HostCopy
from EasyLM.checkpoints.run_directory import RunDirectory
from EasyLM.checkpoints.saved_part import SavedPart
from EasyLM.checkpoints.saves import Begin, Commit, Finish, Writers, json_bytes
from EasyLM.checkpoints.state_file import StateFile
from EasyLM.parallel import Channel


class StreamingSave:
    """Saves streaming files. Each process copies a share of the rows, and writes them at their places in the file.

    The host memory for the copy is reused for every save.

    Args:
      is_shared: whether all processes see the directory. If not, process 0 gathers and writes all rows.
    """

    def __init__(self, directory: RunDirectory, part: SavedPart, is_shared: bool):
        self._directory, self._part, self._is_shared = directory, part, is_shared
        self._name = "streaming_train_state" if part.save_optimizer_state else "streaming_params"
        self._others = range(1, jax.process_count())
        self._copy = HostCopy(split=is_shared)

    def prepare(self, state: Any) -> None:
        """Allocates host memory for a state of these shapes."""
        self._copy.allocate(stacking.stacked_arrays(self._part.of(state)))

    def start(self, state: Any, begin: Begin, channel: Channel) -> Finish:
        """Copies the state, which may then be donated. Returns the function that writes the copy."""
        tree = self._part.of(state)
        self._copy.update(stacking.stacked_arrays(tree))
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tree)

        def finish(commit: Commit) -> None:
            state_file = StateFile(self._name, shapes, self._part.dtype_of, self._copy)
            if jax.process_index() != 0:
                self._write_share(state_file, channel)
                return
            table: dict = {}
            writers: Writers = {
                self._name: lambda file: table.update(self._write_state(state_file, file, channel)),
                layout.CHECKSUMS: lambda file: file.write(json_bytes(table)),
            }
            commit(begin(), writers)

        return finish

    def _write_state(self, state_file: StateFile, file: BinaryIO, channel: Channel) -> dict:
        """On process 0, writes the state file with the other processes. Returns the table of checksums."""
        path = None
        if self._others and self._is_shared:
            # The others open a file of the final size. Otherwise an NFS client fills the last page with zeros beyond
            # the end of the file that it has cached, and overwrites the rows of another client.
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
        """On the other processes, writes their rows into the file of process 0."""
        path, parts = channel.receive(0), []
        if path is not None:
            # Write-only: with read access, an NFS client reads whole pages and writes them back, with old rows of
            # other clients in them.
            descriptor = os.open(os.path.join(self._directory.path, path), os.O_WRONLY)
            with os.fdopen(descriptor, "wb", buffering=1 << 16) as file:
                parts = state_file.write_local_rows(file)
                file.flush()
                os.fsync(file.fileno())
        channel.send(parts)
