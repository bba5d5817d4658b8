"""Which source a path, glob or URL names."""

import collections
import contextlib
import functools
import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence

from EasyLM.errors import UserError
from EasyLM.storage import (
    is_remote,
    is_remote_folder,
    names_store_errors,
    read_json,
    remote_file_system,
    remote_glob,
)
from tokenizer.media import folders
from tokenizer.media.folders import EmptyFolderError
from tokenizer.sources import reading, remote
from tokenizer.sources.items import Source
from tokenizer.sources.local import LocalFolder
from tokenizer.sources.remote import RemoteFolder
from tokenizer.sources.tables import Tables
from tokenizer.sources.tars import Tars

FORMS = "a folder, or .tar or .parquet files: one, a glob, or a range such as 'DIR/{000..019}.tar'"
_CONTAINERS = (".tar", ".parquet")
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_DATA_FILES = {"_data_files": [{"filename": str}]}  # in state.json of save_to_disk
_MOST_FILES = 10**6  # of a range


def find_source(
    value: str, flag: str, extensions: Sequence[str], keys: tuple[str, ...] = (), columns: tuple[str, ...] = ()
) -> Source:
    """Returns the source that a flag names.

    Args:
      value: a folder of files, tars or parquet files, or of `save_to_disk`; or tars or parquet files: a path, a glob, a
        range. Local, or a URL of fsspec. An existing file or folder has precedence.
      flag: the flag.
      extensions: of the inputs in folders and tars.
      keys: of the members of tars.
      columns: of tables.

    Raises:
      UserError: naming the flag, if there is no such source, or the keys or columns are for another one.
    """
    name = f"--{flag}={value}"
    try:
        return _find(name, value, flag, extensions, keys, columns)
    except UserError as error:
        if str(error).startswith("--"):
            raise
        raise type(error)(f"{name}: {str(error).removeprefix(f'{value}: ')}") from error


def _find(
    name: str, value: str, flag: str, extensions: Sequence[str], keys: tuple[str, ...], columns: tuple[str, ...]
) -> Source:
    if _is_folder(value):
        is_table, paths = _in_folder(value, flag, extensions, bool(keys), bool(columns))
        if not paths:
            if keys or columns:
                raise UserError(f"{name}: --{'keys' if keys else 'columns'} need {'tars' if keys else 'a table'}")
            return (RemoteFolder if is_remote(value) else LocalFolder)(value, flag, extensions)
    else:
        paths = list(expand(value, name))
        endings = {os.path.splitext(path)[1].lower() for path in paths}
        if len(endings) > 1:
            raise UserError(f"{name}: names files of several kinds: {', '.join(sorted(endings))}")
        if endings.isdisjoint({*_CONTAINERS, ".arrow"}):
            if any(map(os.path.isfile, paths)) or not endings <= {""}:
                raise UserError(f"{name}: {_hint(paths[0])}; must be {FORMS}")
            raise UserError(f"{name}: no such folder")
        if not is_remote(value) and not any(map(os.path.lexists, paths)):
            raise UserError(f"{name}: no such file{_as_read(paths[0], value)}")
        is_table = endings != {".tar"}
    if unclear := next(filter(reading.is_member, paths), ""):
        raise UserError(
            f"{name}: {unclear} would be read as a member of a tar or table: rename the file or folder with the !"
        )
    if is_table:
        if keys:
            raise UserError(f"--keys={','.join(keys)}: {name} is a table: use --columns")
        return Tables(value, flag, paths, columns)
    if columns:
        raise UserError(f"--columns={','.join(columns)}: {name} are tars: use --keys")
    lower = tuple(map(str.lower, keys))
    if repeated := {key for key in lower if lower.count(key) > 1}:
        raise UserError(f"--keys={','.join(keys)}: has {repeated.pop()} twice: a member is in one column")
    return Tars(value, flag, paths, extensions, lower)


def _is_folder(value: str) -> bool:
    if not is_remote(value):
        return os.path.isdir(value)
    if _RANGE.search(value) or _has_wildcards(value):
        # A folder can have such a name. But stores may refuse to answer for names that they do not have.
        system, inner = remote_file_system(value)
        with contextlib.suppress(FileNotFoundError), names_store_errors(value):
            return bool(system.isdir(inner))
        return False
    return is_remote_folder(value)


def _has_wildcards(value: str) -> bool:
    return any(character in value for character in "*?[")


def _hint(path: str) -> str:
    if path.lower().endswith(_COMPRESSED_TARS):
        return "a compressed tar cannot be read at random, decompress it"
    return "no such folder" if not os.path.isfile(path) else "is a file"


