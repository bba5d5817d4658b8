"""Names of arrays, and the layers among them: in memory stacked along axis 0 below `h`, in files one entry per layer.

A file has `transformer/h/3/attention/wq/kernel [in, out]`; in memory `transformer/h/attention/wq/kernel` is
`[layers, in, out]`. The rule holds wherever a path has an `h` that is not followed by a number: in parameters, and in
all that an optimizer keeps for each of them.
"""

import dataclasses
import itertools
from typing import Any

import jax

LAYERS = "h"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a tree, and the file entries that it is made of."""

    key: tuple[str, ...]  # its path in memory
    array: Any  # an array, or its shape
    file_keys: tuple[tuple[str, ...], ...]  # one for each layer if stacked, else one

    @property
    def stacked(self) -> bool:
        return self.file_keys[0] != self.key

    @property
    def file_shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape[1:] if self.stacked else self.array.shape)


def leaves(tree) -> list[Leaf]:
    """The arrays of any pytree by their path, as flax names it: dict keys, field names, positions."""

    def name(part):
        return str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", None))))

    found = []
    for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
        key = tuple(name(part) for part in path)
        at = _layers_at(key)
        if at is None or key[at].isdigit():
            found.append(Leaf(key, array, (key,)))
        else:
            layers = tuple((*key[:at], str(i), *key[at:]) for i in range(array.shape[0]))
            found.append(Leaf(key, array, layers))
    return found


def file_order(tree) -> list[tuple[tuple[str, ...], Leaf, int | None]]:
    """(file key, leaf, layer) of every entry that a tree is written as, layer after layer."""
    entries = []

    def stack_of(leaf):
        return leaf.key[: _layers_at(leaf.key)] if leaf.stacked else leaf.key

    for _, group in itertools.groupby(leaves(tree), stack_of):
        group = list(group)
        if group[0].stacked:
            for layer in range(len(group[0].file_keys)):
                entries += [(leaf.file_keys[layer], leaf, layer) for leaf in group]
        else:
            entries += [(leaf.key, leaf, None) for leaf in group]
    return entries


def shapes_in_memory(entries) -> dict:
    """The nested dict of stacked shapes that the entries of a file make."""
    tree, counts = {}, {}
    for entry in entries:
        key, at = entry.key, _layers_at(entry.key)
        layered = at is not None and key[at].isdigit()
        if layered:
            key = (*key[:at], *key[at + 1 :])
            counts[key] = counts.get(key, 0) + 1
        node = tree
        for name in key[:-1]:
            node = node.setdefault(name, {})
        shape = (counts[key], *entry.shape) if layered else entry.shape
        node[key[-1]] = jax.ShapeDtypeStruct(shape, entry.dtype)
    return tree


def _layers_at(key: tuple[str, ...]) -> int | None:
    """Where a path has, or would have, its layer's number."""
    return key.index(LAYERS) + 1 if LAYERS in key[:-1] else None
