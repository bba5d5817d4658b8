"""Atomic writes of local files: a file appears complete under its name, or not at all.

Commands write their output files through `atomic_path`. There are two exceptions: a file that grows for hours and
resumes (`tokenizer.builders.resumable_file`), and a directory that is renamed as a whole
(`EasyLM.checkpoints.run_directory`, `EasyLM.models.llama.convert_easylm_to_hf`).
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

PARTIAL_SUFFIX = ".partial"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, sync: bool = True) -> Iterator[str]:
    """Yields the path of an empty temporary file, and renames that file to `path` on success.

    The temporary file is hidden and lies in the directory of `path`. On an exception it is deleted and `path` is
    unchanged.

    Args:
      sync: flush the file to the disk before the rename, so that after a power failure `path` is the old or the new
        file. Use False for files that are quick to write again.
    """
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    with open(temporary, "xb"):  # creates it with the permissions of an ordinary file, unlike `tempfile`
        pass
    try:
        with names_full_disk(path):
            yield temporary
            if sync:
                flush_to_disk(temporary)
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def names_full_disk(path: str | os.PathLike) -> Iterator[None]:
    """Adds the path of the written file to errors of a full disk, which do not name it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL_DISK and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` on success (see `atomic_path`)."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file atomically.

    Args:
      value: JSON values; NumPy numbers and arrays are allowed. Infinite and nan become null.
    """
    with atomic_file(path) as file:
        file.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def flush_to_disk(path: str) -> None:
    """Flushes the data of a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
