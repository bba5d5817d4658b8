"""Reads the parameters of an Orbax checkpoint, saved on any devices."""

import logging
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from EasyLM.checkpoints import stacking
from EasyLM.checkpoints.entries import Entry
from EasyLM.errors import UserError
from EasyLM.storage import is_remote

_ITEM = "_METADATA"  # Orbax writes this file into a directory that holds a pytree
_ITEM_NAMES = ("default", "state", "train_state", "params")  # of a checkpoint with several items, the one to read
_STEP = re.compile(r"(?:.*_)?(\d+)")  # CheckpointManager names its directories STEP or PREFIX_STEP


def read_orbax(path: str) -> list[Entry]:
    """Returns the entries of an Orbax checkpoint of parameters or of a train state. All of it is read into memory.

    Args:
      path: local or remote: the directory of a pytree, that of a step with several items, or that of a
        CheckpointManager, of which the newest step is read.

    Raises:
      UserError: if the directory holds no pytree, or Orbax cannot read it.
    """
    import jax
    import orbax.checkpoint as ocp  # imported here because the import takes a second
    from etils import epath

    directory = epath.Path(path if is_remote(path) else os.path.abspath(path))
    try:
        item = _find_item(directory)
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(item)
            tree = getattr(metadata, "item_metadata", metadata)
            # NumPy arrays have no devices. By default Orbax needs the devices that saved the checkpoint.
            to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), getattr(tree, "tree", tree))
            tree = checkpointer.restore(item, args=ocp.args.PyTreeRestore(restore_args=to_numpy))
    except UserError:
        raise
    except Exception as error:  # Orbax, and the client of each object store, have their own exceptions
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"orbax::{path}: Orbax cannot read it ({type(error).__name__}: {reason})") from error
    tree = tree["params"] if "opt_state" in tree else tree
    return [
        Entry(key, stacked.file_shape, np.dtype(stacked.array.dtype), _copier(stacked.array, layer))
        for key, stacked, layer in stacking.file_order(tree)
    ]


def _find_item(directory: Any) -> Any:
    """Returns the directory of the pytree in `directory`, which is itself one, or that of a step, or of a manager."""
    if (directory / _ITEM).exists():
        return directory
    children = {child.name: child for child in directory.iterdir() if child.is_dir()}
    items = [name for name, child in children.items() if (child / _ITEM).exists()]
    chosen = items if len(items) == 1 else [name for name in _ITEM_NAMES if name in items]
    if chosen:
        return children[chosen[0]]
    if items:
        examples = ", ".join(f"orbax::{directory}/{name}" for name in sorted(items))
        raise UserError(f"orbax::{directory}: holds several items; name one: {examples}")
    steps = {int(match[1]): name for name in children if (match := _STEP.fullmatch(name))}
    for step in sorted(steps, reverse=True):
        nested = children[steps[step]]
        if (nested / _ITEM).exists() or any((child / _ITEM).exists() for child in nested.iterdir()):
            logging.info("orbax::%s: reading step %d, the newest of %s", directory, step, sorted(steps))
            return _find_item(nested)
        logging.warning("orbax::%s: step %d is passed over: it is incomplete", directory, step)
    raise UserError(f"orbax::{directory}: no Orbax checkpoint: neither it nor its subdirectories have {_ITEM}")


def _copier(array: np.ndarray, layer: int | None) -> Callable[[np.ndarray], None]:
    return lambda out: np.copyto(out, array if layer is None else array[layer])
