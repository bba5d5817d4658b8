"""The layout of layers: stacked along axis 0 in memory, one entry per layer in files.

A file has `transformer/h/3/attention/wq/kernel [in, out]`; in memory `transformer/h/attention/wq/kernel` is
`[layers, in, out]`. The rule applies to every path with an `h` that is not followed by a number: to parameters and to
all optimizer state of the same structure.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax

from EasyLM.checkpoints.entries import Entry

LAYERS = "h"  # the name in a path after which a file has the layer's number

Key = tuple[str, ...]  # the path of an array, name by name


@dataclasses.dataclass(frozen=True)
class StackedArray:
    """An array of a pytree and the file entries that hold it: one per layer if it is stacked, else one."""

    key: Key  # its path in memory
    array: Any  # a jax.Array, a np.ndarray, or a jax.ShapeDtypeStruct
    file_keys: tuple[Key, ...]

    @property
    def is_stacked(self) -> bool:
        """Whether the leading axis is the layer."""
        return self.file_keys[0] != self.key

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of each file entry."""
        return tuple(self.array.shape[1:] if self.is_stacked else self.array.shape)


def path_key(path: tuple) -> Key:
    """Returns the path of a pytree leaf as flax names it in files: dict keys, field names and positions."""
    return tuple(jax.tree_util.keystr((part,), simple=True) for part in path)


def stacked_arrays(tree: Any) -> list[StackedArray]:
    """Returns the arrays of any pytree, in its order."""
    arrays = []
    for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
        key = path_key(path)
        at = _layer_position(key)
        if at is None or key[at].isdigit():
            arrays.append(StackedArray(key, array, (key,)))
        else:
            layers = tuple((*key[:at], str(i), *key[at:]) for i in range(array.shape[0]))
            arrays.append(StackedArray(key, array, layers))
    return arrays


def file_order(tree: Any) -> list[tuple[Key, StackedArray, int | None]]:
    """Returns (file key, array, layer or None) of each entry of a tree's file, in file order: layer after layer."""
    entries: list[tuple[Key, StackedArray, int | None]] = []

    def stack_of(stacked: StackedArray) -> Key:
        return stacked.key[: _layer_position(stacked.key)] if stacked.is_stacked else stacked.key

    for _, arrays in itertools.groupby(stacked_arrays(tree), stack_of):
        group = list(arrays)
        if group[0].is_stacked:
            for layer in range(len(group[0].file_keys)):
                entries += [(stacked.file_keys[layer], stacked, layer) for stacked in group]
        else:
            entries += [(stacked.key, stacked, None) for stacked in group]
    return entries


def shapes_in_memory(entries: Iterable[Entry]) -> dict:
    """Returns the nested dict of stacked `jax.ShapeDtypeStruct`s that the entries of a file load into."""
    tree: dict = {}
    counts: dict[Key, int] = {}
    for entry in entries:
        key, at = entry.key, _layer_position(entry.key)
        shape = entry.shape
        if at is not None and key[at].isdigit():
            key = (*key[:at], *key[at + 1 :])
            counts[key] = counts.get(key, 0) + 1
            shape = (counts[key], *shape)
        node = tree
        for name in key[:-1]:
            node = node.setdefault(name, {})
        node[key[-1]] = jax.ShapeDtypeStruct(shape, entry.dtype)
    return tree


def _layer_position(key: Key) -> int | None:
    """Returns the index in a path of the layer's number, present or absent; None outside the layers."""
    return key.index(LAYERS) + 1 if LAYERS in key[:-1] else None
