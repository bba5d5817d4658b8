"""Atomic writes of local files: a file appears complete under its name, or not at all.

Commands write their output files through `atomic_path`. There are two exceptions: a file that grows for hours and
resumes (`tokenizer.builders.resumable_file`), and the checkpoints of a run (`EasyLM.checkpoints.run_directory`).

The name of a temporary file or folder identifies its process: `.NAME.OWNER.RANDOM.partial`. What killed processes have
left is deleted by `remove_leftovers`, when an output is locked and when a cache is written.
"""

import contextlib
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from EasyLM.storage.processes import is_gone, owner_tag

PARTIAL_SUFFIX = ".partial"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, sync: bool = True) -> Iterator[str]:
    """Yields the path of an empty temporary file, and renames that file to `path` on success.

    The temporary file is hidden and lies in the directory of `path`. On an exception it is deleted and `path` is
    unchanged.

    Args:
      sync: flush the file to the disk before the rename, so that after a power failure `path` is the old or the new
        file. Use False for files that are quick to write again.
    """
    temporary = _temporary_name(path)
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
def scratch_folder(path: str | os.PathLike) -> Iterator[str]:
    """Yields an empty hidden folder beside `path`, which is deleted at the end. It may be renamed to `path`."""
    temporary = _temporary_name(path)
    os.mkdir(temporary)
    try:
        with names_full_disk(path):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_name(path: str | os.PathLike) -> str:
    return f"{_temporary_stem(path)}{owner_tag()}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}"


def _temporary_stem(path: str | os.PathLike) -> str:
    directory, name = os.path.split(os.fspath(path).rstrip("/"))
    return os.path.join(directory, f".{name}.")


def remove_leftovers(path: str | os.PathLike) -> None:
    """Deletes the temporary files and folders of a path whose processes have ended. Lists the directory."""
    stem = _temporary_stem(path)
    for left in glob.iglob(f"{glob.escape(stem)}*{PARTIAL_SUFFIX}", include_hidden=True):
        if is_gone(left[len(stem) :].partition(".")[0]):
            with contextlib.suppress(OSError):
                shutil.rmtree(left) if os.path.isdir(left) else os.unlink(left)


@contextlib.contextmanager
def names_full_disk(path: str | os.PathLike) -> Iterator[None]:
    """Adds the path of the written file to errors of a full disk, which do not name it."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK and error.filename is None:
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


def flush_tree_to_disk(directory: str) -> None:
    """Flushes a directory and all files and directories below it to the disk."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            flush_to_disk(os.path.join(folder, name))
        flush_to_disk(folder)
