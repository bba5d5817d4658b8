"""Reads Orbax checkpoints, saved on any devices. Arrays are read on demand, in slices."""

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from EasyLM.checkpoints import stacking
from EasyLM.checkpoints.entries import Entry, SliceReader
from EasyLM.checkpoints.layout import ORBAX_STATES, STEP_DIRECTORY
from EasyLM.checkpoints.stacking import Key
from EasyLM.errors import UnavailableError, UserError, error_line
from EasyLM.storage import is_remote, path_exists, read_json

_ITEM = "_METADATA"  # Orbax writes this file into a directory that holds a pytree
# Of a checkpoint with several items, the one to read.
_ITEM_NAMES = (*ORBAX_STATES, "default", "state", "train_state", "params")
_MANAGER_STEP = re.compile(r"(?:.*_)?(\d+)")  # CheckpointManager names its directories STEP or PREFIX_STEP
# The status with which an error of TensorStore begins, and those of a damaged checkpoint. Others are of its store.
_STATUS = re.compile(r"([A-Z_]+): ")
_DAMAGED = ("NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "OUT_OF_RANGE")
_CACHE_BYTES = 1 << 30  # for chunks that hold several layers, which are read one by one


def import_orbax() -> Any:
    """Returns the module `orbax.checkpoint`, whose import takes a second. Orbax logs dozens of lines for each save."""
    import orbax.checkpoint

    logging.getLogger("absl").setLevel(logging.WARNING)
    return orbax.checkpoint


def is_orbax_state(path: str) -> bool:
    """Whether a local or remote path is a directory of Orbax that holds a pytree."""
    return path_exists(f"{path}/{_ITEM}")


def read_orbax_params(path: str) -> list[Entry]:
    """Returns the entries of the parameters in an Orbax checkpoint, which may hold a train state; see `read_orbax`."""
    entries = read_orbax(path)
    if not any(entry.key[0] in ("step", "opt_state") for entry in entries):
        return entries
    return [entry.renamed(entry.key[1:]) for entry in entries if entry.key[0] == "params"]


def read_orbax(path: str) -> list[Entry]:
    """Returns the entries of an Orbax checkpoint. Reads only the names, shapes and types of its arrays.

    Args:
      path: local or remote: the directory of a pytree, that of a step with several items, or that of the steps of a
        CheckpointManager or of a run, of which the highest step is read.

    Raises:
      UserError: if the directory holds no pytree, or it is damaged. Reading a damaged array raises it too.
      UnavailableError: if a disk or an object store fails (reading an array raises it too), or Orbax cannot read from
        the store.
    """
    if is_remote(path) and not path.startswith("gs://"):  # Orbax takes other URLs for relative paths
        raise UnavailableError(f"{path}: Orbax reads local paths and gs:// only; copy the directory to a local path")
    import tensorstore
    from etils import epath

    ocp = import_orbax()
    directory = epath.Path(path if is_remote(path) else os.path.realpath(path))  # a running job may change its links
    with _names_errors(f"orbax::{path}: Orbax cannot read it"):
        item = _find_item(directory)
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(item)
            tree = getattr(metadata, "item_metadata", metadata)
            if tree is None:
                raise UserError(f"orbax::{path}: Orbax cannot read it: {_ITEM} or the index of the arrays is damaged")
            driver = "zarr3" if tree.use_zarr3 else "zarr"
            order = {key: i for i, key in enumerate(saved_keys(str(item)))}
            leaves = sorted(_leaves(tree.tree), key=lambda leaf: order[leaf[0]])
            is_ocdbt = ocp.type_handlers.is_ocdbt_checkpoint(item)
    # Empty nodes and texts have no shape. OrderedDict: JAX sorts the keys of other dicts.
    shapes = [(key, jax.ShapeDtypeStruct(x.shape, x.dtype)) for key, x in leaves if hasattr(x, "shape")]
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    stored = {key: _StoredArray(str(item), key, driver, is_ocdbt, context) for key, _ in shapes}
    return [
        Entry(key, stacked.file_shape, np.dtype(stacked.array.dtype), stored[stacked.key].reader(layer))
        for key, stacked, layer in stacking.file_order(stacking.nested(shapes, collections.OrderedDict))
    ]


@contextlib.contextmanager
def _names_errors(problem: str) -> Iterator[None]:
    """Raises what Orbax raises as UserError if the checkpoint is damaged, else as UnavailableError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind = UserError if _is_damage(error) else UnavailableError
        raise kind(f"{problem} ({error_line(error)})") from error


def _is_damage(error: Exception) -> bool:
    """Whether an error comes from the bytes of a checkpoint, not from its disk or store."""
    if status := _STATUS.match(str(error)):
        return status[1] in _DAMAGED
    # The clients of object stores have exceptions of their own, or raise those of the operating system.
    missing, parsing = (FileNotFoundError, NotADirectoryError), (ValueError, LookupError, TypeError, AttributeError)
    return isinstance(error, (*missing, *parsing, AssertionError))


def saved_keys(item: str) -> list[Key]:
    """Returns the keys of a pytree in the order in which they were saved."""
    saved = read_json(f"{item}/{_ITEM}", {"tree_metadata": dict})["tree_metadata"]
    return [tuple(str(part["key"]) for part in leaf["key_metadata"]) for leaf in saved.values()]


def _leaves(node: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yields the leaves of nested dicts and sequences."""
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from _leaves(child, (*key, str(name)))
    elif isinstance(node, list | tuple):
        for i, child in enumerate(node):
            yield from _leaves(child, (*key, str(i)))
    else:
        yield key, node


@dataclasses.dataclass(frozen=True)
class _StoredArray:
    """An array that Orbax has written with TensorStore.

    Attributes:
      item: the directory of the pytree.
      driver: TensorStore's name of the array format.
      is_ocdbt: whether all arrays are in one database, else each has a directory.
      context: TensorStore's, with the cache that the arrays of a checkpoint share.
    """

    item: str
    key: Key
    driver: str
    is_ocdbt: bool
    context: Any

    @functools.cached_property
    def _store(self) -> Any:
        import tensorstore

        name = ".".join(self.key)
        # A URL of a local file would need escapes.
        base: Any = f"{self.item}/" if is_remote(self.item) else {"driver": "file", "path": f"{self.item}/"}
        location: Any = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        if not self.is_ocdbt:
            location = f"{base}{name}/" if is_remote(self.item) else {**base, "path": f"{self.item}/{name}/"}
        spec = {
            "driver": self.driver,
            "kvstore": location,
            "fill_missing_data_reads": False,  # by default missing chunks are zeros
            "recheck_cached_data": False,  # a checkpoint does not change
            "recheck_cached_metadata": False,
        }
        return tensorstore.open(spec, read=True, context=self.context).result()

    def reader(self, layer: int | None) -> SliceReader:
        """Returns the reader of the array, or of one layer of it."""
        first = () if layer is None else (layer,)

        def read(out: np.ndarray, index: tuple[slice, ...]) -> None:
            with _names_errors(f"{self.item}: the array {'/'.join(self.key)} cannot be read"):
                out[...] = self._store[(*first, *index)].read().result()

        return SliceReader(read)


def _find_item(directory: Any) -> Any:
    """Returns the directory of the pytree in `directory`, which is itself one, or that of a step, or of a manager."""
    if (directory / _ITEM).exists():
        return directory
    children = {child.name: child for child in directory.iterdir() if child.is_dir()}
    items = [name for name, child in children.items() if (child / _ITEM).exists()]
    if chosen := chosen_item(items):
        return children[chosen]
    if items:
        examples = ", ".join(f"orbax::{directory}/{name}" for name in sorted(items))
        raise UserError(f"orbax::{directory}: holds several items; name one: {examples}")
    steps = sorted((order, name) for name in children if (order := step_order(name)))
    for (step, _), name in reversed(steps):
        nested = children[name]
        if (nested / _ITEM).exists() or any((child / _ITEM).exists() for child in nested.iterdir()):
            names = ", ".join(other for _, other in steps)
            logging.info("orbax::%s: reading step %d, in %s, the newest of %s", directory, step, name, names)
            return _find_item(nested)
        logging.warning("orbax::%s: step %d is passed over: %s is incomplete", directory, step, name)
    raise UserError(f"orbax::{directory}: no Orbax checkpoint: neither it nor its subdirectories have {_ITEM}")


def chosen_item(items: Sequence[str]) -> str | None:
    """Returns the name of the item that is read, of those of a step; None if there is none, or no telling which."""
    return items[0] if len(items) == 1 else next((name for name in _ITEM_NAMES if name in items), None)


def step_order(name: str) -> tuple[int, int] | None:
    """Returns the step of a directory, and a number that grows if a run saves the step again; None if it is no step."""
    if match := STEP_DIRECTORY.fullmatch(name):
        return int(match[2]), int(match[3] or 0)
    match = _MANAGER_STEP.fullmatch(name)
    return (int(match[1]), 0) if match else None
