"""Checksums of the arrays of a streaming checkpoint, in the sidecar `checksums.json`.

    {"algorithm": "crc32", "file": "streaming_train_state", "bytes": 1404, "arrays": {"params/params/...": "0a1b2c3d"}}

The format of the state file has no place for checksums. A file without the sidecar loads without verification, as do
all files of the LVM release. `EasyLM.storage.checksums` describes the checksum of an array.
"""

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from EasyLM.checkpoints.entries import Entry, PartReader, bytes_of
from EasyLM.checkpoints.layout import MILESTONE, sidecar_path
from EasyLM.errors import UserError
from EasyLM.storage import checksums, read_json

_SCHEMA = {"algorithm": str, "file": str, "bytes": int, "arrays": {str: str}}


class DamagedArrayError(UserError):
    """The bytes of an array differ from those that were saved."""


def array_checksum(key: tuple[str, ...], array: np.ndarray) -> str:
    """Returns 8 hexadecimal digits for the bytes, shape and type of a C-contiguous array, and its key."""
    return checksums.array_checksum("/".join(key), array.shape, array.dtype, [bytes_of(array)])


def joined_checksum(
    key: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype, parts: Iterable[tuple[int, int]]
) -> str:
    """Returns the checksum of an array from those of its parts.

    Args:
      parts: (CRC-32, number of bytes) of consecutive parts, from the first byte to the last.
    """
    return checksums.joined_checksum("/".join(key), shape, dtype, parts)


def make_table(file_name: str, num_bytes: int, arrays: Mapping[tuple[str, ...], str]) -> dict:
    """Returns the content of `checksums.json` for a state file of `num_bytes` and the checksums of its arrays."""
    by_name = {"/".join(key): checksum for key, checksum in arrays.items()}
    return {"algorithm": checksums.ALGORITHM, "file": file_name, "bytes": num_bytes, "arrays": by_name}


def verified(path: str, entries: list[Entry], size: int) -> list[Entry]:
    """Returns the entries of a streaming file so that each read verifies its array.

    Args:
      path: the file, `layout.resolved`. Its checksums are beside it, or it has none.
      size: its bytes.

    Raises:
      UserError: if the file has another size or other arrays than its checksums say, or these are unreadable. Reading a
        damaged array raises DamagedArrayError.
    """
    table_path = sidecar_path(path, "checksums")
    if table_path is None:
        return entries
    table = read_json(table_path, _SCHEMA)
    if table["file"] != _saved_name(path):
        return entries  # the checksums of another file in the same directory
    if table["algorithm"] != checksums.ALGORITHM:
        raise UserError(
            f"{table_path}: unknown algorithm {table['algorithm']!r}; only {checksums.ALGORITHM} is supported"
        )
    if size != table["bytes"]:
        raise UserError(f"{path}: has {size} bytes, but {table['bytes']} were saved: it is damaged ({table_path})")
    arrays = table["arrays"]
    names = {"/".join(entry.key) for entry in entries}
    for name in sorted(names ^ set(arrays)):
        state = "unexpected" if name in names else "missing"
        raise UserError(f"{path}: the array {name} is {state}: the file is damaged ({table_path})")
    return [verified_entry(path, entry, arrays["/".join(entry.key)]) for entry in entries]


def _saved_name(path: str) -> str:
    """Returns the name under which the file was saved: links to a milestone, and copies of it, end in its step."""
    name = os.path.basename(path)
    milestone = MILESTONE.fullmatch(name)
    return milestone[1] if milestone else name


def verified_entry(path: str, entry: Entry, checksum: str) -> Entry:
    """Returns an entry whose read raises DamagedArrayError unless the array has the checksum."""
    check = functools.partial(_check, path, entry, checksum)
    if isinstance(entry.read_into, PartReader):
        return dataclasses.replace(entry, read_into=dataclasses.replace(entry.read_into, check=check))
    return dataclasses.replace(entry, read_into=functools.partial(_read_verified, entry, check))


def _read_verified(entry: Entry, check: Callable[[Sequence[tuple[int, int]]], None], array: np.ndarray) -> None:
    entry.read_into(array)
    check([(zlib.crc32(bytes_of(array)), array.nbytes)])


def _check(path: str, entry: Entry, checksum: str, parts: Sequence[tuple[int, int]]) -> None:
    if joined_checksum(entry.key, entry.shape, entry.dtype, parts) != checksum:
        raise DamagedArrayError(
            f"{path}: the array {'/'.join(entry.key)} is damaged: its bytes differ from those that were saved "
            f"(checksum {checksum})"
        )
