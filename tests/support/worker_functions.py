"""Functions that tests run in worker processes."""

import os
import pathlib
import resource
import sys


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


def kept_megabytes(megabytes: int) -> int:
    """Returns the memory that this process holds after it has allocated and freed four times as much as given."""
    blocks = [b"x" * (megabytes << 20) for _ in range(4)]  # such as an array, its parts, its pickle
    before = _resident_megabytes()
    del blocks
    return _resident_megabytes() - before + 4 * megabytes


def _resident_megabytes() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
