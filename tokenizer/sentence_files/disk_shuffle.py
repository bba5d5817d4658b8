"""Lines in a random order, in bounded memory, whatever their number.

Each line comes with a random key of 64 bits, and lines are sorted by key: a uniform permutation that depends on the
keys alone, not on the memory that is allowed. What does not fit is first scattered to files, by key.
"""

import array
import contextlib
import os
from collections.abc import Iterable, Iterator

import numpy as np

KEY_BITS = 64
PARTS = 64  # files that one level scatters to; each keeps WRITE_BYTES in memory
WRITE_BYTES = 128 << 10
ENTRY = np.dtype([("key", "<u8"), ("size", "<u8")])


def by_key(
    lines: Iterable[tuple[int, bytes]], total_bytes: int, memory: int, folder: str, low: int = 0, bits: int = KEY_BITS
) -> Iterator[bytes]:
    """Yields the lines of (key, line) by ascending key; of equal keys, the earlier one first.

    Args:
      lines: their keys lie in [low, low + 2^bits).
      total_bytes: of all lines, as near as it is known.
      memory: bytes of lines that may be held at a time.
      folder: empty, for files that are removed as they are used up; all in all they are as large as the lines.
    """
    if total_bytes <= memory or bits == 0:
        yield from _sorted(*_joined(lines))
        return
    # Halves of what is allowed: some parts are larger than others.
    part_bits = min(bits, PARTS.bit_length() - 1, (2 * total_bytes // memory).bit_length())
    rest = bits - part_bits
    names = [os.path.join(folder, f"{rest}_{(low >> rest) + part:x}") for part in range(1 << part_bits)]
    _scatter(lines, names, low, rest)
    for part, name in enumerate(names):
        size, entries = os.path.getsize(name), np.fromfile(f"{name}.entries", ENTRY)
        if size <= memory or len(entries) == 1:
            yield from _sorted(entries, _taken(name))  # no name here keeps the bytes alive while the next part is read
        else:
            del entries
            yield from by_key(_gathered(name), size, memory, folder, low + (part << rest), rest)
            _remove(name)


def _joined(lines: Iterable[tuple[int, bytes]]) -> tuple[np.ndarray, bytearray]:
    keys, sizes, data = array.array("Q"), array.array("Q"), bytearray()  # a list of numbers would outweigh short lines
    for key, line in lines:
        keys.append(key)
        sizes.append(len(line))
        data += line
    entries = np.empty(len(keys), ENTRY)
    entries["key"], entries["size"] = keys, sizes
    return entries, data


def _sorted(entries: np.ndarray, data) -> Iterator[bytes]:
    ends = np.cumsum(entries["size"])
    for i in np.argsort(entries["key"], kind="stable"):
        yield bytes(data[int(ends[i]) - int(entries["size"][i]) : int(ends[i])])


def _scatter(lines: Iterable[tuple[int, bytes]], names: list[str], low: int, rest: int) -> None:
    """Appends each line to the file of its key, and (key, size) to `.entries` beside it."""
    with contextlib.ExitStack() as stack:
        opened = [
            [stack.enter_context(open(file, "wb", WRITE_BYTES)) for file in (name, f"{name}.entries")] for name in names
        ]
        for key, line in lines:
            data, entries = opened[key - low >> rest]
            data.write(line)
            entries.write(key.to_bytes(8, "little") + len(line).to_bytes(8, "little"))


def _gathered(name: str) -> Iterator[tuple[int, bytes]]:
    with open(name, "rb") as data, open(f"{name}.entries", "rb") as entries:
        while entry := entries.read(ENTRY.itemsize):
            key, size = np.frombuffer(entry, ENTRY)[0]
            yield int(key), data.read(int(size))


def _taken(name: str) -> bytes:
    with open(name, "rb") as file:
        data = file.read()
    _remove(name)
    return data


def _remove(name: str) -> None:
    os.unlink(name)
    os.unlink(f"{name}.entries")
