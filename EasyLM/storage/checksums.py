"""CRC-32 checksums of named arrays, in the one form that all files of this project use: 8 hexadecimal digits.

CRC-32 comes with Python, finds every burst error of up to 32 bits, and costs little beside a disk (1 to 4 GB/s per
core). The checksum of joined parts follows from those of the parts, so several processes can write one array.
"""

import functools
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

ALGORITHM = "crc32"
BLOCK_BYTES = 16 << 20  # of `blocks`


_POLYNOMIAL = 0xEDB88320  # of CRC-32; the highest bit of a number is the coefficient of x^0
_ONE, _X = 1 << 31, 1 << 30


def array_checksum(name: str, shape: tuple[int, ...], dtype: np.dtype, data: Iterable[bytes | memoryview]) -> str:
    """Returns the checksum of an array: of its name, shape and type, and of its bytes.

    Args:
      data: the bytes of the C-contiguous array, in consecutive parts of any length.
    """
    return joined_checksum(name, shape, dtype, ((zlib.crc32(part), memoryview(part).nbytes) for part in data))


def joined_checksum(name: str, shape: tuple[int, ...], dtype: np.dtype, parts: Iterable[tuple[int, int]]) -> str:
    """Returns the checksum of an array whose parts have been read or written by several processes.

    Args:
      parts: (CRC-32, number of bytes) of the consecutive parts of the C-contiguous array.
    """
    value = zlib.crc32(f"{name} {shape} {dtype.name}".encode())
    for crc, num_bytes in parts:
        value = _product(_power_of_x(8 * num_bytes), value) ^ crc
    return f"{value:08x}"


@functools.lru_cache(1 << 16)  # the parts of arrays have few lengths
def _power_of_x(exponent: int) -> int:
    """Returns x^exponent modulo the polynomial of CRC-32. Multiplication by it appends `exponent` zero bits."""
    power, square = _ONE, _X
    while exponent:
        if exponent & 1:
            power = _product(power, square)
        square = _product(square, square)
        exponent >>= 1
    return power


def _product(left: int, right: int) -> int:
    """Returns the product of two polynomials over GF(2), modulo the polynomial of CRC-32 (as zlib's crc32_combine)."""
    product = 0
    while left:
        if left & _ONE:
            product ^= right
        left = (left << 1) & 0xFFFFFFFF
        right = (right >> 1) ^ (_POLYNOMIAL if right & 1 else 0)
    return product


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields consecutive parts of a one-dimensional array, of at most BLOCK_BYTES each, without a copy."""
    step = BLOCK_BYTES // array.itemsize
    for start in range(0, len(array), step):
        yield array[start : start + step]
