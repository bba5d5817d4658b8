"""Saves the state of a run with Orbax: a directory, into which each process writes the shards of its devices.

Orbax's CheckpointManager would name, number and delete the steps of a run by its own rules. Here the run directory does
this for both formats, and the AsyncCheckpointer that a manager uses writes the state. A CheckpointManager can read the
steps: `CheckpointManager(f"{RUN}/checkpoints", options=CheckpointManagerOptions(step_prefix="step",
step_format_fixed_length=8))`. Their item is `orbax_train_state`.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from EasyLM.checkpoints import stacking
from EasyLM.checkpoints.layout import ORBAX_STATES
from EasyLM.checkpoints.orbax_directory import import_orbax
from EasyLM.checkpoints.run_directory import RunDirectory
from EasyLM.checkpoints.saved_part import SavedPart
from EasyLM.checkpoints.saves import Begin, Commit, Finish
from EasyLM.checkpoints.stacking import Key
from EasyLM.errors import UnavailableError, UserError, error_line
from EasyLM.parallel import Channel


def orbax_arguments(tree: Any, dtype_of: Callable[[Key, Any], np.dtype], parent: Key = ()) -> Any:
    """Returns the arguments with which Orbax saves the arrays of a tree as nested dicts.

    Args:
      dtype_of: (key, array) -> the type in which an array is saved.
      parent: the names above the tree in the checkpoint.
    """
    ocp = import_orbax()
    arrays, arguments = [], []
    for stacked in stacking.stacked_arrays(tree):
        key = (*parent, *stacked.key)
        arrays.append((key, stacked.array if isinstance(stacked.array, jax.Array) else np.asarray(stacked.array)))
        # A chunk of the file holds a single layer, so that layers can be read one at a time.
        layers = (0,) if stacked.is_stacked else ()
        arguments.append((key, ocp.SaveArgs(dtype=dtype_of(stacked.key, stacked.array), shard_axes=layers)))
    # OrderedDict: JAX, and thereby Orbax, sorts the keys of other dicts. Here they keep the order of streaming files.
    item, save_args = (stacking.nested(leaves, collections.OrderedDict) for leaves in (arrays, arguments))
    return ocp.args.PyTreeSave(item, save_args=save_args)


@contextlib.contextmanager
def names_write_errors() -> Iterator[None]:
    """Raises the errors with which Orbax and TensorStore write, which have no common type, as UnavailableError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UnavailableError(f"Orbax: {error_line(error)}") from error


class OrbaxSave:
    """Saves with Orbax, on a disk that all processes share or on gs://."""

    def __init__(self, directory: RunDirectory, part: SavedPart):
        self._directory, self._part = directory, part
        self._name = ORBAX_STATES[0 if part.save_optimizer_state else 1]

    def prepare(self, state: Any) -> None:
        """Imports Orbax, which takes a second."""
        self._checkpointer  # noqa: B018  (created once)

    @functools.cached_property
    def _checkpointer(self) -> Any:
        ocp = import_orbax()
        # With a set of processes Orbax waits for them through the coordination service. Otherwise it runs a collective
        # on the devices.
        processes = set(range(jax.process_count())) if jax.process_count() > 1 else None
        options = ocp.options.MultiprocessingOptions(primary_host=0, active_processes=processes)
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
        return ocp.AsyncCheckpointer(handler, multiprocessing_options=options)

    def start(self, state: Any, begin: Begin, channel: Channel) -> Finish:
        """Copies the state to host memory; it may then be donated. Returns the function that waits for the writes.

        Raises:
          UnavailableError: if Orbax cannot write, after deleting the new directory. The function raises it, too.
        """
        directory = self._same_directory(begin, channel)
        parent = () if self._part.save_optimizer_state else ("params",)
        arguments = orbax_arguments(self._part.of(state), self._part.dtype_of, parent)
        with self._writing(directory):
            self._checkpointer.save(f"{directory}/{self._name}", args=arguments)

        def finish(commit: Commit) -> None:
            with self._writing(directory):
                self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                commit(directory, {})

        return finish

    def _same_directory(self, begin: Begin, channel: Channel) -> str:
        """Returns the new directory of process 0. The processes may have the run directory at different paths."""
        root = self._directory.path
        if jax.process_index() != 0:
            return f"{root}/{channel.receive(0)}"
        directory = begin()
        channel.send(directory.removeprefix(f"{root}/"))
        return directory

    @contextlib.contextmanager
    def _writing(self, directory: str) -> Iterator[None]:
        """Names the errors of Orbax, and deletes the directory if the body fails."""
        try:
            with names_write_errors():
                yield
        except Exception:
            if jax.process_index() == 0:
                self._directory.discard(directory)
            raise
