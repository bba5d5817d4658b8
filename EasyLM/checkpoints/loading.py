"""Loads checkpoints into the shapes, types and shardings of a target tree."""

import collections
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from EasyLM.checkpoints import stacking
from EasyLM.checkpoints.entries import Entry, PartReader, SliceReader, host_memory
from EasyLM.checkpoints.formats import CHECKPOINT_FORMATS, Reader, open_checkpoint
from EasyLM.checkpoints.shared_reads import SharedReads
from EasyLM.checkpoints.stacking import Key, StackedArray
from EasyLM.errors import UserError

_READ_THREADS = 2  # more threads need more host memory and are no faster
_MAX_NAMES_IN_ERROR = 6

Bounds = tuple[tuple[int, int], ...]  # (start, stop) along each axis, for one part of an array


def load(spec: str, target: Any = None, formats: Mapping[str, Reader] = CHECKPOINT_FORMATS) -> Any:
    """Loads the checkpoint `PREFIX::PATH`.

    Prefixes:
      trainstate: all of a train state, which is a streaming file or a directory of Orbax.
      trainstate_params: the parameters of a train state.
      trainstate_ema: the moving average of the parameters in a train state.
      params: a streaming file of parameters.
      flax_params: a plain flax msgpack file of parameters.
      orbax: the parameters in a directory of Orbax, which holds parameters or a train state.

    `formats` may define more prefixes.

    The target may enable or disable gradient accumulation independently of the file. If only the target has it, the
    accumulators and the micro-step are zero, and the number of updates is the file's step. If only the file has it, the
    accumulated gradients are dropped with a warning. In both cases `step`, parameters and moments are kept.

    Args:
      target: a pytree of `jax.ShapeDtypeStruct` or arrays, which give shapes, types and shardings. For `trainstate` it
        is a train state; for the other prefixes it holds parameters. Each array is cast to the target's type and placed
        on the target's sharding. A process transfers only its own shards. If the target is spread over processes, each
        reads a share of the rows of a streaming file, and the devices exchange them; all processes must call `load`. An
        array without a sharding is returned as a NumPy array. If the target is None, the whole file is returned as
        nested dicts of NumPy arrays.
      formats: the allowed prefixes and their readers.

    Returns:
      The target's structure with the loaded arrays.

    Raises:
      UserError: if the prefix is unknown, the path is missing or of the wrong kind, the file is broken, or names or
        shapes differ from the target's. These errors are raised before any array is read.
    """
    return load_entries(spec, open_checkpoint(spec, formats), target)


def load_entries(spec: str, opened: Sequence[Entry], target: Any = None) -> Any:
    """Loads an open checkpoint; see `load`.

    Args:
      spec: the checkpoint's name in error messages.
      opened: the entries that `open_checkpoint` returned.
    """
    entries = {entry.key: entry for entry in opened}
    if target is None:
        target = stacking.shapes_in_memory(entries.values())
    wanted = stacking.stacked_arrays(target)
    _match_accumulation(spec, entries, wanted)
    check_entries(spec, entries, wanted)
    return jax.tree.unflatten(jax.tree.structure(target), _read_arrays(entries, wanted))


def _match_accumulation(spec: str, entries: dict[Key, Entry], wanted: list[StackedArray]) -> None:
    """Renames the entries of a train state for a target with, or without, gradient accumulation."""
    marker, inner = ("opt_state", "mini_step"), ("opt_state", "inner_opt_state")
    saved_with, wanted_with = marker in entries, any(stacked.key == marker for stacked in wanted)
    if ("step",) not in entries or saved_with == wanted_with:
        return
    states = [entry for key, entry in entries.items() if key[0] == "opt_state"]
    for entry in states:
        del entries[entry.key]
    if wanted_with:
        renamed = [entry.renamed((*inner, *entry.key[1:])) for entry in states]
        renamed.append(entries["step",].renamed(("opt_state", "gradient_step")))
        renamed.append(_zeros(marker, (), np.dtype(np.int32)))
        for key, entry in entries.items():
            if key[0] == "params":
                renamed.append(_zeros(("opt_state", "acc_grads", *key[1:]), entry.shape, entry.dtype))
    else:
        renamed = [entry.renamed(("opt_state", *entry.key[2:])) for entry in states if entry.key[:2] == inner]
        micro_steps = int(next(entry for entry in states if entry.key == marker).read())
        if micro_steps:
            logging.warning(
                "%s: saved during accumulation; the accumulated gradients of %d steps are dropped", spec, micro_steps
            )
    entries.update({entry.key: entry for entry in renamed})


