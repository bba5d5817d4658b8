"""Data files, local or remote (through fsspec: gs://, s3://, hf://): names, versions, bytes."""

import glob
import hashlib
import os

import fsspec

from EasyLM import columns
from EasyLM.errors import UserError

DIGEST_BYTES = 64 << 10  # at each end of a file: tells one file from another of the same size


def is_remote(path: str) -> bool:
    return "://" in path


def open_binary(path: str):
    """Opens a file for reading bytes."""
    return fsspec.open(path, "rb").open() if is_remote(path) else open(path, "rb")


def expand(name: str, value: str) -> list[str]:
    """The files of a flag: a comma list of paths and globs. Order as given; those of one glob sorted.

    Raises:
      UserError: naming the flag, if nothing is named, a path is missing or a directory, or a glob matches no file.
    """
    names = [part.strip() for part in value.split(",") if part.strip()]
    if not names:
        raise UserError(f"--{name} is empty: give a file, a glob such as 'DIR/*.jsonl', or a comma list of them")
    paths = []
    for part in names:
        try:
            if any(c in part for c in "*?["):
                found = [path for path in _glob(part) if not path.endswith(columns.SUFFIXES)]
                if not found:
                    raise UserError("no file matches")
                paths += found
            else:
                version(part)
                paths.append(part)
        except UserError as error:
            raise UserError(f"--{name}={value}: {str(error).removeprefix(part + ': ')}: {part}") from None
    return paths


def _glob(pattern: str) -> list[str]:
    if is_remote(pattern):
        system, inner = fsspec.url_to_fs(pattern)
        return sorted(system.unstrip_protocol(path) for path in system.glob(inner) if system.isfile(path))
    return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))


def version(path: str) -> dict:
    """Size, and a mark that changes when the file is written: its modification time, or what the remote system gives.

    Raises:
      UserError: if there is no such file, or it is a directory.
    """
    if is_remote(path):
        system, inner = fsspec.url_to_fs(path)
        if not system.isfile(inner):
            raise UserError(f"{path}: no such file")
        return {"size": system.size(inner), "mark": str(system.ukey(inner))}
    if os.path.isdir(path):
        raise UserError(f"{path}: is a directory (name files, or a glob such as {os.path.join(path, '*.jsonl')})")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    stat = os.stat(path)
    return {"size": stat.st_size, "mark": str(stat.st_mtime_ns)}


def check_line_begins(path: str, offset: int) -> None:
    """Raises UserError unless a line of the file begins, or the file ends, at that byte."""
    size = version(path)["size"]
    if 0 < offset < size:
        with open_binary(path) as file:
            file.seek(offset - 1)
            begins = file.read(1) == b"\n"
    else:
        begins = offset in (0, size)
    if not begins:
        raise UserError(f"no line of {path} ({size} bytes) begins at byte {offset}")


def content(path: str, size: int) -> str:
    """A short digest of a file's two ends."""
    with open_binary(path) as file:
        head = file.read(DIGEST_BYTES)
        file.seek(max(0, size - DIGEST_BYTES))
        return hashlib.blake2b(head + file.read(DIGEST_BYTES), digest_size=8).hexdigest()
