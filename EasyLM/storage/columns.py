"""Column files: a JSON header and columns of numbers, opened memory-mapped, or read in parts from an object store.

The header holds a checksum of each column and a digest of itself. Files of version 0.1.0 have neither.

Most column files are caches, derived from a source file: a line index, tokenized text. A cache lies beside its source,
or where that directory is full or not writable, in the user's cache directory or that of temporary files. The cache of
a remote source lies in one of the latter two, which the log names; a copy of a line index is uploaded to the folder of
the source, from which other hosts download it. Each value of the settings has its own cache. A cache that is damaged,
or of another version of its source, is ignored and replaced. Opening a cache verifies its checksums, at 1 to 4 GB/s
per core; one of more than 64 MiB is verified once, until its size or its modification time changes.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import orjson

from EasyLM.errors import UnavailableError, UserError
from EasyLM.storage import checksums
from EasyLM.storage.atomic import FULL_DISK, atomic_file, atomic_path, remove_leftovers
from EasyLM.storage.digests import json_digest
from EasyLM.storage.json_files import parse_json
from EasyLM.storage.paths import absolute_path, file_version
from EasyLM.storage.reading import MappedFile, RemoteColumn, byte_reader
from EasyLM.storage.remote import download, is_remote, takes_files, upload

HEADER_BYTES = 4096  # the header is padded with spaces
ALIGNMENT = 64  # bytes
VERIFIED_ONCE_BYTES = 64 << 20  # the verification of a larger file is remembered
_HEADER_DIGEST, _CHECKSUMS = "header_digest", "checksums"
_COLUMN_DTYPES = ("u1", "<u2", "<u4", "<i2", "<i4", "<i8")

Dtypes = Mapping[str, str]  # column -> item type, such as "<i8"
Produce = Callable[[Callable[..., None]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Columns:
    """An open column file.

    Attributes:
      metadata: JSON values from the header.
      arrays: read-only memory-mapped arrays by column; of a remote file, each is a `RemoteColumn`.
      checksums: `checksums.array_checksum` of each column; empty in files of version 0.1.0.
      check_size: `MappedFile.check_size`, to be called before the arrays are read.
    """

    metadata: dict[str, Any]
    arrays: dict[str, Any]
    checksums: dict[str, str]
    check_size: Callable[[], None] = lambda: None

    def damaged_column(self) -> str | None:
        """Reads all columns. Returns the name of the first one whose bytes differ from those written, or None."""
        for name, expected in self.checksums.items():
            array = self.arrays[name]
            data = (block.view(np.uint8).data for block in checksums.blocks(array))
            if checksums.array_checksum(name, array.shape, array.dtype, data) != expected:
                return name
        return None


def cached_columns(
    source: str,
    suffix: str,
    settings: Any,
    version: dict[str, Any],
    dtypes: Dtypes,
    produce: Produce,
    is_shared: bool = False,
) -> Columns:
    """Returns the columns derived from `source`: from a valid cache, otherwise from `produce`.

    Args:
      source: path or URL of the source; names the cache.
      suffix: one of `paths.DERIVED_SUFFIXES`.
      settings: JSON values that the columns depend on.
      version: JSON values that change when the source changes.
      dtypes: item type by column.
      produce: called with a function `append(**arrays)`, which extends the columns. Returns the metadata (JSON values).
        If it raises, no file is left. It is called again for the next directory if the first one becomes full.
      is_shared: whether a copy is uploaded to the folder of a remote source, for other hosts.

    Raises:
      UserError: naming the directories, if none of them can hold the cache.
    """
    digest = json_digest(settings)
    name = f"{os.path.basename(source.rstrip('/'))}.{digest}{suffix}"
    expected = {"version": version, "identity": digest}
    candidates = _cache_paths(source, name)
    for path in candidates:
        cached = _load(path, expected)
        if cached is not None and _is_intact(path, cached):
            return cached
    shared = f"{os.path.dirname(source)}/{name}" if is_shared and takes_files(source) else ""
    reasons = []
    for path in candidates:
        if not _is_writable(path):
            reasons.append(f"{os.path.dirname(path)} (not writable)")
            continue
        if is_remote(source):
            logging.info("%s: its cache is %s", source, path)
        reason = _provide(path, shared, dtypes, produce, expected)
        if not reason:
            columns = _load(path, expected)
            assert columns is not None, path
            return columns
        reasons.append(f"{os.path.dirname(path)} ({reason})")
    raise UserError(
        f"{source}: no directory for its cache {name}: {', '.join(reasons)}; make space, or set XDG_CACHE_HOME to a "
        "directory with space"
    )


def _is_intact(path: str, columns: Columns) -> bool:
    """Verifies a cache, or reads that it has been verified."""
    if os.path.getsize(path) <= VERIFIED_ONCE_BYTES:
        return columns.damaged_column() is None

    def verify(append: Callable[..., None]) -> dict[str, Any]:
        return {"damaged": columns.damaged_column()}

    return cached_columns(path, ".index", "verified", file_version(path), {}, verify).metadata["damaged"] is None


def write_columns(path: str, dtypes: Dtypes, produce: Produce) -> None:
    """Atomically writes a standalone column file. The arguments are those of `cached_columns`."""
    _write(path, dtypes, produce, {})


def open_columns(path: str) -> Columns | None:
    """Opens a standalone column file, local or remote. Returns None if it is invalid, truncated or too long.

    The columns themselves are verified by `Columns.damaged_column`.

    Raises:
      UserError: if a remote file does not exist, or its file system cannot be reached.
    """
    if not is_remote(path):
        return _load(path, None)
    size, read = file_version(path)["size"], byte_reader(path)
    return _columns(read(0, min(size, HEADER_BYTES)), size, functools.partial(RemoteColumn, read), None)


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
    offset, table, sums = HEADER_BYTES, {}, {}
    for column, file in files.items():
        size, dtype = file.tell(), np.dtype(dtypes[column])
        length = size // dtype.itemsize
        table[column] = (dtypes[column], offset, length)
        target.seek(offset)
        file.seek(0)
        sums[column] = checksums.array_checksum(column, (length,), dtype, _copied(file, target))
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    header = {**header, "columns": table, _CHECKSUMS: sums}
    data = orjson.dumps({**header, _HEADER_DIGEST: json_digest(header)})
    assert len(data) <= HEADER_BYTES, f"a header of {len(data)} bytes"
    target.seek(0)
    target.write(data.ljust(HEADER_BYTES))


def _copied(source: BinaryIO, target: BinaryIO) -> Iterator[bytes]:
    """Copies the rest of a file, and yields its bytes."""
    while data := source.read(1 << 20):
        target.write(data)
        yield data


def _load(path: str, expected: dict[str, Any] | None) -> Columns | None:
    try:
        file = MappedFile(path)
    except (OSError, ValueError):  # missing or empty
        return None
    columns = _columns(file.bytes[:HEADER_BYTES], len(file.bytes), file.column, expected)
    return columns and dataclasses.replace(columns, check_size=file.check_size)


def _columns(
    head: bytes, size: int, column: Callable[[str, int, int], Any], expected: dict[str, Any] | None
) -> Columns | None:
    """Returns the columns that a header describes, or None if it is invalid or not that of a file of this size.

    Args:
      column: from (item type, length, offset) to a column.
      expected: see `_load`.
    """
    try:
        header = parse_json(head)
        if header.get("expected") != expected:
            return None
        # Packed files of version 0.1.0 have no digest and no checksums. If both are under damaged keys, keys follow.
        digest, is_last = header.pop(_HEADER_DIGEST, None), [*header][-1:] == ["columns"]
        is_old = _CHECKSUMS not in header and is_last and expected is None
        if digest != json_digest(header) and not (digest is None and is_old):
            return None
        arrays, end = {}, HEADER_BYTES
        for name, (dtype, offset, length) in header.pop("columns").items():
            if dtype not in _COLUMN_DTYPES or length < 0:
                return None
            # The offset of an empty column may be past the end of the file.
            arrays[name] = column(dtype, length, offset) if length else np.empty(0, dtype)
            end = max(end, offset + length * np.dtype(dtype).itemsize if length else end)
        sums = {} if is_old else header.pop(_CHECKSUMS)
    except (UserError, AttributeError, KeyError, TypeError, ValueError, OverflowError):  # a damaged header
        return None
    is_whole = end == size and (is_old or sums.keys() == arrays.keys())
    return Columns(header, arrays, sums) if is_whole else None


def _is_writable(path: str) -> bool:
    """Whether a file can be created in the directory of a path, which is created if missing."""
    directory = os.path.dirname(path)
    with contextlib.suppress(OSError):
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    return False


def _provide(path: str, shared: str, dtypes: Dtypes, produce: Produce, expected: dict[str, Any]) -> str:
    """Downloads a cache from the URL `shared`, or writes it and uploads it. Without a URL, only writes it.

    Returns:
      an empty text, or how the disk became full.
    """
    remove_leftovers(path)
    if shared and _is_downloaded(shared, path, expected):
        return ""
    try:
        _write(path, dtypes, produce, {"expected": expected})
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        logging.warning("%s cannot be written (%s); trying another directory", path, os.strerror(error.errno))
        return os.strerror(error.errno)
    if shared:
        try:
            upload(path, shared)
        except UnavailableError as error:
            logging.warning("%s is not shared, so that each host makes it: %s", os.path.basename(shared), error)
    return ""


def _is_downloaded(shared: str, path: str, expected: dict[str, Any]) -> bool:
    """Downloads a cache, if its URL holds one that is intact and of this version of the source."""
    try:
        with atomic_path(path) as temporary:
            download(shared, temporary)
            cached = _load(temporary, expected)
            if cached is None or cached.damaged_column() is not None:
                raise UserError(f"{shared} is damaged, or of another version of its source")
    except FileNotFoundError:
        return False
    except UserError as error:
        logging.info("a cache is made again: %s", error)
        return False
    return True


def _cache_paths(source: str, name: str) -> list[str]:
    """Returns the paths for a cache: beside a local source, in the user's cache directory, in that of temporary files.

    The last one is for jobs on machines where the other two are read-only or full.
    """
    source = absolute_path(source)
    beside = [] if is_remote(source) else [os.path.join(os.path.dirname(source), name)]
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    elsewhere = f"{json_digest(source)}.{name}"
    temporary = os.path.join(tempfile.gettempdir(), f"EasyLM-{os.getuid()}")
    paths = [*beside, os.path.join(user_cache, "EasyLM", elsewhere)]
    if os.path.isdir(temporary) and os.stat(temporary).st_uid != os.getuid():  # another user's files are not trusted
        return paths
    return [*paths, os.path.join(temporary, elsewhere)]
