"""Shuffles any number of lines in bounded memory.

Each line has a random 64-bit key. Sorting by key gives a uniform permutation that does not depend on the memory limit.
Lines that do not fit in memory are first scattered to files by ranges of keys.
"""

import array
import contextlib
import os
from collections.abc import Iterable, Iterator

import numpy as np

KEY_BITS = 64
_MAX_PARTS = 64  # files per level of scattering; each has a buffer of _BUFFER_BYTES
_BUFFER_BYTES = 128 << 10
_ENTRY_DTYPE = np.dtype([("key", "<u8"), ("size", "<u8")])

KeyedLine = tuple[int, bytes]


def sort_by_key(
    lines: Iterable[KeyedLine],
    total_bytes: int,
    memory_bytes: int,
    folder: str,
    first_key: int = 0,
    key_bits: int = KEY_BITS,
) -> Iterator[bytes]:
    """Yields lines by ascending key; lines with equal keys keep their order.

    Args:
      lines: (key, line); keys lie in [first_key, first_key + 2^key_bits).
      total_bytes: size of all lines, known or estimated.
      memory_bytes: maximum size of the lines in memory.
      folder: an empty folder for temporary files, together as large as the lines. Each is removed after use.
    """
    if total_bytes <= memory_bytes or key_bits == 0:
        yield from _sort(*_load(lines))
        return
    # Sizes of parts vary, so parts are on average half as large as the memory limit.
    part_bits = min(key_bits, _MAX_PARTS.bit_length() - 1, (2 * total_bytes // memory_bytes).bit_length())
    rest_bits = key_bits - part_bits
    names = [os.path.join(folder, f"{rest_bits}_{(first_key >> rest_bits) + part:x}") for part in range(1 << part_bits)]
    _scatter(lines, names, first_key, rest_bits)
    for part, name in enumerate(names):
        size, entries = os.path.getsize(name), np.fromfile(f"{name}.entries", _ENTRY_DTYPE)
        if size <= memory_bytes or len(entries) == 1:
            # Without a local variable, the bytes are freed before the next part is read.
            yield from _sort(entries, _read_and_remove(name))
        else:
            del entries
            part_key = first_key + (part << rest_bits)
            yield from sort_by_key(_read_part(name), size, memory_bytes, folder, part_key, rest_bits)
            _remove(name)


def _load(lines: Iterable[KeyedLine]) -> tuple[np.ndarray, bytearray]:
    """Returns the entries and the concatenated lines. Lists of ints would take more memory than short lines."""
    keys, sizes, data = array.array("Q"), array.array("Q"), bytearray()
    for key, line in lines:
        keys.append(key)
        sizes.append(len(line))
        data += line
    entries = np.empty(len(keys), _ENTRY_DTYPE)
    entries["key"], entries["size"] = keys, sizes
    return entries, data


def _sort(entries: np.ndarray, data: bytes | bytearray) -> Iterator[bytes]:
    ends = np.cumsum(entries["size"])
    for i in np.argsort(entries["key"], kind="stable"):
        yield bytes(data[int(ends[i]) - int(entries["size"][i]) : int(ends[i])])


def _scatter(lines: Iterable[KeyedLine], names: list[str], first_key: int, rest_bits: int) -> None:
    """Appends each line to the file of its part, and (key, size) to `.entries` beside it."""
    with contextlib.ExitStack() as stack:
        parts = [
            [stack.enter_context(open(path, "wb", _BUFFER_BYTES)) for path in (name, f"{name}.entries")]
            for name in names
        ]
        for key, line in lines:
            data, entries = parts[(key - first_key) >> rest_bits]
            data.write(line)
            entries.write(key.to_bytes(8, "little") + len(line).to_bytes(8, "little"))


def _read_part(name: str) -> Iterator[KeyedLine]:
    with open(name, "rb") as data, open(f"{name}.entries", "rb") as entries:
        while entry := entries.read(_ENTRY_DTYPE.itemsize):
            key, size = np.frombuffer(entry, _ENTRY_DTYPE)[0]
            yield int(key), data.read(int(size))


def _read_and_remove(name: str) -> bytes:
    with open(name, "rb") as file:
        data = file.read()
    _remove(name)
    return data


def _remove(name: str) -> None:
    os.unlink(name)
    os.unlink(f"{name}.entries")
