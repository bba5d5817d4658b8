"""Files of a JSON header and columns of numbers, opened memory-mapped. Most are derived from a source and then kept.

Those lie beside their source if its directory can be written, else in the user's cache directory. One that was made
from another version of its source, or with other settings, counts as missing and is replaced.
"""

import contextlib
import dataclasses
import hashlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import orjson

HEADER_BYTES = 4096  # the header is padded to it with spaces
ALIGNMENT = 64
SUFFIXES = (".index", ".tokens", ".partial")  # of derived files: a glob over data files leaves them out


@dataclasses.dataclass(frozen=True)
class Columns:
    """The opened file: facts from its header, and read-only arrays by name."""

    facts: dict
    arrays: dict[str, np.ndarray]


def digest(facts) -> str:
    """A short name for JSON values: the same values, the same name."""
    return hashlib.blake2b(orjson.dumps(facts, option=orjson.OPT_SORT_KEYS), digest_size=8).hexdigest()


def derive(source: str, suffix: str, identity: dict, version: dict, dtypes: dict[str, str], produce: Callable):
    """The `Columns` derived from `source`, made by `produce` unless a file that fits is there.

    Args:
      source: path or address; names the derived file.
      suffix: one of SUFFIXES.
      identity: settings that the columns depend on (JSON values): each set of them has its own file.
      version: what tells that the source is still the same (JSON values).
      dtypes: item type by column.
      produce: called with `append(**arrays)`, which adds to the columns; returns further facts (JSON values). If it
        raises, nothing is left behind.
    """
    name = f"{os.path.basename(source.rstrip('/'))}.{digest(identity)}{suffix}"
    expected = {"version": version, "identity": digest(identity)}
    places = [*_beside(source, name), os.path.join(_user_cache(), f"{digest(os.path.abspath(source))}.{name}")]
    for place in places:
        found = _load(place, expected)
        if found is not None:
            return found
    place, temporary = _first_writable(places)
    _write(place, temporary, dtypes, produce, {"expected": expected})
    return _load(place, expected)


def create(path: str, dtypes: dict[str, str], produce: Callable) -> None:
    """Writes a file of its own, derived from nothing that is watched, under its name when it is whole; as `derive`."""
    place = os.path.abspath(path)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    _write(place, _temporary(place), dtypes, produce, {})


def open_columns(path: str) -> Columns | None:
    """The columns of a file, or None if it is none, or is cut off."""
    return _load(path, None)


def _write(place: str, temporary, dtypes: dict[str, str], produce: Callable, facts: dict) -> None:
    path, partial = temporary
    try:
        with partial, _temporary_columns(dtypes, os.path.dirname(path)) as files:

            def append(**arrays):
                for column, array in arrays.items():
                    files[column].write(np.ascontiguousarray(array, dtypes[column]).data)

            _join(partial, {**produce(append), **facts}, files, dtypes)
        os.replace(path, place)
    except BaseException:
        os.unlink(path)
        raise


def _load(path: str, expected: dict | None) -> Columns | None:
    try:
        with open(path, "rb") as file:
            facts = orjson.loads(file.read(HEADER_BYTES))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # of all columns: each map holds a file open
    except (OSError, orjson.JSONDecodeError):
        return None
    if not isinstance(facts, dict) or facts.get("expected") != expected or "columns" not in facts:
        return None
    arrays = {}
    try:
        for name, (dtype, offset, length) in facts.pop("columns").items():
            if length < 0 or offset + length * np.dtype(dtype).itemsize > len(mapped):
                return None
            # An empty column may lie behind the file's end.
            arrays[name] = np.frombuffer(mapped, dtype, length, offset) if length else np.empty(0, dtype)
    except (AttributeError, TypeError, ValueError, OverflowError):  # a damaged header
        return None
    return Columns(facts, arrays)


def _join(target, facts: dict, files: dict, dtypes: dict[str, str]) -> None:
    offset, table = HEADER_BYTES, {}
    for column, file in files.items():
        size = file.tell()
        table[column] = (dtypes[column], offset, size // np.dtype(dtypes[column]).itemsize)
        target.seek(offset)
        file.seek(0)
        shutil.copyfileobj(file, target, 1 << 20)
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    header = orjson.dumps({**facts, "columns": table})
    assert len(header) <= HEADER_BYTES, f"a header of {len(header)} bytes"
    target.seek(0)
    target.write(header.ljust(HEADER_BYTES))
    target.flush()
    os.fsync(target.fileno())


@contextlib.contextmanager
def _temporary_columns(names, directory: str) -> Iterator[dict]:
    """Unnamed files, one a column, because a column's place is known only when those before it are complete."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(tempfile.TemporaryFile(dir=directory)) for name in names}


def _first_writable(places: list[str]):
    """(place, (path, file) of a temporary file in its directory), for the first place that can be written."""
    for place in places[:-1]:
        with contextlib.suppress(OSError):
            return place, _temporary(place)
    os.makedirs(os.path.dirname(places[-1]), exist_ok=True)
    return places[-1], _temporary(places[-1])


def _temporary(place: str):
    directory, name = os.path.split(place)
    handle, path = tempfile.mkstemp(dir=directory, prefix=name, suffix=".partial")
    os.chmod(path, 0o644)  # as an ordinary file: others who share the data share its index
    return path, os.fdopen(handle, "wb")


def _beside(source: str, name: str) -> list[str]:
    return [] if "://" in source else [os.path.join(os.path.dirname(os.path.abspath(source)), name)]


def _user_cache() -> str:
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "EasyLM")
