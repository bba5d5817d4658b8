"""Arrays as flax writes them into msgpack: an extension of type 1 around `(shape, dtype name, raw bytes)`.

An array of more than 2^30 bytes is a map of flat chunks instead. Only the few bytes of headers are parsed here, by
hand; array bytes go straight from the file into the caller's buffer, and back, so nothing ever holds a whole file.
"""

import dataclasses
import functools
import math
import mmap
import os
import struct
from collections.abc import Callable

import fsspec
import ml_dtypes  # noqa: F401  (its import teaches numpy the name bfloat16)
import msgpack
import numpy as np

from EasyLM.errors import UserError
from EasyLM.storage import is_remote

MAX_CHUNK_BYTES = 2**30  # flax.serialization.MAX_CHUNK_SIZE: a larger array is written in chunks
CHUNKED = "__msgpack_chunked_array__"
_NDARRAY, _NPSCALAR = 1, 3  # flax's extension types

# First byte -> (kind, width in bytes of the big-endian number that follows: a length, or the value itself).
_WIDE = {
    0xC2: ("bool", 0),
    0xC3: ("bool", 0),
    **{0xC4 + i: ("bin", 1 << i) for i in range(3)},
    **{0xC7 + i: ("ext", 1 << i) for i in range(3)},
    **{0xCC + i: ("int", 1 << i) for i in range(4)},
    **{0xD9 + i: ("str", 1 << i) for i in range(3)},
    **{0xDC + i: ("array", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}
_FIXED_EXT = {0xD4 + i: 1 << i for i in range(5)}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a checkpoint, not yet read."""

    key: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    read_into: Callable[[np.ndarray], None]  # fills a C-contiguous array of this shape and dtype

    def read(self) -> np.ndarray:
        """The array, in fresh memory."""
        array = host_memory(self.shape, self.dtype)
        self.read_into(array)
        return array


def open_binary(path: str, mode: str, **options):
    """Opens a local file, or a remote one through fsspec. Local reads go straight into the caller's buffer."""
    if is_remote(os.fspath(path)):
        return fsspec.open(path, mode, **options).open()
    return open(path, mode, buffering=0 if mode == "rb" else 1 << 16)


def host_memory(shape, dtype) -> np.ndarray:
    """An array of fresh memory that begins a page, so that a CPU device takes it over without a copy.

    Pages of the usual size: numpy asks for huge ones, and a virtual machine that hands free memory back to its host
    gets those anew each time, which made first use of an array 3 to 7 times as slow.
    """
    size = math.prod(shape)
    memory = mmap.mmap(-1, max(1, size * np.dtype(dtype).itemsize))
    return np.frombuffer(memory, dtype, size).reshape(shape)


def bytes_of(array: np.ndarray) -> memoryview:
    """The raw bytes of a C-contiguous array, without a copy. (bfloat16 has no buffer protocol of its own.)"""
    return memoryview(array.reshape(-1).view(np.uint8))


class HeaderReader:
    """Reads msgpack headers one by one and steps over the bytes of arrays."""

    def __init__(self, path: str):
        self.path, self.offset, self.where = path, 0, "start"
        if is_remote(os.fspath(path)):
            self._true_path = path
            self._file = open_binary(path, "rb", block_size=1 << 16)  # small reads, far apart
            self.size = self._file.size
        else:
            self._true_path = os.path.realpath(path)  # a run may move its links while the entries are read
            self._file = open(self._true_path, "rb", buffering=4096)  # noqa: SIM115  (closed by __exit__)
            self.size = os.path.getsize(self._true_path)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def error(self, reason: str) -> UserError:
        return UserError(f"{self.path}: {self.where}: byte {self.offset}: {reason}")

    def take(self, count: int) -> bytes:
        if self.offset + count > self.size:
            raise self.error(f"the file is cut short: {count} more bytes are needed, it ends at {self.size}")
        self._file.seek(self.offset)
        data = self._file.read(count)
        self.offset += count
        return data

    def token(self) -> tuple[str, int]:
        """The next header: (kind, length or value). Of an extension, the type byte is still to come."""
        self._token_start = self.offset
        first = self.take(1)[0]
        for limit, kind, base in ((0x80, "int", 0), (0x90, "map", 0x80), (0xA0, "array", 0x90), (0xC0, "str", 0xA0)):
            if first < limit:
                return kind, first - base
        if first in _FIXED_EXT:
            return "ext", _FIXED_EXT[first]
        kind, width = _WIDE.get(first, (f"0x{first:02x}", 0))
        return kind, int.from_bytes(self.take(width), "big")

    def step_back(self) -> None:
        """Unreads the last token."""
        self.offset = self._token_start

    def expect(self, kind: str, length: int | None = None) -> int:
        found, value = self.token()
        if found != kind or length not in (None, value):
            self.step_back()
            wanted = kind if length is None else f"{kind} of {length}"
            raise self.error(f"not a checkpoint of this kind: {wanted} expected, {found} of {value} found")
        return value

    def text(self) -> str:
        try:
            return self.take(self.expect("str")).decode()
        except UnicodeDecodeError:
            raise self.error("a name that is not text") from None

    def value(self, key) -> Entry:
        """An array, whole or in chunks; its bytes are stepped over."""
        kind, length = self.token()
        if kind == "map":
            if self.text() != CHUNKED:
                raise self.error("neither an array nor a chunked array")
            return self.chunked(key, length)
        self.step_back()
        shape, dtype, piece = self._ndarray()
        return self._entry(key, shape, dtype, [piece])

    def chunked(self, key, length: int) -> Entry:
        """The rest of a chunked array's map, after its first name."""
        shape, pieces, dtypes = (), [], set()
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
                raise self.error(f"a chunked array has shape and chunks, not {name!r}")
        if len(dtypes) != 1:
            raise self.error("a chunked array needs chunks of one type")
        return self._entry(key, shape, dtypes.pop(), pieces)

    def _ndarray(self):
        """(shape, dtype, (offset, bytes)) of one extension."""
        length = self.expect("ext")
        if self.take(1)[0] not in (_NDARRAY, _NPSCALAR):
            raise self.error("an extension that is not an array")
        end = self.offset + length
        self.expect("array", length=3)
        shape = tuple(self.expect("int") for _ in range(self.expect("array")))
        name = self.text()
        try:
            dtype = np.dtype(name)
            known = dtype.name == name and not dtype.hasobject
        except TypeError:
            known = False
        if not known:
            raise self.error(f"unknown array type {name!r}")
        num_bytes = self.expect("bin")
        if num_bytes != math.prod(shape) * dtype.itemsize or self.offset + num_bytes != end:
            raise self.error(f"{num_bytes} bytes do not make an array {shape} of {name}")
        piece = (self.offset, num_bytes)
        if end > self.size:
            raise self.error(f"the file is cut short: the array needs {num_bytes} bytes, the file ends at {self.size}")
        self.offset = end
        return shape, dtype, piece

    def _entry(self, key, shape, dtype, pieces) -> Entry:
        if sum(num_bytes for _, num_bytes in pieces) != math.prod(shape) * dtype.itemsize:
            raise self.error(f"the chunks do not make an array {shape} of {dtype}")
        return Entry(key, shape, dtype, functools.partial(read_pieces, self._true_path, tuple(pieces)))


def read_pieces(path: str, pieces: tuple[tuple[int, int], ...], array: np.ndarray) -> None:
    """Fills an array with pieces `(offset, bytes)` of a file. Threads may call it side by side.

    Raises:
      UserError: if the file has become shorter, or is gone.
    """
    buffer, position = bytes_of(array), 0
    try:
        opened = open_binary(path, "rb")
    except FileNotFoundError:
        raise UserError(
            f"{path}: was deleted while it was read, as a run deletes a checkpoint when the next is whole: load again"
        ) from None
    with opened as file:
        for offset, num_bytes in pieces:
            file.seek(offset)
            end = position + num_bytes
            while position < end:
                count = file.readinto(buffer[position:end])
                if not count:
                    raise UserError(f"{path}: byte {offset}: the file became shorter while it was read")
                position += count


def value_parts(array: np.ndarray):
    """`flax.serialization.to_bytes(array)` as headers and views of the array."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.nbytes <= MAX_CHUNK_BYTES:
        yield from _ndarray_parts(array)
        return
    size = max(1, MAX_CHUNK_BYTES // array.dtype.itemsize)
    chunks = np.split(array.reshape(-1), range(size, array.size, size))
    packer = msgpack.Packer()
    yield packer.pack_map_header(3) + packer.pack(CHUNKED) + packer.pack(True)
    yield packer.pack("shape") + packer.pack({str(i): length for i, length in enumerate(array.shape)})
    yield packer.pack("chunks") + packer.pack_map_header(len(chunks))
    for i, chunk in enumerate(chunks):
        yield packer.pack(str(i))
        yield from _ndarray_parts(chunk)


def _ndarray_parts(array: np.ndarray):
    head = b"\x93" + msgpack.packb(array.shape) + msgpack.packb(array.dtype.name) + bin_header(array.nbytes)
    yield _ext_header(len(head) + array.nbytes) + head
    yield bytes_of(array)


def _sized_header(first_byte: int, length: int) -> bytes:
    for i, limit in enumerate((2**8, 2**16, 2**32)):
        if length < limit:
            return struct.pack(">B" + "BHI"[i], first_byte + i, length)
    raise AssertionError(f"{length} bytes do not fit into one msgpack value")


def bin_header(length: int) -> bytes:
    return _sized_header(0xC4, length)


def _ext_header(length: int) -> bytes:
    fixed = next((first for first, size in _FIXED_EXT.items() if size == length), None)
    return (bytes([fixed]) if fixed else _sized_header(0xC7, length)) + bytes([_NDARRAY])
