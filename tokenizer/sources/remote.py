"""Files of remote file systems: listing folders, reading ranges, also of local files. fsspec reads them."""

import collections
import contextlib
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

from EasyLM.errors import UserError, first_line
from EasyLM.storage import is_remote, names_store_errors, open_binary, remote_file_system, walk_remote
from tokenizer.media import folders
from tokenizer.media.folders import Report
from tokenizer.sources.items import Item


@dataclasses.dataclass(frozen=True)
class RemoteFolder:
    """The files of a remote folder and its subfolders that have one of the extensions."""

    url: str
    flag_name: str
    extensions: Sequence[str]
    columns: tuple[str, ...] = ("",)

    @property
    def flag(self) -> str:
        """`--input_dir=URL`."""
        return f"--{self.flag_name}={self.url}"

    def items(self, ignored: collections.Counter, report: Report) -> Iterator[Item]:
        """Yields the files. Hidden ones are ignored.

        Raises:
          UserError: naming the flag, if the folder has no such file.
          UnavailableError: naming the flag, if it cannot be listed.
        """
        is_empty = True
        for name, info in walk(self.url, self.flag_name):
            if not name.lower().endswith(tuple(self.extensions)):
                folders.count_extension(ignored, name)
                continue
            is_empty = False
            # As in fsspec's `ukey`: the size, and the marks that the store keeps of a version.
            version = hashlib.blake2b(str(sorted(info.items(), key=str)).encode(), digest_size=8).hexdigest()
            yield Item(name, 0, f"{self.url.rstrip('/')}/{name}", "", version)
        if is_empty:
            raise UserError(f"{self.flag}: contains no file with extension {', '.join(self.extensions)}")


def walk(url: str, flag: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name within the folder, information of the file system) of each visible file, folder by folder.

    Raises:
      UserError: naming the flag, if the folder does not exist.
      UnavailableError: naming the flag, if it cannot be listed.
    """
    name = f"--{flag}={url}"
    try:
        for path, info in walk_remote(url):
            if not any(part.startswith(".") for part in path.split("/")):
                yield path, info
    except FileNotFoundError:
        raise UserError(f"{name}: no such folder") from None
    except UserError as error:
        raise type(error)(f"{name}: {str(error).removeprefix(f'{url}: ')}") from error


def read_range(path: str, start: int = 0, size: int | None = None) -> bytes:
    """Reads bytes of a local or remote file: `size` bytes from `start`, or all to its end.

    Raises:
      UserError: naming the path, if the file does not exist, cannot be read or is shorter.
      UnavailableError: if the remote file system cannot be reached.
    """
    try:
        if is_remote(path):
            system, inner = remote_file_system(path)
            with names_store_errors(path):
                data = system.cat_file(inner, start=start, end=None if size is None else start + size)
        else:
            with open(path, "rb") as file:
                file.seek(start)
                data = file.read(-1 if size is None else size)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
    if size is not None and len(data) != size:
        raise UserError(f"{path}: ends at byte {start + len(data)}; it was longer when it was listed")
    return data


class RangeFile(io.RawIOBase):
    """`size` bytes from `start` of a local or remote file, as a file of their own.

    Attributes:
      name: what errors call it. Its extension tells FFmpeg the format where the bytes do not.
    """

    def __init__(self, path: str, start: int, size: int, name: str):
        """Raises UserError naming the file, if it cannot be opened; UnavailableError, if that is a store's fault."""
        super().__init__()
        self.name, self._start, self._size, self._position = name, start, size, 0
        with self._names_errors():
            self._file = open_binary(path)

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Sets the position, which can be behind the end."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(origin + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads up to the length of the buffer. Raises UserError naming the file, if it cannot be read.

        That is an UnavailableError, if the remote file system cannot be reached.
        """
        count = max(0, min(len(buffer), self._size - self._position))
        with self._names_errors():
            self._file.seek(self._start + self._position)
            data = self._file.read(count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Closes the file."""
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    @contextlib.contextmanager
    def _names_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.name}: cannot be read ({first_line(error)})") from error
