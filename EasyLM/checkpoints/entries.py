"""An array of a checkpoint file that is not read yet, and the memory to read it into."""

import dataclasses
import io
import math
import mmap
import os
from collections.abc import Callable, Sequence

import fsspec
import numpy as np
from numpy.typing import DTypeLike

from EasyLM.errors import UserError
from EasyLM.storage import is_remote


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a checkpoint, not yet read."""

    key: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    read_into: Callable[[np.ndarray], None]  # fills a C-contiguous array of this shape and dtype

    def read(self) -> np.ndarray:
        """Returns the array in fresh memory."""
        array = host_memory(self.shape, self.dtype)
        self.read_into(array)
        return array

    def renamed(self, key: tuple[str, ...]) -> "Entry":
        """Returns the same array under another key."""
        return dataclasses.replace(self, key=key)


def host_memory(shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
    """Returns a zeroed, page-aligned array, which a CPU device adopts without a copy.

    The pages have the default size. NumPy requests huge pages; a virtual machine that returns free memory to its host
    must fault those in again each time, which made the first use of an array 3 to 7 times slower.
    """
    size = math.prod(shape)
    memory = mmap.mmap(-1, max(1, size * np.dtype(dtype).itemsize))
    return np.frombuffer(memory, dtype, size).reshape(shape)


def bytes_of(array: np.ndarray) -> memoryview:
    """Returns the raw bytes of a C-contiguous array without a copy. (bfloat16 has no buffer protocol of its own.)"""
    return array.reshape(-1).view(np.uint8).data


def read_pieces(path: str, pieces: tuple[tuple[int, int], ...], array: np.ndarray) -> None:
    """Fills an array with pieces `(offset, num_bytes)` of a file. Thread-safe.

    Raises:
      UserError: if the file was truncated or deleted in the meantime.
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
            file.seek(offset)
            end = position + num_bytes
            while position < end:
                count = file.readinto(buffer[position:end])
                if not count:
                    raise UserError(f"{path}: byte {offset}: the file was truncated during the load")
                position += count


def _open_unbuffered(path: str) -> io.RawIOBase:
    """Opens a file so that local reads go straight into the caller's buffer."""
    if is_remote(os.fspath(path)):
        return fsspec.open(path, "rb").open()
    return open(path, "rb", buffering=0)
