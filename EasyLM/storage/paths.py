"""Paths of files, local or remote: globs, versions, and checks of outputs."""

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterable
from typing import Any

from EasyLM.errors import UserError
from EasyLM.storage.atomic import PARTIAL_SUFFIX
from EasyLM.storage.remote import is_remote, names_store_errors, remote_file_system, remote_glob

COMPRESSED_SUFFIXES = (".gz", ".zst")
DERIVED_SUFFIXES = (".index", ".tokens", PARTIAL_SUFFIX)  # globs skip these files


def is_compressed(path: str) -> bool:
    """Whether the suffix names a compression that `reading.read_lines` decompresses."""
    return path.lower().endswith(COMPRESSED_SUFFIXES)


def split_paths(value: str) -> list[str]:
    """Returns the elements of a comma list of paths. A path that exists is one element: its name may contain commas."""
    return [value] if os.path.exists(value) else [part.strip() for part in value.split(",") if part.strip()]


def expand_paths(flag: str, value: str) -> list[str]:
    """Returns the files of a flag's comma list of paths and globs, in the given order. The files of a glob are sorted.

    Raises:
      UserError: naming the flag, if the list is empty, a path is missing or a directory, or a glob matches no file.
    """
    return [path for _, paths in expand_path_groups(flag, value) for path in paths]


def expand_path_groups(flag: str, value: str) -> list[tuple[str, list[str]]]:
    """Returns (element, its files) for each element of a flag's comma list; otherwise as `expand_paths`.

    An existing file has precedence: its name may contain commas and the characters of globs.
    """
    if os.path.isfile(value):
        return [(value, [value])]
    elements = split_paths(value)
    if not elements:
        raise UserError(f"--{flag} is empty: give a file, a glob such as 'DIR/*.jsonl', or a comma list of them")
    groups = []
    for element in elements:
        try:
            groups.append((element, _files_of(element)))
        except UserError as error:
            reason = str(error).removeprefix(f"{element}: ")
            raise type(error)(f"--{flag}={value}: {reason}: {element}") from None
    return groups


def _files_of(element: str) -> list[str]:
    if os.path.isfile(element) or not any(character in element for character in "*?["):
        file_version(element)
        return [element]
    paths = [path for path in _glob(element) if not path.endswith(DERIVED_SUFFIXES)]
    if not paths:
        raise UserError("no file matches")
    return paths


def _glob(pattern: str) -> list[str]:
    if is_remote(pattern):
        return remote_glob(pattern)
    return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))


def file_version(path: str) -> dict[str, Any]:
    """Returns the size in bytes, and a mark that changes when the file is written.

    The mark is the modification time, or for a remote file the key that its file system gives.

    Raises:
      UserError: if the file does not exist, or is a directory.
      UnavailableError: if the remote file system cannot be reached.
    """
    if is_remote(path):
        system, inner = remote_file_system(path)
        with contextlib.suppress(FileNotFoundError), names_store_errors(path):
            info = system.info(inner)  # not `isfile`, which takes any error for a missing file
            if info["type"] == "file":
                return {"size": info["size"], "mark": str(system.ukey(inner))}
        raise UserError(f"{path}: no such file")
    if os.path.isdir(path):
        raise UserError(f"{path}: is a directory (name files, or a glob such as {os.path.join(path, '*.jsonl')})")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    stat = os.stat(path)
    return {"size": stat.st_size, "mark": str(stat.st_mtime_ns)}


def absolute_path(path: str) -> str:
    """Returns the absolute path of a local file, and a remote path as it is."""
    return path if is_remote(path) else os.path.abspath(path)


def path_exists(path: str) -> bool:
    """Whether a local or remote file exists, or a directory.

    Raises:
      UnavailableError: if the remote file system cannot be reached.
    """
    if not is_remote(path):
        return os.path.exists(path)
    system, inner = remote_file_system(path)
    with contextlib.suppress(FileNotFoundError), names_store_errors(path):
        system.invalidate_cache()
        system.info(inner)  # not `exists`, which takes any error for a missing file
        return True
    return False


def check_plain_file(path: str, flag: str) -> None:
    """Checks the name of an output that is written as plain text: readers would take it for compressed, or fail.

    Raises:
      UserError: naming the flag, if it is a folder, or the suffix names a compression.
    """
    if os.path.isdir(path) or is_compressed(path):
        raise UserError(f"--{flag}={path}: must be a plain file, not a folder, .gz or .zst")


def check_output(path: str, flag: str = "", inputs: Iterable[str] = ()) -> None:
    """Creates the directory of a local output file, and checks that files can be written there.

    Args:
      path: the file.
      flag: its flag.
      inputs: files that the command reads, which the output must not replace. Empty names are ignored.

    Raises:
      UserError: naming the flag, if the file cannot be written, or is an input.
    """
    name = f"--{flag}={path}" if flag else path
    if os.path.isdir(path):
        raise UserError(f"{name}: is a folder, name a file")
    if os.path.realpath(path) in (os.path.realpath(one) for one in inputs if one and not is_remote(one)):
        raise UserError(f"{name}: is an input of this command, name another file")
    try:
        directory = os.path.dirname(path) or "."
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except FileExistsError:
        raise UserError(f"{name}: cannot be written ({directory} is a file, not a folder)") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be written ({error.strerror})") from None


def make_directory(path: str) -> None:
    """Creates a local directory and checks that it can be written. Object stores have none: only the system is checked.

    Raises:
      OSError: if it is not writable.
      UserError: as `remote_file_system`.
    """
    if is_remote(path):
        remote_file_system(path)
        return
    os.makedirs(path, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(13, "permission denied")
