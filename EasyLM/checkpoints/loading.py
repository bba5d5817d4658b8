"""Loads checkpoints: `PREFIX::PATH` names one, a tree of shapes says what it must hold and where each array belongs."""

import collections
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from EasyLM.checkpoints import stacking, streaming
from EasyLM.checkpoints.msgpack_arrays import Entry, host_memory
from EasyLM.errors import UserError, choose
from EasyLM.storage import is_remote

_THREADS = 2  # arrays read side by side; more hold more host memory and read no faster
_NAMES_IN_ERROR = 6


def _train_state(path: str) -> list[Entry]:
    return streaming.read_streaming(path)


def _train_state_params(path: str) -> list[Entry]:
    found = [_moved(entry, entry.key[1:]) for entry in streaming.read_streaming(path) if entry.key[0] == "params"]
    if not any(entry.key[0] == "params" for entry in found):
        raise UserError(f"{path}: not a train state; if it holds parameters alone, name it params::{path}")
    return found


def _params(path: str) -> list[Entry]:
    return _below_params(path, streaming.read_streaming(path))


def _flax_params(path: str) -> list[Entry]:
    return _below_params(path, streaming.read_flax(path))


def _orbax(path: str) -> list[Entry]:
    import orbax.checkpoint as ocp  # takes a second to import

    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(os.path.abspath(path))
    tree = tree["params"] if "opt_state" in tree else tree
    return [
        Entry(key, leaf.file_shape, np.dtype(leaf.array.dtype), _copier(leaf.array, layer))
        for key, leaf, layer in stacking.file_order(tree)
    ]


# What each prefix reads: the entries of a whole train state, or of parameters under the names they have in one.
PREFIXES: dict[str, Callable[[str], list[Entry]]] = {
    "trainstate": _train_state,
    "trainstate_params": _train_state_params,
    "params": _params,
    "flax_params": _flax_params,
    "orbax": _orbax,
}
_DIRECTORIES = ("orbax", "huggingface")


def load(spec: str, target=None, prefixes: Mapping[str, Callable[[str], list[Entry]]] = PREFIXES):
    """Reads the checkpoint `PREFIX::PATH`.

    Prefixes: `trainstate` (all of a streaming train state), `trainstate_params` (its parameters), `params` (a streaming
    file of parameters), `flax_params` (plain flax msgpack), `orbax` (an Orbax directory of a tree of parameters, or of
    a train state, whose parameters are taken), and what the caller adds to `prefixes`.

    Args:
      target: a pytree of shapes, types and shardings (`jax.ShapeDtypeStruct`, or arrays): a train state for
        `trainstate`, else its parameters. Each array is cast to the type asked for and put where its sharding says; of
        a sharded array a process transfers only its own parts. Without a sharding it stays a numpy array.
        None: whatever the file holds, as nested dicts of numpy arrays.

    A train state saved without gradient accumulation loads into one with it: accumulators and micro-step start at zero,
    the count of updates is the file's step. The other way round, gradients accumulated so far are dropped, which a
    warning says. Both keep `step`, parameters and moments.

    Raises:
      UserError: for an unknown prefix, a path that is missing or of the wrong kind, a broken file, and names or shapes
        that differ from the target's: all of that before any array is read.
    """
    entries = {entry.key: entry for entry in open_checkpoint(spec, prefixes)}
    if target is None:
        target = stacking.shapes_in_memory(entries.values())
    leaves = stacking.leaves(target)
    _match_accumulation(spec, entries, leaves)
    check(spec, entries, leaves)
    return jax.tree.unflatten(jax.tree.structure(target), _arrays(entries, leaves))


def open_checkpoint(spec: str, prefixes: Mapping[str, Callable[[str], list[Entry]]] = PREFIXES) -> list[Entry]:
    """The entries of the checkpoint `PREFIX::PATH`, none of them read yet. Raises UserError as `load` does."""
    prefix, path = parse(spec, prefixes, f"checkpoint {spec!r}")
    return prefixes[prefix](path)


def parse(spec: str, prefixes: Mapping, name: str) -> tuple[str, str]:
    """Prefix and path of `PREFIX::PATH`.

    Raises:
      UserError: beginning with `name`, for an unknown prefix, and a path that is missing or of the wrong kind.
    """
    prefix, separator, path = spec.partition("::")
    if not separator:
        raise UserError(f"{name}: say what it is, PREFIX::PATH, with one of {', '.join(prefixes)}")
    choose(f"{name}: prefix", prefix, prefixes)
    if not is_remote(path):
        kind, fits = ("directory", os.path.isdir) if prefix in _DIRECTORIES else ("file", os.path.isfile)
        if not os.path.exists(path):
            raise UserError(f"{name}: there is no {path}")
        if not fits(path):
            raise UserError(f"{name}: {path} is not a {kind}, which {prefix}:: names")
    return prefix, path


def _below_params(path: str, entries: list[Entry]) -> list[Entry]:
    if any(entry.key[0] == "step" for entry in entries):
        raise UserError(f"{path}: a train state: name it trainstate_params::{path} to take its parameters")
    return [_moved(entry, ("params", *entry.key)) for entry in entries]


