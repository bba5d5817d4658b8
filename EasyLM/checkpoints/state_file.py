"""The state file of a save, whose rows are in the memory of one or several processes."""

import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np

from EasyLM.checkpoints import checksums, stacking, streaming
from EasyLM.checkpoints.entries import bytes_of
from EasyLM.checkpoints.host_copy import HostCopy
from EasyLM.checkpoints.stacking import Key, StackedArray
from EasyLM.checkpoints.streaming import EntryLayout

# Bytes that a process has written: (number of the entry, first byte within the array, number of bytes, CRC-32). A list,
# because processes send it as JSON.
WrittenPart = list[int]


class StateFile:
    """The layout of a state file, and the rows of it that this process has in memory.

    Args:
      name: of the file.
      shapes: a tree of `jax.ShapeDtypeStruct`, equal on all processes.
      dtype_of: (key, array) -> the type in which an array is saved.

    Raises:
      UserError: if an array is too large for the format.
    """

    def __init__(self, name: str, shapes: Any, dtype_of: Callable[[Key, Any], np.dtype], copy: HostCopy):
        self.name, self._copy, self.num_bytes = name, copy, 0
        self._entries: list[tuple[EntryLayout, StackedArray, int | None]] = []
        for key, stacked, layer in stacking.file_order(shapes):
            layout = streaming.entry_layout(key, stacked.file_shape, dtype_of(key, stacked.array), self.num_bytes)
            self._entries.append((layout, stacked, layer))
            self.num_bytes = layout.end

    def write_local_rows(self, file: BinaryIO) -> list[WrittenPart]:
        """Writes the rows of this process at their places in the file."""
        parts = []
        for number, (layout, stacked, layer) in enumerate(self._entries):
            for block in self._copy.blocks(stacked.key):
                rows = block.values if layer is None else block.values[layer, ...]
                rows = rows.astype(layout.dtype, copy=False)
                streaming.write_rows(file, layout, block.first_row, rows)
                parts.append([number, block.first_row * layout.row_bytes, rows.nbytes, zlib.crc32(bytes_of(rows))])
        return parts

    def checksums(self, parts: Iterable[WrittenPart]) -> dict:
        """Returns the content of `checksums.json`.

        Args:
          parts: what all processes have written.
        """
        by_entry: list[list[WrittenPart]] = [[] for _ in self._entries]
        for part in sorted(parts):
            by_entry[part[0]].append(part)
        arrays = {}
        for (layout, _, _), written in zip(self._entries, by_entry, strict=True):
            ends = [0, *(first + num_bytes for _, first, num_bytes, _ in written)]
            assert [first for _, first, _, _ in written] == ends[:-1], f"{layout.key}: rows are missing"
            assert ends[-1] == math.prod(layout.shape) * layout.dtype.itemsize, (
                f"{layout.key}: the last rows are missing"
            )
            arrays[layout.key] = checksums.joined_checksum(
                layout.key, layout.shape, layout.dtype, [(crc, num_bytes) for _, _, num_bytes, crc in written]
            )
        return checksums.make_table(self.name, self.num_bytes, arrays)
