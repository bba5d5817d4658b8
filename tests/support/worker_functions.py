"""Functions that tests run in worker processes."""

import os
import pathlib
import resource
import sys
from collections.abc import Iterator

import numpy as np

from EasyLM.errors import UserError


def main_and_jax() -> tuple[str | None, bool]:
    """Returns the file of the worker's main module, and whether JAX is imported."""
    return getattr(sys.modules["__main__"], "__file__", None), "jax" in sys.modules


def die_once(flag: str) -> str:
    """Kills its process on the first call with a file."""
    path = pathlib.Path(flag)
    if not path.exists():
        path.touch()
        os._exit(1)
    return "second run"


def rows_of(numbers: list[int], flag: str = "") -> Iterator[tuple[int, np.ndarray]]:
    """Yields (position, row [5, 3]) of each number, the last one first. Fails at 255 and leaves out 254.

    With a file that does not exist, kills its process first.
    """
    if flag:
        die_once(flag)
    for position, number in reversed([*enumerate(numbers)]):
        if number == 255:
            raise UserError("no row 255")
        if number != 254:
            yield position, np.full((5, 3), number, np.uint8)


def kept_megabytes(megabytes: int) -> int:
    """Returns the memory that this process holds after it has allocated and freed four times as much as given."""
    blocks = [b"x" * (megabytes << 20) for _ in range(4)]  # such as an array, its parts, its pickle
    before = _resident_megabytes()
    del blocks
    return _resident_megabytes() - before + 4 * megabytes


def _resident_megabytes() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
