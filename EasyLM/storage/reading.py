"""Reading files, local or remote: bytes, arrays of remote files, lines, and compressed lines."""

import contextlib
import gzip
import io
import mmap
import os
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import zstandard

from EasyLM.errors import UserError
from EasyLM.storage.paths import file_version
from EasyLM.storage.remote import is_remote, names_store_errors, remote_file_system

COMPRESSED_BLOCK_BYTES = 64 << 10  # compressed bytes read at a time
_POINTER = b"version https://git-lfs.github.com/spec/"
_BUFFER_BYTES = 64 << 10  # of remote files, whose clients read larger blocks


def open_binary(path: str) -> BinaryIO:
    """Opens a file for reading bytes.

    Raises:
      FileNotFoundError: if it does not exist.
      UnavailableError: naming the path, if a remote file system cannot be reached. Reads raise it too.
      OSError: if a local file cannot be opened.
    """
    return io.BufferedReader(_RemoteFile(path), _BUFFER_BYTES) if is_remote(path) else open(path, "rb")


def check_no_pointer(path: str | os.PathLike) -> None:
    """Checks that a local file is not a pointer of Git LFS, which `git clone` leaves where git-lfs is not installed.

    Raises:
      UserError: naming the file, and how to get its content.
    """
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path}: is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder")


def byte_reader(path: str) -> Callable[[int, int], bytes]:
    """Returns a function from (begin, end) to those bytes of a file. A local file is closed with the function.

    Raises:
      UnavailableError: naming the path, if a remote file system cannot be reached. The function raises it too.
    """
    if is_remote(path):
        system, inner = remote_file_system(path)

        def read(begin: int, end: int) -> bytes:
            with names_store_errors(path):
                return system.cat_file(inner, start=begin, end=end)  # by name: s3fs has another order

        return read
    file = open_binary(path)
    descriptor = file.fileno()

    def read_local(begin: int, end: int) -> bytes:
        return os.pread(descriptor, end - begin, begin)

    weakref.finalize(read_local, file.close)
    return read_local


class MappedFile:
    """A local file, memory-mapped. It has one map, because each keeps a file descriptor open.

    Raises:
      OSError: if the file does not exist.
      ValueError: if it is empty.
    """

    def __init__(self, path: str):
        self._path = path
        with open(path, "rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def column(self, dtype: str, length: int, offset: int) -> np.ndarray:
        """Returns the array of `length` items that begins at a byte offset."""
        return np.frombuffer(self.bytes, dtype, length, offset)

    def check_size(self) -> None:
        """Checks, before a read, that the file is not shorter than its map.

        The system kills a process that reads a map beyond the end of its file.

        Raises:
          UserError: naming the file, if it was truncated.
        """
        if self.bytes.size() < len(self.bytes):  # of the file, and of the map
            size = f"from {len(self.bytes)} to {self.bytes.size()} bytes"
            raise UserError(f"{self._path}: was truncated while it was read, {size}")


class RemoteColumn:
    """A column of a remote file: it has a length and an item type, and reads each slice from the file, as an array."""

    def __init__(self, read: Callable[[int, int], bytes], dtype: str, length: int, offset: int):
        self.dtype, self._read, self._length, self._offset = np.dtype(dtype), read, length, offset
        self.itemsize = self.dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        first, stop, _ = part.indices(self._length)
        if first >= stop:
            return np.empty(0, self.dtype)
        begin, end = (self._offset + place * self.itemsize for place in (first, stop))
        return np.frombuffer(self._read(begin, end), self.dtype)


class _RemoteFile(io.RawIOBase):
    """A remote file. The errors of all its reads are those of `names_store_errors`."""

    def __init__(self, path: str):
        super().__init__()
        self._path = path
        system, inner = remote_file_system(path)
        with names_store_errors(path):
            self._file = system.open(inner, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with names_store_errors(self._path):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with names_store_errors(self._path):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, line without its newline) of each line that is not blank.

    Files that end in .gz or .zst are decompressed.

    Raises:
      UserError: naming the path, if the file does not exist or cannot be decompressed.
    """
    file_version(path)
    number = 0
    try:
        with contextlib.closing(open_binary(path)) as file:
            for number, line in enumerate(_decompressed_lines(path, file), start=1):
                if line.strip():
                    yield number, line.rstrip(b"\r\n")
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{path}: cannot be decompressed after line {number} ({error})") from None


def read_text_lines(path: str) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text without newline) of each line of a UTF-8 file that is not blank.

    Raises:
      UserError: as in `read_lines`; also naming FILE:LINE, if a line is not UTF-8.
    """
    for number, line in read_lines(path):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def check_line_start(path: str, offset: int) -> None:
    """Raises UserError unless a line starts, or the file ends, at a byte offset."""
    size = file_version(path)["size"]
    if 0 < offset < size:
        with open_binary(path) as file:
            file.seek(offset - 1)
            starts = file.read(1) == b"\n"
    else:
        starts = offset in (0, size)
    if not starts:
        raise UserError(f"no line of {path} ({size} bytes) starts at byte {offset}")


def _decompressed_lines(path: str, file: BinaryIO) -> Iterator[bytes]:
    if path.lower().endswith(".gz"):
        with gzip.GzipFile(fileobj=file) as decompressed:
            yield from decompressed
    elif path.lower().endswith(".zst"):
        rest = b""
        for data in _zstandard_blocks(file):
            *lines, rest = (rest + data).split(b"\n")
            yield from lines
        yield rest
    else:
        yield from file


def _zstandard_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Yields decompressed data, frame by frame. (The stream reader of `zstandard` accepts truncated files.)"""
    frame = None
    while data := file.read(COMPRESSED_BLOCK_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the file is truncated")
