"""Files of arrays, entry by entry: streaming checkpoints and plain flax msgpack files.

A streaming file is a run of msgpack arrays `[key, value]`: key is the path, an array of strings; value is a bin that
holds `flax.serialization.to_bytes(array)`. There is no header and no index. A flax msgpack file is one nested map with
the same arrays as leaves. `msgpack_arrays` has the format of one array.
"""

from collections.abc import Iterable

import msgpack
import numpy as np

from EasyLM.checkpoints.msgpack_arrays import CHUNKED, Entry, HeaderReader, bin_header, value_parts
from EasyLM.errors import UserError


def read_streaming(path: str) -> list[Entry]:
    """The entries of a streaming file, by a pass over its headers only.

    Raises:
      UserError: naming file, key and byte offset, if the file is cut short or is something else.
    """
    entries = []
    with HeaderReader(path) as reader:
        while reader.offset < reader.size:
            reader.where = f"entry {len(entries)}"
            reader.expect("array", length=2)
            key = tuple(reader.text() for _ in range(reader.expect("array")))
            reader.where = "/".join(key)
            end = reader.expect("bin") + reader.offset
            entries.append(reader.value(key))
            if reader.offset != end:
                raise reader.error(f"the entry should end at byte {end}")
    return entries


def read_flax(path: str) -> list[Entry]:
    """The entries of a plain flax msgpack file (a nested map of arrays), by a pass over its headers only.

    Raises:
      UserError: naming file, key and byte offset, if the file is cut short or is something else.
    """

    def walk(key):
        kind, length = reader.token()
        if kind != "map":
            reader.step_back()
            return [reader.value(key)]
        found = []
        for i in range(length):
            name = reader.text()
            if i == 0 and name == CHUNKED:
                return [reader.chunked(key, length)]
            reader.where = "/".join((*key, name))
            found += walk((*key, name))
        return found

    with HeaderReader(path) as reader:
        reader.expect("map")
        reader.offset = 0
        entries = walk(())
        if reader.offset != reader.size:
            raise reader.error(f"the file should end here, and has {reader.size} bytes")
    return entries


def write_entry(file, key: tuple[str, ...], array: np.ndarray) -> None:
    """Appends one entry to a streaming file, byte for byte as the LVM release does."""
    parts = list(value_parts(array))
    num_bytes = sum(memoryview(part).nbytes for part in parts)
    if num_bytes >= 2**32:
        raise UserError(f"{'/'.join(key)}: {num_bytes} bytes are more than an entry of a streaming file can hold")
    file.write(b"\x92" + msgpack.packb(key) + bin_header(num_bytes))
    for part in parts:
        file.write(part)


def write_flax(file, entries: Iterable[Entry]) -> None:
    """Writes a plain flax msgpack file: one nested map, keys in order."""
    tree = {}
    for entry in entries:
        node = tree
        for name in entry.key[:-1]:
            node = node.setdefault(name, {})
        node[entry.key[-1]] = entry

    def write(node):
        if isinstance(node, Entry):
            for part in value_parts(node.read()):
                file.write(part)
            return
        file.write(msgpack.Packer().pack_map_header(len(node)))
        for name in sorted(node):
            file.write(msgpack.packb(name))
            write(node[name])

    write(tree)
