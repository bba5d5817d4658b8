"""The layout of layers. Arrays are stacked along axis 0 in memory; files have one entry per layer.

For example, a file has `transformer/h/3/attention/wq/kernel` of shape [in, out]. The array in memory is
`transformer/h/attention/wq/kernel` of shape [layers, in, out]. An array is stacked if its path has an `h` without a
number after it. This rule applies to parameters and to optimizer state of the same structure.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax

from EasyLM.checkpoints.entries import Entry

LAYERS = "h"  # in the paths of a file, the layer's number follows this name

Key = tuple[str, ...]  # the path of an array, as a tuple of names


@dataclasses.dataclass(frozen=True)
class StackedArray:
    """An array of a pytree and its file entries. A stacked array has one entry per layer; any other array has one."""

    key: Key  # the path in memory
    array: Any  # a jax.Array, a np.ndarray, or a jax.ShapeDtypeStruct
    file_keys: tuple[Key, ...]

    @property
    def is_stacked(self) -> bool:
        """Whether the leading axis indexes layers."""
        return self.file_keys[0] != self.key

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of each file entry."""
        return tuple(self.array.shape[1:] if self.is_stacked else self.array.shape)


def path_key(path: tuple) -> Key:
    """Returns the path of a pytree leaf as flax writes it to files: dict keys, field names and positions."""
    return tuple(jax.tree_util.keystr((part,), simple=True) for part in path)


def stacked_arrays(tree: Any) -> list[StackedArray]:
    """Returns the arrays of a pytree in the order of its leaves."""
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
    """Returns (file key, array, layer or None) of each entry in file order, which is layer by layer."""
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


def shapes_in_memory(entries: Iterable[Entry], kind: type[dict] = dict) -> dict:
    """Returns nested dicts of `jax.ShapeDtypeStruct`: the stacked arrays into which the entries of a file load."""
    shapes: dict[Key, jax.ShapeDtypeStruct] = {}
    for entry in entries:
        key, at = entry.key, _layer_position(entry.key)
        shape = entry.shape
        if at is not None and key[at].isdigit():
            key = (*key[:at], *key[at + 1 :])
            shape = (shapes[key].shape[0] + 1 if key in shapes else 1, *shape)
        shapes[key] = jax.ShapeDtypeStruct(shape, entry.dtype)
    return nested(shapes.items(), kind)


def nested(leaves: Iterable[tuple[Key, Any]], kind: type[dict] = dict) -> dict:
    """Returns the given leaves as nested dicts of the given class."""
    tree = kind()
    for key, leaf in leaves:
        node = tree
        for name in key[:-1]:
            node = node.setdefault(name, kind())
        node[key[-1]] = leaf
    return tree


def _layer_position(key: Key) -> int | None:
    """Returns the index at which a path has, or would have, the layer's number. None for a path outside the layers."""
    return key.index(LAYERS) + 1 if LAYERS in key[:-1] else None
