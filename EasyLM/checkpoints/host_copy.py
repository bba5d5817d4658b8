"""A copy of a state in host memory, from which a background thread writes a checkpoint."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.checkpoints.entries import host_memory
from EasyLM.checkpoints.row_split import RowSplit, row_split
from EasyLM.checkpoints.stacking import Key, StackedArray


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive rows of an array in host memory.

    Attributes:
      values: [rows, ...], or of a stacked array [layers, rows, ...]; of an array without rows, the array.
    """

    first_row: int
    values: np.ndarray


class HostCopy:
    """Copies states of the same shapes into host memory, which it allocates once.

    Args:
      split: each process copies its share of the rows of the arrays that are spread over processes. If False, process 0
        copies all rows. Process 0 copies all other arrays.
    """

    def __init__(self, split: bool):
        self._split = split
        self._blocks: dict[Key, list[Block]] = {}

    def allocate(self, arrays: Sequence[StackedArray]) -> None:
        """Allocates and touches the memory. Page faults are slow."""
        for stacked in arrays:
            for block in self._allocated(stacked):
                block.values.fill(0)

    def blocks(self, key: Key) -> list[Block]:
        """Returns the blocks of an array that this process has copied."""
        return self._blocks[key]

    def update(self, arrays: Sequence[StackedArray]) -> None:
        """Copies the arrays. No memory is shared, so they may be donated afterwards. Every process must call it."""
        for stacked in arrays:
            if not _is_spread(stacked) and isinstance(stacked.array, jax.Array):
                stacked.array.copy_to_host_async()
        for stacked in arrays:
            blocks, split = self._allocated(stacked), self._row_split(stacked)
            if split:
                _copy_rows(stacked, split, blocks)
            elif _is_spread(stacked):
                _gather(stacked, blocks)
            elif blocks:
                for index, part in _local_parts(stacked.array):
                    np.copyto(blocks[0].values[index], part)

    def _row_split(self, stacked: StackedArray) -> RowSplit | None:
        return row_split(stacked) if self._split else None

    def _allocated(self, stacked: StackedArray) -> list[Block]:
        """Returns the memory for this process's rows of an array."""
        split = self._row_split(stacked)
        if split:
            wanted = [
                (rows[0], split.shape_of(rows[1] - rows[0]))
                for rows in split.local_rows().values()
                if rows[0] < rows[1]
            ]
        else:
            wanted = [(0, tuple(stacked.array.shape))] if jax.process_index() == 0 else []
        dtype, blocks = stacked.array.dtype, self._blocks.get(stacked.key, [])
        if [(block.first_row, block.values.shape) for block in blocks if block.values.dtype == dtype] != wanted:
            blocks = [Block(first_row, host_memory(shape, dtype)) for first_row, shape in wanted]
        self._blocks[stacked.key] = blocks
        return blocks


def _is_spread(stacked: StackedArray) -> bool:
    """Whether an array is spread over several processes."""
    return not getattr(stacked.array, "is_fully_addressable", True)


def _local_parts(array: np.ndarray | jax.Array) -> Iterator[tuple[tuple, np.ndarray]]:
    """Yields (index, values) of each part of an array on this host, without replicas."""
    if not isinstance(array, jax.Array):
        yield (...,), array
        return
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            yield (*shard.index, ...), np.asarray(shard.data)


def _copy_rows(stacked: StackedArray, split: RowSplit, blocks: Sequence[Block]) -> None:
    """Splits the rows of an array over the devices, and copies those of this process."""
    values, rows = {block.first_row: block.values for block in blocks}, split.local_rows()
    with_rows = {device for device, (start, stop) in rows.items() if start < stop}
    shards = [shard for shard in split.split(stacked.array).addressable_shards if shard.device in with_rows]
    for shard in shards:
        shard.data.copy_to_host_async()
    for shard in shards:
        start, stop = rows[shard.device]
        without_padding = (slice(None),) * split.axis + (slice(stop - start),)
        np.copyto(values[start], np.asarray(shard.data)[without_padding])


def _gather(stacked: StackedArray, blocks: Sequence[Block]) -> None:
    """Gathers an array on process 0, one layer at a time, because each device holds a replica."""
    replicated = NamedSharding(stacked.array.sharding.mesh, P())
    for layer in range(len(stacked.file_keys)):
        index = (layer,) if stacked.is_stacked else ()
        # Every process blocks here, because two concurrent multi-process programs deadlock on CPUs (gloo).
        gathered = _gather_program(replicated)(stacked.array, *index).block_until_ready()
        for block in blocks:
            np.copyto(block.values[(*index, ...)], np.asarray(gathered.addressable_data(0)))


@functools.cache
def _gather_program(replicated: NamedSharding) -> Callable[..., jax.Array]:
    def take(array: jax.Array, *index: int) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(array, index[0], keepdims=False) if index else array

    return jax.jit(take, out_shardings=replicated)
