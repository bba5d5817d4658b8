"""Reads and writes streaming checkpoints and plain flax msgpack files, one entry at a time.

A streaming file is a sequence of msgpack arrays `[key, value]`. The key is the path, as an array of strings. The value
is a bin with `flax.serialization.to_bytes(array)`. The file has no header and no index. A flax msgpack file is one
nested map with arrays as leaves. Module `msgpack_arrays` defines the format of one array.
"""

import dataclasses
import math
import os
from collections.abc import Iterable
from typing import BinaryIO

import msgpack
import numpy as np

from EasyLM.checkpoints.entries import Entry, bytes_of
from EasyLM.checkpoints.msgpack_arrays import CHUNKED, HeaderReader, bin_header, value_parts, value_segments
from EasyLM.checkpoints.stacking import nested
from EasyLM.errors import UserError

_MOST_DEPTH = 100  # of the nested map of a flax file


def read_streaming(path: str | os.PathLike) -> list[Entry]:
    """Returns the entries of a streaming file. Reads only the headers.

    Raises:
      UserError: naming file, key and byte offset, if the file is truncated or has another format.
    """
    entries: list[Entry] = []
    keys: set[tuple[str, ...]] = set()
    with HeaderReader(path) as reader:
        while reader.offset < reader.size:
            reader.location = f"entry {len(entries)}"
            reader.expect("array", length=2)
            key = tuple(reader.text() for _ in range(reader.expect("array")))
            reader.location = "/".join(key)
            if key in keys:
                reader.fail("the array occurs twice in the file")
            keys.add(key)
            end = reader.expect("bin") + reader.offset
            entries.append(reader.value(key))
            if reader.offset != end:
                reader.fail(f"the entry should end at byte {end}")
    return entries


def read_flax(path: str | os.PathLike) -> list[Entry]:
    """Returns the entries of a plain flax msgpack file (a nested map of arrays). Reads only the headers.

    Raises:
      UserError: naming file, key and byte offset, if the file is truncated or has another format.
    """

    def walk(key: tuple[str, ...]) -> list[Entry]:
        if len(key) > _MOST_DEPTH:
            reader.fail(f"more than {_MOST_DEPTH} levels deep")
        kind, length = reader.token()
        if kind != "map":
            reader.step_back()
            return [reader.value(key)]
        entries, names = [], set()
        for i in range(length):
            name = reader.text()
            if i == 0 and name == CHUNKED:
                return [reader.chunked(key, length)]
            reader.location = "/".join((*key, name))
            if name in names:
                reader.fail("the name occurs twice in the file")
            names.add(name)
            entries += walk((*key, name))
        return entries

    with HeaderReader(path) as reader:
        reader.expect("map")
        reader.offset = 0
        entries = walk(())
        if reader.offset != reader.size:
            reader.fail(f"the file should end here, but has {reader.size} bytes")
    return entries


@dataclasses.dataclass(frozen=True)
class EntryLayout:
    """One entry of a streaming file that has not been written yet.

    Attributes:
      offset: the first byte of the entry in the file.
      segments: its headers, and between them how many bytes of the array follow.
    """

    key: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    segments: tuple[bytes | int, ...]

    @property
    def row_bytes(self) -> int:
        """The bytes of one row. An array without axes has one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The byte after the entry."""
        return self.offset + sum(_length(segment) for segment in self.segments)


def entry_layout(key: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype, offset: int) -> EntryLayout:
    """Returns the layout of an entry at a byte of the file. The bytes are identical to those of the LVM release.

    Raises:
      UserError: if the array has 4 GiB or more, which exceeds the limit of an entry.
    """
    segments = value_segments(shape, dtype)
    num_bytes = sum(_length(segment) for segment in segments)
    if num_bytes >= 2**32:
        raise UserError(f"{'/'.join(key)}: {num_bytes} bytes exceed the limit of a streaming file's entry, 4 GiB")
    return EntryLayout(key, shape, dtype, offset, (b"\x92" + msgpack.packb(key) + bin_header(num_bytes), *segments))


def _length(segment: bytes | int) -> int:
    return len(segment) if isinstance(segment, bytes) else segment


def write_rows(file: BinaryIO, layout: EntryLayout, first_row: int, rows: np.ndarray) -> None:
    """Writes consecutive rows of an array at their place in a streaming file. The first rows come with the headers.

    Whole arrays in the order of the file are written without a seek.

    Args:
      rows: C-contiguous, of the type of the entry.
    """
    data = bytes_of(rows)
    offset, position = layout.offset, -first_row * layout.row_bytes  # position: of the next array byte, in `data`
    for segment in layout.segments:
        if isinstance(segment, int):
            start, stop = max(0, position), min(len(data), position + segment)
            if start < stop:
                _write_at(file, offset + start - position, data[start:stop])
            position += segment
        elif first_row == 0:
            _write_at(file, offset, segment)
        offset += _length(segment)


def _write_at(file: BinaryIO, offset: int, data: bytes | memoryview) -> None:
    if file.tell() != offset:  # files on object stores cannot seek
        file.seek(offset)
    file.write(data)


def write_entry(file: BinaryIO, key: tuple[str, ...], array: np.ndarray) -> None:
    """Appends one entry to a streaming file.

    Raises:
      UserError: see `entry_layout`.
    """
    layout = entry_layout(key, array.shape, array.dtype, file.tell())
    write_rows(file, layout, 0, np.ascontiguousarray(array))


def write_flax(file: BinaryIO, entries: Iterable[Entry]) -> None:
    """Writes a plain flax msgpack file: one nested map with sorted keys."""

    def write(node):
        if isinstance(node, Entry):
            for part in value_parts(node.read()):
                file.write(part)
            return
        file.write(msgpack.Packer().pack_map_header(len(node)))
        for name in sorted(node):
            file.write(msgpack.packb(name))
            write(node[name])

    write(nested((entry.key, entry) for entry in entries))