def _as_read(path: str, value: str) -> str:
    """Returns the first path that was looked for, if it is not the value, and the form of a range, if it has braces."""
    if "{" in path:
        return "; braces hold a range such as {000..019}"
    return f" as {path}" if path != value else ""


def _in_folder(
    value: str, flag: str, extensions: Sequence[str], wants_tars: bool, wants_table: bool
) -> tuple[bool, list[str]]:
    """Returns (whether they are tables, the containers) of a folder; none if its files are inputs themselves.

    A folder with any input of its own is a folder of files, as it is with other files beside them. The parquet files
    beside tars hold their metadata.
    """
    if not is_remote(value) and os.path.isfile(f"{value}/dataset_dict.json"):
        splits = read_json(f"{value}/dataset_dict.json", {"splits": [str]})["splits"]
        raise UserError(f"--{flag}={value}: holds several splits: choose {' or '.join(f'{value}/{s}' for s in splits)}")
    if not is_remote(value) and os.path.isfile(f"{value}/state.json") and os.path.isfile(f"{value}/dataset_info.json"):
        files = read_json(f"{value}/state.json", _DATA_FILES)["_data_files"]
        return True, [f"{value}/{file['filename']}" for file in files]
    by_ending: dict[str, list[str]] = {ending: [] for ending in _CONTAINERS}
    try:
        for name in _names(value, flag, (*extensions, *_CONTAINERS)):
            ending = os.path.splitext(name)[1].lower()
            if ending in by_ending:
                by_ending[ending].append(f"{value.rstrip('/')}/{name}")
            elif not (wants_tars or wants_table):
                return False, []
    except EmptyFolderError:
        _refuse_compressed_tars(value, flag)
        raise
    is_table = wants_table or not (by_ending[".tar"] or wants_tars)
    if not is_table:
        _refuse_compressed_tars(value, flag)
    return is_table, sorted(by_ending[".parquet" if is_table else ".tar"], key=folders.natural_key)


def _refuse_compressed_tars(value: str, flag: str) -> None:
    """Raises UserError if a folder holds a compressed tar, whose members would be left out."""
    with contextlib.suppress(EmptyFolderError):
        name = next(_names(value, flag, _COMPRESSED_TARS))
        raise UserError(f"--{flag}={value}: {name}: {_hint(name)}")


def _names(value: str, flag: str, extensions: Sequence[str]) -> Iterator[str]:
    """Yields the names of the files in a folder that have one of the extensions."""
    if not is_remote(value):
        # Unusable files are reported when the source is listed.
        listing = folders.walk(value, flag, extensions, collections.Counter(), lambda path, reason: None)
        yield from (entry.name for entry in listing)
        return
    is_empty = True
    for name, _ in remote.walk(value, flag):
        if name.lower().endswith(tuple(extensions)):
            is_empty = False
            yield name
    if is_empty:
        raise EmptyFolderError(f"--{flag}={value}: contains no file with extension {', '.join(extensions)}")


def expand(value: str, name: str) -> Iterator[str]:
    """Yields the paths of a value with ranges (`{000..019}`, any number of them) and globs, each path once.

    Raises:
      UserError: beginning with `name`, if a range is backwards or too long, or a glob matches nothing.
    """
    if not is_remote(value) and os.path.lexists(value):
        yield value
        return
    parts = _RANGE.split(value)  # text, first, last, text, first, last, ..., text
    ranges = []
    for first, last in zip(parts[1::3], parts[2::3]):
        if int(first) > int(last):
            raise UserError(f"{name}: the range {{{first}..{last}}} is backwards")
        is_padded = any(len(number) > 1 and number.startswith("0") for number in (first, last))
        ranges.append((int(first), int(last) + 1, max(len(first), len(last)) if is_padded else 0))
    if functools.reduce(lambda count, r: count * (r[1] - r[0]), ranges, 1) > _MOST_FILES:
        raise UserError(f"{name}: its ranges name more than {_MOST_FILES} files")
    seen: set[str] = set()
    numbers = [[str(n).zfill(width) for n in range(start, stop)] for start, stop, width in ranges]
    for choice in itertools.product(*numbers):
        pattern = "".join(text + number for text, number in itertools.zip_longest(parts[::3], choice, fillvalue=""))
        paths = _glob(pattern) if _has_wildcards(pattern) else [pattern]
        if not paths:
            raise UserError(f"{name}: no file matches {pattern}")
        yield from (path for path in paths if path not in seen)
        seen.update(paths)


def _glob(pattern: str) -> list[str]:
    if is_remote(pattern):
        paths = remote_glob(pattern)
    else:
        paths = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    return sorted(paths, key=folders.natural_key)
