"""Loads arrays that are spread over processes: each reads its share of the rows, and the devices exchange them."""

import functools
import itertools
import logging
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from EasyLM.checkpoints.entries import Entry, PartReader, bytes_of, host_memory
from EasyLM.checkpoints.row_split import RowSplit, row_split
from EasyLM.checkpoints.stacking import Key, StackedArray
from EasyLM.parallel import Channel

_loads = itertools.count()  # all processes load the same checkpoints in the same order


class SharedReads:
    """The arrays of one load that the processes read together.

    Attributes:
      splits: their rows. They are spread over processes, and can be read in parts. Equal on all processes.
    """

    def __init__(self, entries: Mapping[Key, Entry], wanted: Sequence[StackedArray]):
        self._entries = entries
        self._parts: list[list[Any]] = []  # (key, first byte, number of bytes, CRC-32) of what this process has read
        self.splits: dict[Key, RowSplit] = {}
        for stacked in wanted:
            split = row_split(stacked)
            if split and all(isinstance(entries[key].read_into, PartReader) for key in stacked.file_keys):
                self.splits[stacked.key] = split

    def read(self, stacked: StackedArray) -> Callable[[], jax.Array]:
        """Reads this process's rows of an array.

        Returns:
          A function that places the array on its sharding. Every process must call it.
        """
        split, blocks = self.splits[stacked.key], []
        for device, (start, stop) in split.local_rows().items():
            block = host_memory(split.shape_of(split.block_rows), stacked.array.dtype)
            for layer, key in enumerate(stacked.file_keys):
                if start < stop:
                    rows = block[layer] if stacked.is_stacked else block
                    self._read_rows(self._entries[key], start, rows[: stop - start])
            blocks.append((device, block))
        return functools.partial(_place, split, blocks)

    def _read_rows(self, entry: Entry, first_row: int, out: np.ndarray) -> None:
        """Reads consecutive rows of an entry, and converts them to the type of `out`."""
        rows = out if entry.dtype == out.dtype else host_memory(out.shape, entry.dtype)
        assert isinstance(entry.read_into, PartReader)
        start = first_row * (rows.nbytes // len(rows))
        entry.read_into.read(rows, start)
        if entry.read_into.check is not None:
            self._parts.append([list(entry.key), start, rows.nbytes, zlib.crc32(bytes_of(rows))])
        if rows is not out:
            out[...] = rows

    def verify(self) -> None:
        """Verifies the checksums of the arrays that the processes have read together. Every process must call it.

        An array is not verified if a process has no checksums for it, for example because its host has a copy of the
        checkpoint without `checksums.json`. A warning says so.

        Raises:
          DamagedArrayError: on process 0, which knows the checksums of all parts. The others raise a PeerError.
        """
        if not self.splits:
            return
        channel = Channel(f"load/{next(_loads)}")
        with channel.failing_together():
            if jax.process_index() != 0:
                channel.send(self._parts)
                channel.receive(0)
                return
            others = [channel.receive(process) for process in range(1, jax.process_count())]
            channel.delete()  # no other process reads these messages
            self._verify(itertools.chain(self._parts, *others))
            channel.send("verified")

    def _verify(self, read: Iterable[list[Any]]) -> None:
        """Verifies arrays, from what all processes have read of them (see `_parts`)."""
        by_key: dict[Key, list[tuple[int, int, int]]] = {}
        for key, start, num_bytes, crc in read:
            by_key.setdefault(tuple(key), []).append((start, crc, num_bytes))
        unverified = []
        for key, parts in by_key.items():
            entry = self._entries[key]
            assert isinstance(entry.read_into, PartReader)
            num_bytes = math.prod(entry.shape) * entry.dtype.itemsize
            if entry.read_into.check is None or sum(part[2] for part in parts) < num_bytes:
                unverified.append(key)
            else:
                entry.read_into.check([(crc, num_bytes) for _, crc, num_bytes in sorted(parts)])
        if unverified:
            logging.warning(
                "%d arrays were not verified, such as %s: not all hosts see checksums.json beside the checkpoint",
                len(unverified),
                "/".join(unverified[0]),
            )


def _place(split: RowSplit, blocks: Sequence[tuple[jax.Device, np.ndarray]]) -> jax.Array:
    arrays = [jax.device_put(block, device) for device, block in blocks]
    return split.join(jax.make_array_from_single_device_arrays(split.split_shape, split.sharding, arrays))
