"""An array whose rows are split over the devices of its mesh. Each process saves and loads the rows of its own devices.

The rows of an array are those of its entries in a file: its axis 0, or axis 1 of a stacked array. A process therefore
has a part of each layer, and its rows are consecutive bytes of an entry.

The collectives are explicit. For many pairs of shardings XLA would gather the whole array on each device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.checkpoints.stacking import StackedArray

Rows = tuple[int, int]  # (first row, row after the last)


@dataclasses.dataclass(frozen=True)
class RowSplit:
    """The rows of an array, split over all devices of its mesh.

    Devices that hold the same rows at home, or replicas of them, divide these rows among themselves. The last of them
    have fewer rows, or none, and padding.

    Attributes:
      shape: of the array in memory.
      axis: its axis of rows.
      home: the sharding of the array outside of saves and loads.
    """

    shape: tuple[int, ...]
    axis: int
    home: NamedSharding

    def axes(self, axis: int) -> tuple[str, ...]:
        """The mesh axes that split an axis of the array at home."""
        spec = self.home.spec[axis] if axis < len(self.home.spec) else None
        return (spec,) if isinstance(spec, str) else tuple(spec or ())

    @property
    def crossing(self) -> dict[int, tuple[str, ...]]:
        """The other axes of the array that are split at home, and their mesh axes."""
        return {i: self.axes(i) for i in range(len(self.shape)) if i != self.axis and self.axes(i)}

    @property
    def replicating(self) -> tuple[str, ...]:
        """The mesh axes along which the array is replicated at home."""
        used = {name for i in range(len(self.shape)) for name in self.axes(i)}
        return tuple(name for name in self.home.mesh.axis_names if name not in used)

    @property
    def home_rows(self) -> int:
        """The rows of a device at home."""
        return self.shape[self.axis] // math.prod(self.home.mesh.shape[name] for name in self.axes(self.axis))

    @property
    def ways(self) -> int:
        """The number of devices among which the same rows are divided."""
        names = (*self.replicating, *(name for names in self.crossing.values() for name in names))
        return math.prod(self.home.mesh.shape[name] for name in names)

    @property
    def block_rows(self) -> int:
        """The rows of a device after the split, with padding."""
        return -(-self.home_rows // self.ways)

    @property
    def sharding(self) -> NamedSharding:
        """The sharding of the array of all blocks."""
        names = [*self.axes(self.axis), *(name for names in self.crossing.values() for name in names)]
        return NamedSharding(self.home.mesh, P(*(None,) * self.axis, (*names, *self.replicating)))

    def shape_of(self, rows: int) -> tuple[int, ...]:
        """The shape of an array with this number of rows."""
        return (*self.shape[: self.axis], rows, *self.shape[self.axis + 1 :])

    @property
    def split_shape(self) -> tuple[int, ...]:
        """The shape of the array of all blocks."""
        return self.shape_of(self.home.mesh.size * self.block_rows)

    def local_rows(self) -> dict[jax.Device, Rows]:
        """Returns the rows of each device of this process, without padding."""
        rows = {}
        for device, index in self.sharding.addressable_devices_indices_map(self.split_shape).items():
            assert index is not None
            block = (index[self.axis].start or 0) // self.block_rows
            group, member = divmod(block, self.ways)
            first = group * self.home_rows
            start, stop = (first + min((member + i) * self.block_rows, self.home_rows) for i in range(2))
            rows[device] = start, stop
        return rows

    def split(self, array: jax.Array) -> jax.Array:
        """Returns the array of all blocks. Every process must call it."""
        return split_program(self)(array).block_until_ready()

    def join(self, blocks: jax.Array) -> jax.Array:
        """Returns the array on its own sharding. Every process must call it."""
        return join_program(self)(blocks).block_until_ready()


def row_split(stacked: StackedArray) -> RowSplit | None:
    """Returns the split of an array, or of a `jax.ShapeDtypeStruct`.

    Returns None if all of the array is on the devices of one process, or if it has no rows.
    """
    sharding = getattr(stacked.array, "sharding", None)
    shape = tuple(stacked.array.shape)
    if sharding is None or sharding.is_fully_addressable or not stacked.file_shape or not math.prod(shape):
        return None
    return RowSplit(shape, 1 if stacked.is_stacked else 0, sharding)


# `split` and `join` block until the program has finished: two concurrent programs of several processes deadlock on CPUs
# (gloo).
@functools.cache
def split_program(rows: RowSplit) -> Any:
    """Returns the compiled function of `RowSplit.split`, without the wait."""
    axis = rows.axis
    padding = rows.ways * rows.block_rows - rows.home_rows

    def split(part: jax.Array) -> jax.Array:
        part = jnp.pad(part, [(0, padding if i == axis else 0) for i in range(part.ndim)])
        for crossed, names in rows.crossing.items():
            part = jax.lax.all_to_all(part, names, split_axis=axis, concat_axis=crossed, tiled=True)
        if rows.replicating:
            start = jax.lax.axis_index(rows.replicating) * rows.block_rows
            part = jax.lax.dynamic_slice_in_dim(part, start, rows.block_rows, axis)
        return part

    return _compiled(split, rows.home, rows.sharding)


@functools.cache
def join_program(rows: RowSplit) -> Any:
    """Returns the compiled function of `RowSplit.join`, without the wait."""
    axis = rows.axis

    def join(part: jax.Array) -> jax.Array:
        if rows.replicating:
            part = jax.lax.all_gather(part, rows.replicating, axis=axis, tiled=True)
        for crossed, names in reversed(rows.crossing.items()):
            part = jax.lax.all_to_all(part, names, split_axis=crossed, concat_axis=axis, tiled=True)
        return jax.lax.slice_in_dim(part, 0, rows.home_rows, axis=axis)

    return _compiled(join, rows.sharding, rows.home)


def _compiled(function: Callable[[jax.Array], jax.Array], source: NamedSharding, target: NamedSharding) -> Any:
    """Returns a function that each device calls with its part of an array."""
    # check_vma: JAX cannot know that `all_gather` returns replicas.
    mapped = jax.shard_map(function, mesh=source.mesh, in_specs=source.spec, out_specs=target.spec, check_vma=False)
    return jax.jit(mapped, out_shardings=target)