def _zeros(key: Key, shape: tuple[int, ...], dtype: np.dtype) -> Entry:
    return Entry(key, shape, dtype, PartReader(lambda out, start: out.fill(0)))


def check_entries(source: str, entries: Mapping[Key, Entry], wanted: list[StackedArray]) -> None:
    """Checks that the entries of `source` match the wanted arrays.

    Raises:
      UserError: if they do not match. The message names keys and shapes.
    """
    by_key = {key: stacked for stacked in wanted for key in stacked.file_keys}
    reasons = [
        f"{word} {_join_keys(keys)}"
        for word, keys in (
            ("missing", [key for key in by_key if key not in entries]),
            ("unexpected", [key for key in entries if key not in by_key]),
        )
        if keys
    ]
    if reasons:
        raise UserError(f"{source}: the arrays are not the expected ones: {'; '.join(reasons)}")
    for key, stacked in by_key.items():
        if entries[key].shape != stacked.file_shape:
            raise UserError(f"{source}: {'/'.join(key)} has shape {entries[key].shape}, expected {stacked.file_shape}")


def _join_keys(keys: list[Key]) -> str:
    rest = len(keys) - _MAX_NAMES_IN_ERROR
    return ", ".join("/".join(key) for key in keys[:_MAX_NAMES_IN_ERROR]) + (f" and {rest} more" if rest > 0 else "")


def _read_arrays(entries: Mapping[Key, Entry], wanted: list[StackedArray]) -> list:
    """Reads the wanted arrays. The transfer of one array to its devices overlaps with the reads of the next arrays.

    The host holds at most `_READ_THREADS` + 2 arrays, and the entries that are being read.
    """
    arrays: list = []
    shared = SharedReads(entries, wanted)
    reading: collections.deque[Future[Callable[[], Any]]] = collections.deque()
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for stacked in wanted:
            reading.append(pool.submit(_read, entries, stacked, shared))
            if len(reading) > _READ_THREADS:
                jax.block_until_ready(arrays[-1:])  # its transfer: a device may be slower than the file
                arrays.append(reading.popleft().result()())
        arrays += [future.result()() for future in reading]
    shared.verify()
    return arrays


def _read(entries: Mapping[Key, Entry], stacked: StackedArray, shared: SharedReads) -> Callable[[], Any]:
    """Reads what this process needs of an array. Returns the function that places it on the devices."""
    if stacked.key in shared.splits:
        return shared.read(stacked)
    return functools.partial(_to_devices, stacked, _read_parts(entries, stacked))


def _read_parts(entries: Mapping[Key, Entry], stacked: StackedArray) -> dict[Bounds, np.ndarray]:
    """Reads the parts of an array that this process's devices hold."""
    dtype = np.dtype(stacked.array.dtype)
    parts = {
        bounds: host_memory([stop - start for start, stop in bounds], dtype)
        for bounds in _device_bounds(stacked).values()
    }
    for layer, key in enumerate(stacked.file_keys):
        entry = entries[key]
        slices = []  # (the slice of a part to fill, its bounds within this entry)
        for bounds, part in parts.items():
            if not stacked.is_stacked:
                slices.append((part, bounds))
            elif bounds[0][0] <= layer < bounds[0][1]:
                slices.append((part[layer - bounds[0][0], ...], bounds[1:]))
        if isinstance(entry.read_into, SliceReader):
            for out, bounds in slices:
                entry.read_into.read(out, tuple(slice(*bound) for bound in bounds))
        elif len(slices) == 1 and slices[0][0].shape == entry.shape and entry.dtype == dtype:
            entry.read_into(slices[0][0])
        elif slices:
            array = entry.read()
            for out, bounds in slices:
                out[...] = array[tuple(slice(*bound) for bound in bounds)]
    return parts


def _device_bounds(stacked: StackedArray) -> dict[jax.Device | None, Bounds]:
    """Maps each device to the bounds of its shard. Without a sharding, maps None to the bounds of the whole array."""
    shape, sharding = stacked.array.shape, getattr(stacked.array, "sharding", None)
    if sharding is None:
        return {None: tuple((0, size) for size in shape)}
    return {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }


def _to_devices(stacked: StackedArray, parts: dict[Bounds, np.ndarray]) -> np.ndarray | jax.Array:
    bounds_of = _device_bounds(stacked)
    if None in bounds_of:
        return parts[bounds_of[None]]
    arrays = [jax.device_put(parts[bounds], device) for device, bounds in bounds_of.items()]
    return jax.make_array_from_single_device_arrays(stacked.array.shape, stacked.array.sharding, arrays)
