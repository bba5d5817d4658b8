"""Data files, local or remote (through fsspec: gs://, s3://, hf://): names, versions, bytes."""

import contextlib
import glob
import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator

import fsspec
import orjson
import zstandard

from EasyLM.errors import UserError
from EasyLM.storage import columns

BLOCK_BYTES = 64 << 10  # of packed data, unpacked at a time
COMPRESSED = (".gz", ".zst")
DIGEST_BYTES = 64 << 10  # at each end of a file: tells one file from another of the same size


def is_remote(path: str) -> bool:
    return "://" in path


def open_binary(path: str):
    """Opens a file for reading bytes."""
    return fsspec.open(path, "rb").open() if is_remote(path) else open(path, "rb")


def is_compressed(path: str) -> bool:
    return path.lower().endswith(COMPRESSED)


def check_output(path: str, flag: str = "") -> None:
    """Makes the folder that a local file is to be written into, and tries it, before hours of work for that file.

    Raises:
      UserError: naming the flag, if the file cannot be written there.
    """
    name = f"--{flag}={path}" if flag else path
    if os.path.isdir(path):
        raise UserError(f"{name}: is a folder, name a file")
    try:
        folder = os.path.dirname(path) or "."
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{name}: cannot be written ({error.strerror})") from None


def write_json(path: str, value) -> None:
    """Writes a local JSON file that appears whole, its bytes on the disk, in place of what was there.

    Args:
      value: JSON values, NumPy's numbers and arrays among them. What JSON has no number for (infinite, nan) is null.
    """
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        file.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line without its end) of each line that is not blank; .gz and .zst files unpacked.

    Raises:
      UserError: naming the path, if there is no such file or it cannot be unpacked.
    """
    version(path)
    number = 0
    try:
        with contextlib.closing(open_binary(path)) as file:
            for number, line in enumerate(_unpacked_lines(path, file), start=1):
                if line.strip():
                    yield number, line.rstrip(b"\r\n")
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{path}: cannot be unpacked after line {number} ({error})") from None


def read_text_lines(path: str) -> Iterator[tuple[int, str]]:
    """`read_lines` of a text in UTF-8.

    Raises:
      UserError: as `read_lines`; naming FILE:LINE, for a line that is none.
    """
    for number, line in read_lines(path):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not a text in UTF-8 ({error.reason} at byte {error.start})") from None


def _unpacked_lines(path: str, file) -> Iterator[bytes]:
    if path.lower().endswith(".gz"):
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield from unpacked
    elif path.lower().endswith(".zst"):
        rest = b""
        for data in _zstandard_blocks(file):
            *lines, rest = (rest + data).split(b"\n")
            yield from lines
        yield rest
    else:
        yield from file


def _zstandard_blocks(file) -> Iterator[bytes]:
    """What is packed, frame after frame. (The package's own stream takes a file that is cut off for a whole one.)"""
    frame = None
    while data := file.read(BLOCK_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("it is cut off")


def expand(name: str, value: str) -> list[str]:
    """The files of a flag: a comma list of paths and globs. Order as given; those of one glob sorted.

    Raises:
      UserError: naming the flag, if nothing is named, a path is missing or a directory, or a glob matches no file.
    """
    return [path for _, paths in expand_parts(name, value) for path in paths]


def expand_parts(name: str, value: str) -> list[tuple[str, list[str]]]:
    """(part, its files) of each part of a flag's comma list; else as `expand`."""
    names = [part.strip() for part in value.split(",") if part.strip()]
    if not names:
        raise UserError(f"--{name} is empty: give a file, a glob such as 'DIR/*.jsonl', or a comma list of them")
    parts = []
    for part in names:
        found = [part]
        try:
            if any(c in part for c in "*?["):
                found = [path for path in _glob(part) if not path.endswith(columns.SUFFIXES)]
                if not found:
                    raise UserError("no file matches")
            else:
                version(part)
        except UserError as error:
            raise UserError(f"--{name}={value}: {str(error).removeprefix(part + ': ')}: {part}") from None
        parts.append((part, found))
    return parts


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
