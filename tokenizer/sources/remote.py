"""Files of remote file systems: listing folders, reading ranges. fsspec reads them."""

import collections
import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from EasyLM.errors import UserError
from EasyLM.storage import is_remote, remote_file_system
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
          UserError: naming the flag, if the folder cannot be listed or has no such file.
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
      UserError: naming the flag, if the folder does not exist or cannot be listed.
    """
    with _names_flag(f"--{flag}={url}"):
        system, root = remote_file_system(url)
        if not system.isdir(root):
            raise UserError("no such folder")
        root = system._strip_protocol(root).rstrip("/")
        waiting = [root]
        while waiting:  # not `system.walk`, which leaves out subfolders that it cannot list
            folder = waiting.pop()
            for info in system.ls(folder, detail=True):
                path = info["name"].rstrip("/")
                if path == folder or path.rpartition("/")[2].startswith("."):  # some stores list the folder itself
                    continue
                if info["type"] == "directory":
                    waiting.append(path)
                else:
                    yield path.removeprefix(root).lstrip("/"), info


@contextlib.contextmanager
def _names_flag(flag: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {str(error).removeprefix(flag.partition('=')[2] + ': ')}") from None
    except Exception as error:  # each package has its own errors of credentials and connections
        raise UserError(f"{flag}: not reachable ({_first_line(error)})") from error


def read_range(path: str, start: int = 0, size: int | None = None) -> bytes:
    """Reads bytes of a local or remote file: `size` bytes from `start`, or all to its end.

    Raises:
      UserError: naming the path, if the file does not exist, cannot be read or is shorter.
    """
    try:
        if is_remote(path):
            system, inner = remote_file_system(path)
            data = system.cat_file(inner, start=start, end=None if size is None else start + size)
        else:
            with open(path, "rb") as file:
                file.seek(start)
                data = file.read(-1 if size is None else size)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # each package has its own errors of credentials and connections
        raise UserError(f"{path}: cannot be read ({_first_line(error)})") from error
    if size is not None and len(data) != size:
        raise UserError(f"{path}: ends at byte {start + len(data)}; it was longer when it was listed")
    return data


def is_folder(path: str) -> bool:
    """Whether a local or remote path is a folder.

    Raises:
      UserError: if the remote file system cannot be reached.
    """
    if not is_remote(path):
        return os.path.isdir(path)
    system, inner = remote_file_system(path)
    try:
        return bool(system.isdir(inner))
    except Exception as error:  # each package has its own errors of credentials and connections
        raise UserError(f"{path}: not reachable ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
