"""Column files: a JSON header and columns of numbers, opened memory-mapped.

Most column files are caches, derived from a source file: a line index, tokenized text. A cache lies beside its source
if that directory is writable, otherwise in the user's cache directory. Each value of the settings has its own cache. A
cache of another version of its source is ignored and replaced.
"""

import contextlib
import dataclasses
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import orjson

from EasyLM.storage.atomic import atomic_file
from EasyLM.storage.digests import json_digest

HEADER_BYTES = 4096  # the header is padded with spaces
ALIGNMENT = 64  # bytes
_HEADER_DIGEST = "header_digest"
_COLUMN_DTYPES = ("u1", "<u2", "<u4", "<i2", "<i4", "<i8")

Dtypes = Mapping[str, str]  # column -> item type, such as "<i8"
Produce = Callable[[Callable[..., None]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Columns:
    """An open column file.

    Attributes:
      metadata: JSON values from the header.
      arrays: read-only memory-mapped arrays by column.
    """

    metadata: dict[str, Any]
    arrays: dict[str, np.ndarray]


def cached_columns(
    source: str, suffix: str, settings: Any, version: dict[str, Any], dtypes: Dtypes, produce: Produce
) -> Columns:
    """Returns the columns derived from `source`: from a valid cache, otherwise from `produce`.

    Args:
      source: path or URL of the source; names the cache.
      suffix: one of `paths.DERIVED_SUFFIXES`.
      settings: JSON values that the columns depend on.
      version: JSON values that change when the source changes.
      dtypes: item type by column.
      produce: called with a function `append(**arrays)`, which extends the columns. Returns the metadata (JSON values).
        If it raises, no file is left.
    """
    digest = json_digest(settings)
    name = f"{os.path.basename(source.rstrip('/'))}.{digest}{suffix}"
    expected = {"version": version, "identity": digest}
    candidates = [*_sidecar_paths(source, name), _user_cache_path(source, name)]
    for path in candidates:
        cached = _load(path, expected)
        if cached is not None:
            return cached
    path = next(filter(_is_writable, candidates[:-1]), candidates[-1])
    _write(path, dtypes, produce, {"expected": expected})
    columns = _load(path, expected)
    assert columns is not None, path
    return columns


def write_columns(path: str, dtypes: Dtypes, produce: Produce) -> None:
    """Atomically writes a standalone column file. The arguments are those of `cached_columns`."""
    _write(path, dtypes, produce, {})


def open_columns(path: str) -> Columns | None:
    """Opens a standalone column file. Returns None if it is invalid or truncated."""
    return _load(path, None)


def _write(path: str, dtypes: Dtypes, produce: Produce, header: dict[str, Any]) -> None:
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_file(path) as target, _temporary_files(dtypes, os.path.dirname(path)) as files:

        def append(**arrays: Any) -> None:
            for column, array in arrays.items():
                files[column].write(np.ascontiguousarray(array, dtypes[column]).data)

        _join(target, {**produce(append), **header}, files, dtypes)


@contextlib.contextmanager
def _temporary_files(columns: Dtypes, directory: str) -> Iterator[dict[str, BinaryIO]]:
    """Yields an unnamed file for each column: the offset of a column depends on the length of those before it."""
    with contextlib.ExitStack() as stack:
        yield {column: stack.enter_context(tempfile.TemporaryFile(dir=directory)) for column in columns}


def _join(target: BinaryIO, header: dict[str, Any], files: dict[str, BinaryIO], dtypes: Dtypes) -> None:
    offset, table = HEADER_BYTES, {}
    for column, file in files.items():
        size = file.tell()
        table[column] = (dtypes[column], offset, size // np.dtype(dtypes[column]).itemsize)
        target.seek(offset)
        file.seek(0)
        shutil.copyfileobj(file, target, 1 << 20)
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    header = {**header, "columns": table}
    data = orjson.dumps({**header, _HEADER_DIGEST: json_digest(header)})
    assert len(data) <= HEADER_BYTES, f"a header of {len(data)} bytes"
    target.seek(0)
    target.write(data.ljust(HEADER_BYTES))


def _load(path: str, expected: dict[str, Any] | None) -> Columns | None:
    try:
        with open(path, "rb") as file:
            header = orjson.loads(file.read(HEADER_BYTES))
            # One map for all columns: each map keeps a file descriptor open.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, orjson.JSONDecodeError):
        return None
    if not isinstance(header, dict) or header.get("expected") != expected or "columns" not in header:
        return None
    digest = header.pop(_HEADER_DIGEST, None)  # packed files of version 0.1.0 have none
    if digest != json_digest(header) and (digest is not None or expected is not None):
        return None
    arrays = {}
    try:
        for name, (dtype, offset, length) in header.pop("columns").items():
            if dtype not in _COLUMN_DTYPES:
                return None
            if length == 0:  # its offset may be past the end of the file
                arrays[name] = np.empty(0, dtype)
            elif length < 0 or offset + length * np.dtype(dtype).itemsize > len(mapped):
                return None
            else:
                arrays[name] = np.frombuffer(mapped, dtype, length, offset)
    except (AttributeError, TypeError, ValueError, OverflowError):  # a damaged header
        return None
    return Columns(header, arrays)


def _is_writable(path: str) -> bool:
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=os.path.dirname(path)):
        return True
    return False


def _sidecar_paths(source: str, name: str) -> list[str]:
    return [] if "://" in source else [os.path.join(os.path.dirname(os.path.abspath(source)), name)]


def _user_cache_path(source: str, name: str) -> str:
    directory = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(directory, "EasyLM", f"{json_digest(os.path.abspath(source))}.{name}")
