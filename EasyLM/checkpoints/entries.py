"""Arrays of a checkpoint file that have not been read yet, and host memory for them."""

import dataclasses
import math
import mmap
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from EasyLM.errors import UserError
from EasyLM.storage import is_remote, open_binary


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a checkpoint that has not been read yet."""

    key: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    read_into: Callable[[np.ndarray], None]  # fills a C-contiguous array of this shape and dtype

    def read(self) -> np.ndarray:
        """Reads the array into newly allocated memory and returns it."""
        array = host_memory(self.shape, self.dtype)
        self.read_into(array)
        return array

    def renamed(self, key: tuple[str, ...]) -> "Entry":
        """Returns the same array under another key."""
        return dataclasses.replace(self, key=key)


@dataclasses.dataclass(frozen=True)
class PartReader:
    """The `read_into` of an entry whose bytes can be read in parts, for example by several processes.

    Attributes:
      read: (array, start) -> None; fills an array with consecutive bytes of the entry, from the byte `start`.
      check: raises an error unless consecutive parts with these (CRC-32, number of bytes) make the saved array. None:
        the array has no checksum.
    """

    read: Callable[[np.ndarray, int], None]
    check: Callable[[Sequence[tuple[int, int]]], None] | None = None

    def __call__(self, array: np.ndarray) -> None:
        """Reads the whole array and verifies it."""
        self.read(array, 0)
        if self.check is not None:
            self.check([(zlib.crc32(bytes_of(array)), array.nbytes)])


@dataclasses.dataclass(frozen=True)
class SliceReader:
    """The `read_into` of an entry of which any slice can be read.

    Attributes:
      read: (array, index) -> None; fills an array with a slice of the entry, and converts its type.
    """

    read: Callable[[np.ndarray, tuple[slice, ...]], None]

    def __call__(self, array: np.ndarray) -> None:
        """Reads the whole array."""
        self.read(array, (slice(None),) * array.ndim)


def host_memory(shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
    """Returns a zeroed, page-aligned array, which a CPU device adopts without a copy.

    The memory uses pages of the default size, whereas NumPy requests huge pages. A virtual machine that returns free
    memory to its host must fault in huge pages again for each array. The first use of an array was then 3 to 7 times
    slower.
    """
    size = math.prod(shape)
    memory = mmap.mmap(-1, max(1, size * np.dtype(dtype).itemsize))
    return np.frombuffer(memory, dtype, size).reshape(shape)


def bytes_of(array: np.ndarray) -> memoryview:
    """Returns the raw bytes of a C-contiguous array without a copy. bfloat16 lacks the buffer protocol."""
    return array.reshape(-1).view(np.uint8).data


def read_pieces(path: str, pieces: tuple[tuple[int, int], ...], array: np.ndarray, start: int = 0) -> None:
    """Fills an array with the pieces `(offset, num_bytes)` of a file. This function is thread-safe.

    Args:
      start: the first byte that is read, counted within the pieces. The array may end before they do.

    Raises:
      UserError: if the file has been truncated or deleted since its headers were read.
      OSError: if a disk fails.
      UnavailableError: if an object store cannot be reached.
    """
    buffer, position = bytes_of(array), 0
    try:
        opened = _open_unbuffered(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: was deleted during the load; a run deletes its previous checkpoint after each save: load again"
        ) from None
    with opened as file:
        for offset, num_bytes in pieces:
            skipped = min(start, num_bytes)
            start -= skipped
            end = min(position + num_bytes - skipped, len(buffer))
            if position < end:
                file.seek(offset + skipped)
            while position < end:
                count = file.readinto(buffer[position:end])
                if not count:
                    raise UserError(f"{path}: byte {offset}: the file was truncated during the load")
                position += count


def _open_unbuffered(path: str) -> Any:
    """Opens a binary file. Reads of a local file fill the caller's buffer without an intermediate copy."""
    if is_remote(os.fspath(path)):
        return open_binary(os.fspath(path))
    return open(path, "rb", buffering=0)