def _moved(entry: Entry, key: tuple[str, ...]) -> Entry:
    return Entry(key, entry.shape, entry.dtype, entry.read_into)


def _copier(array, layer: int | None):
    return lambda out: np.copyto(out, array if layer is None else array[layer])


def _match_accumulation(spec: str, entries: dict[tuple[str, ...], Entry], leaves: list[stacking.Leaf]) -> None:
    """Gives the entries of a train state the names that they have with, or without, gradient accumulation."""
    marker, inner = ("opt_state", "mini_step"), ("opt_state", "inner_opt_state")
    saved, wanted = marker in entries, any(leaf.key == marker for leaf in leaves)
    if ("step",) not in entries or saved == wanted:
        return
    states = [entry for key, entry in entries.items() if key[0] == "opt_state"]
    for entry in states:
        del entries[entry.key]
    if wanted:
        moved = [_moved(entry, (*inner, *entry.key[1:])) for entry in states]
        moved.append(_moved(entries["step",], ("opt_state", "gradient_step")))
        moved.append(_zeros(marker, (), np.dtype(np.int32)))
        for key, entry in entries.items():
            if key[0] == "params":
                moved.append(_zeros(("opt_state", "acc_grads", *key[1:]), entry.shape, entry.dtype))
    else:
        moved = [_moved(e, ("opt_state", *e.key[2:])) for e in states if e.key[:2] == inner]
        micro_steps = int(next(e for e in states if e.key == marker).read())
        if micro_steps:
            logging.warning(
                "%s: saved in the middle of accumulation; its gradients of %d steps are dropped", spec, micro_steps
            )
    entries.update({entry.key: entry for entry in moved})


def _zeros(key, shape, dtype) -> Entry:
    return Entry(key, shape, dtype, lambda out: out.fill(0))


def check(spec: str, entries: Mapping[tuple[str, ...], Entry], leaves: list[stacking.Leaf]) -> None:
    """Raises UserError, naming names and shapes, unless the entries are what the leaves are made of."""
    wanted = {key: leaf for leaf in leaves for key in leaf.file_keys}
    reasons = [
        f"{word} {_listed(keys)}"
        for word, keys in (
            ("it lacks", [key for key in wanted if key not in entries]),
            ("it has besides", [key for key in entries if key not in wanted]),
        )
        if keys
    ]
    if reasons:
        raise UserError(f"{spec}: holds other arrays than asked for: {'; '.join(reasons)}")
    for key, leaf in wanted.items():
        if entries[key].shape != leaf.file_shape:
            raise UserError(
                f"{spec}: {'/'.join(key)} has shape {entries[key].shape}, where {leaf.file_shape} is asked for"
            )


def _listed(keys: list[tuple[str, ...]]) -> str:
    rest = len(keys) - _NAMES_IN_ERROR
    return ", ".join("/".join(key) for key in keys[:_NAMES_IN_ERROR]) + (f" and {rest} more" if rest > 0 else "")


def _arrays(entries: Mapping, leaves: list[stacking.Leaf]) -> list:
    """The leaves' arrays. One is put on its devices while the next ones are read."""
    arrays, reading = [], collections.deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for leaf in leaves:
            reading.append((leaf, pool.submit(_read_parts, entries, leaf)))
            if len(reading) > _THREADS:
                arrays.append(_placed(*reading.popleft()))
        arrays += [_placed(*item) for item in reading]
    return arrays


def _read_parts(entries: Mapping, leaf: stacking.Leaf) -> dict[tuple, np.ndarray]:
    """The parts of an array that this process's devices hold, by their bounds `((start, stop), ...)`."""
    dtype = np.dtype(leaf.array.dtype)
    parts = {bounds: host_memory([stop - start for start, stop in bounds], dtype) for bounds in _places(leaf).values()}
    for layer, key in enumerate(leaf.file_keys):
        entry, rows = entries[key], []  # rows: (what to fill, the bounds within this entry)
        for bounds, part in parts.items():
            if not leaf.stacked:
                rows.append((part, bounds))
            elif bounds[0][0] <= layer < bounds[0][1]:
                rows.append((part[layer - bounds[0][0], ...], bounds[1:]))
        if len(rows) == 1 and rows[0][0].shape == entry.shape and entry.dtype == dtype:
            entry.read_into(rows[0][0])
        elif rows:
            array = entry.read()
            for row, bounds in rows:
                row[...] = array[tuple(slice(*bound) for bound in bounds)]
    return parts


def _places(leaf: stacking.Leaf) -> dict:
    """Device -> bounds of the part that it holds. Without a sharding: None -> the whole."""
    shape, sharding = leaf.array.shape, getattr(leaf.array, "sharding", None)
    if sharding is None:
        return {None: tuple((0, size) for size in shape)}
    return {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }


def _placed(leaf: stacking.Leaf, parts) -> np.ndarray | jax.Array:
    parts, places = parts.result(), _places(leaf)
    if None in places:
        return parts[places[None]]
    arrays = [jax.device_put(parts[bounds], device) for device, bounds in places.items()]
    return jax.make_array_from_single_device_arrays(leaf.array.shape, leaf.array.sharding, arrays)
