"""CRC-32 checksums of named arrays, in the one form that all files of this project use: 8 hexadecimal digits.

CRC-32 comes with Python, finds every burst error of up to 32 bits, and costs little beside a disk (1 to 4 GB/s per
core).
"""

import zlib
from collections.abc import Iterable, Iterator

import numpy as np

ALGORITHM = "crc32"
BLOCK_BYTES = 16 << 20  # of `blocks`


def array_checksum(name: str, shape: tuple[int, ...], dtype: np.dtype, data: Iterable[bytes | memoryview]) -> str:
    """Returns the checksum of an array: of its name, shape and type, and of its bytes.

    Args:
      data: the bytes of the C-contiguous array, in consecutive parts of any length.
    """
    value = zlib.crc32(f"{name} {shape} {dtype.name}".encode())
    for part in data:
        value = zlib.crc32(part, value)
    return f"{value:08x}"


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields consecutive parts of a one-dimensional array, of at most BLOCK_BYTES each, without a copy."""
    step = BLOCK_BYTES // array.itemsize
    for start in range(0, len(array), step):
        yield array[start : start + step]
