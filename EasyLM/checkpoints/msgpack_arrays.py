"""The msgpack encoding of an array in flax: an extension of type 1 with `(shape, dtype name, raw bytes)`.

An array of more than 2^30 bytes is encoded as a map of flat chunks. This module parses only the headers. It transfers
array bytes directly between the file and the caller's buffer, so it never holds a whole file in memory.
"""

import functools
import math
import os
import struct
from collections.abc import Iterator
from typing import Any, NoReturn

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import msgpack
import numpy as np

from EasyLM.checkpoints.entries import Entry, PartReader, bytes_of, read_pieces
from EasyLM.errors import UserError
from EasyLM.storage import check_no_pointer, is_remote, remote_file_system

MAX_CHUNK_BYTES = 2**30  # flax.serialization.MAX_CHUNK_SIZE: a larger array is written in chunks
CHUNKED = "__msgpack_chunked_array__"
_NDARRAY, _NPSCALAR = 1, 3  # flax's extension types

# First byte -> (kind, width in bytes of the big-endian number that follows). The number is a length or the value.
_HEADERS = {
    0xC2: ("bool", 0),
    0xC3: ("bool", 0),
    **{0xC4 + i: ("bin", 1 << i) for i in range(3)},
    **{0xC7 + i: ("ext", 1 << i) for i in range(3)},
    **{0xCC + i: ("int", 1 << i) for i in range(4)},
    **{0xD9 + i: ("str", 1 << i) for i in range(3)},
    **{0xDC + i: ("array", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}
# (limit, kind, first byte of number 0). A first byte below the limit encodes both the kind and the number.
_ONE_BYTE_HEADERS = ((0x80, "int", 0), (0x90, "map", 0x80), (0xA0, "array", 0x90), (0xC0, "str", 0xA0))
_FIXED_EXT = {0xD4 + i: 1 << i for i in range(5)}  # first byte -> length


class HeaderReader:
    """Reads msgpack headers one by one and skips the bytes of arrays.

    Attributes:
      offset: the next byte to read.
      location: the current entry, for error messages.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self.offset, self.location = path, 0, "start"
        if is_remote(os.fspath(path)):
            self._resolved_path = os.fspath(path)
            system, inner = remote_file_system(self._resolved_path)
            self._file: Any = system.open(inner, "rb", block_size=1 << 16)  # headers are small and far apart
            self.size = self._file.size
        else:
            self._resolved_path = os.path.realpath(os.fspath(path))  # a running job may change its links
            self._file = open(self._resolved_path, "rb", buffering=4096)  # noqa: SIM115  (closed by __exit__)
            self.size = os.path.getsize(self._resolved_path)
            check_no_pointer(self._resolved_path)

    def __enter__(self) -> "HeaderReader":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def fail(self, reason: str) -> NoReturn:
        """Raises a UserError that names the file, the entry and the byte offset."""
        raise UserError(f"{self.path}: {self.location}: byte {self.offset}: {reason}")

    def take(self, count: int) -> bytes:
        """Returns the next `count` bytes."""
        if self.offset + count > self.size:
            self.fail(f"the file is truncated: {count} more bytes are needed, it ends at {self.size}")
        self._file.seek(self.offset)
        data = self._file.read(count)
        self.offset += count
        return data

    def token(self) -> tuple[str, int]:
        """Returns (kind, length or value) of the next header. Does not consume the type byte of an extension."""
        self._token_start = self.offset
        first = self.take(1)[0]
        for limit, kind, base in _ONE_BYTE_HEADERS:
            if first < limit:
                return kind, first - base
        if first in _FIXED_EXT:
            return "ext", _FIXED_EXT[first]
        kind, width = _HEADERS.get(first, (f"0x{first:02x}", 0))
        return kind, int.from_bytes(self.take(width), "big")

    def step_back(self) -> None:
        """Moves back to the start of the last token."""
        self.offset = self._token_start

    def expect(self, kind: str, length: int | None = None) -> int:
        """Returns the length or value of the next header. Fails if the kind, or the given length, differs."""
        actual, value = self.token()
        if actual != kind or length not in (None, value):
            self.step_back()
            expected = kind if length is None else f"{kind} of {length}"
            self.fail(f"not a checkpoint of this kind: expected {expected}, read {actual} of {value}")
        return value

    def text(self) -> str:
        """Reads a string."""
        try:
            return self.take(self.expect("str")).decode()
        except UnicodeDecodeError:
            self.fail("a name is not valid UTF-8")

    def value(self, key: tuple[str, ...]) -> Entry:
        """Returns the next value as an entry and skips its bytes. The array may be in one piece or in chunks."""
        if not key or not all(key):
            self.fail("an empty name")
        kind, length = self.token()
        if kind == "map":
            if self.text() != CHUNKED:
                self.fail("neither an array nor a chunked array")
            return self.chunked(key, length)
        self.step_back()
        shape, dtype, piece = self._ndarray()
        return self._entry(key, shape, dtype, [piece])

    def chunked(self, key: tuple[str, ...], length: int) -> Entry:
        """Returns a chunked array as an entry. The caller has read the map of `length` names through the first name."""
        shape: tuple[int, ...] = ()
        pieces, dtypes = [], set()
        self.expect("bool")
        for _ in range(length - 1):
            name = self.text()
            count = self.expect("map")
            if name == "shape":
                shape = tuple((self.text(), self.expect("int"))[1] for _ in range(count))
            elif name == "chunks":
                for _ in range(count):
                    self.text()
                    _, dtype, piece = self._ndarray()
                    dtypes.add(dtype)
                    pieces.append(piece)
            else:
                self.fail(f"a chunked array has shape and chunks, not {name!r}")
        if len(dtypes) != 1:
            self.fail("a chunked array needs chunks of one type")
        return self._entry(key, shape, dtypes.pop(), pieces)

    def _ndarray(self) -> tuple[tuple[int, ...], np.dtype, tuple[int, int]]:
        """Returns (shape, dtype, (offset, num_bytes)) of one extension."""
        length = self.expect("ext")
        if self.take(1)[0] not in (_NDARRAY, _NPSCALAR):
            self.fail("an extension that is not an array")
        end = self.offset + length
        self.expect("array", length=3)
        shape = tuple(self.expect("int") for _ in range(self.expect("array")))
        dtype = self._dtype(self.text())
        num_bytes = self.expect("bin")
        if num_bytes != math.prod(shape) * dtype.itemsize or self.offset + num_bytes != end:
            self.fail(f"{num_bytes} bytes do not make an array {shape} of {dtype.name}")
        piece = (self.offset, num_bytes)
        if end > self.size:
            self.fail(f"the file is truncated: the array needs {num_bytes} bytes, the file ends at {self.size}")
        self.offset = end
        return shape, dtype, piece

    def _dtype(self, name: str) -> np.dtype:
        try:
            dtype = np.dtype(name)
        except Exception:  # NumPy parses the name; a hostile one raises almost any exception
            dtype = np.dtype(object)
        if dtype.name != name or dtype.hasobject:
            self.fail(f"unknown array type {name!r}")
        return dtype

    def _entry(self, key, shape, dtype, pieces) -> Entry:
        if sum(num_bytes for _, num_bytes in pieces) != math.prod(shape) * dtype.itemsize:
            self.fail(f"the chunks do not make an array {shape} of {dtype}")
        return Entry(key, shape, dtype, PartReader(functools.partial(read_pieces, self._resolved_path, tuple(pieces))))


def value_segments(shape: tuple[int, ...], dtype: np.dtype) -> list[bytes | int]:
    """Returns the encoding of an array without its bytes: headers, and between them how many array bytes follow."""
    size = math.prod(shape)
    if size * dtype.itemsize <= MAX_CHUNK_BYTES:
        return _ndarray_segments(shape, dtype)
    chunk_size = max(1, MAX_CHUNK_BYTES // dtype.itemsize)
    starts = range(0, size, chunk_size)
    packer = msgpack.Packer()
    lengths: dict[str, int] = dict(zip(map(str, range(len(shape))), shape))
    head = packer.pack_map_header(3) + packer.pack(CHUNKED) + packer.pack(True)
    head += packer.pack("shape") + packer.pack(lengths) + packer.pack("chunks") + packer.pack_map_header(len(starts))
    segments: list[bytes | int] = [head]
    for i, start in enumerate(starts):
        segments.append(packer.pack(str(i)))
        segments += _ndarray_segments((min(chunk_size, size - start),), dtype)
    return segments


def value_parts(array: np.ndarray) -> Iterator[bytes | memoryview]:
    """Yields `flax.serialization.to_bytes(array)` as headers and views of the array."""
    data, position = bytes_of(np.ascontiguousarray(array)), 0
    for segment in value_segments(array.shape, array.dtype):
        if isinstance(segment, bytes):
            yield segment
        else:
            yield data[position : position + segment]
            position += segment


def _ndarray_segments(shape: tuple[int, ...], dtype: np.dtype) -> list[bytes | int]:
    num_bytes = math.prod(shape) * dtype.itemsize
    head = b"\x93" + msgpack.packb(shape) + msgpack.packb(dtype.name) + bin_header(num_bytes)
    return [_ext_header(len(head) + num_bytes) + head, num_bytes]


def bin_header(length: int) -> bytes:
    """Returns the header of a msgpack bin of `length` bytes."""
    return _sized_header(0xC4, length)


def _ext_header(length: int) -> bytes:
    fixed = next((first for first, size in _FIXED_EXT.items() if size == length), None)
    return (bytes([fixed]) if fixed else _sized_header(0xC7, length)) + bytes([_NDARRAY])


def _sized_header(first_byte: int, length: int) -> bytes:
    for i, limit in enumerate((2**8, 2**16, 2**32)):
        if length < limit:
            return struct.pack(">B" + "BHI"[i], first_byte + i, length)
    raise AssertionError(f"{length} bytes do not fit into one msgpack value")
