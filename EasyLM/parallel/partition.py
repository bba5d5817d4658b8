"""Partition rules: from the path of an array to its partition spec and sharding."""

import functools
import logging
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.parallel.mesh import axis_size

Rules = Sequence[tuple[str, P]]  # (regular expression searched in the path, spec of the array's last axes)


def match_partition_rules(rules: Rules, tree: Any) -> Any:
    """Returns the partition spec of every array (or shape) of a tree: that of the first rule that matches its path.

    An array with more axes than its spec holds stacked layers; the layer axis is not split. Scalars, arrays of one
    axis and arrays whose last axis has size 1 (Adafactor's placeholders) are replicated.

    Raises:
      AssertionError: if an array matches no rule.
    """

    def spec_of(path, array):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if len(array.shape) <= 1 or array.shape[-1] == 1:
            return P()
        for pattern, spec in rules:
            if re.search(pattern, name):
                layer_axes = len(array.shape) - len(spec)
                assert layer_axes >= 0, f"{name} {array.shape}: the rule's spec {spec} has too many axes"
                return P(*(None,) * layer_axes, *spec) if len(spec) else P()
        raise AssertionError(f"no partition rule matches {name}")

    return jax.tree_util.tree_map_with_path(spec_of, tree)


def shardings(mesh: Mesh, rules: Rules, tree: Any) -> Any:
    """Returns the sharding of every array of a tree. An axis that the mesh does not divide stays whole; logged once."""

    def sharding_of(array, spec):
        axes = []
        for size, axis in zip(array.shape, tuple(spec) + (None,) * (len(array.shape) - len(spec)), strict=True):
            ways = axis_size(mesh, axis)
            if size % ways:
                _log_unsplit(array.shape, size, axis if isinstance(axis, str) else " x ".join(axis), ways)
            axes.append(axis if size % ways == 0 else None)
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(sharding_of, tree, match_partition_rules(rules, tree))


@functools.cache  # a program asks for the shardings of the same arrays several times
def _log_unsplit(shape: tuple[int, ...], size: int, axes: str, ways: int) -> None:
    logging.info("array of shape %s: %d is not divisible by %s=%d; this axis is not split", shape, size, axes, ways)


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Constrains the sharding of `x` in a compiled function: splits its leading axes over mesh axes.

    An axis that the mesh does not divide is not split. Without a mesh, returns `x`.
    """
    if mesh is None:
        return x
    spec = [axis if size % axis_size(mesh, axis) == 0 else None for size, axis in zip(x.shape, axes, strict=False)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))
