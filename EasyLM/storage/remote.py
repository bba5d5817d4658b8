"""Remote file systems of fsspec: gs://, s3://, hf://, ... Their errors, copies of files, and complete listings."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from EasyLM.errors import UnavailableError, UserError, first_line, prefix_errors
from EasyLM.protocols import check_protocol

_WEB = ("http://", "https://")


def is_remote(path: str) -> bool:
    """Whether fsspec opens the path (gs://, s3://, hf://, ...)."""
    return "://" in path


def remote_file_system(path: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a remote path, and the path in it.

    Raises:
      UnavailableError: if the protocol is unknown, its package is not installed, or the system cannot be reached.
    """
    import fsspec  # here, because local work does not need it: it takes a quarter of a worker's start

    with prefix_errors(path):
        check_protocol(path.partition("://")[0].rpartition("::")[2])
    try:
        return fsspec.url_to_fs(path)
    except Exception as error:  # each package has its own errors of credentials and connections
        raise UnavailableError(f"{path}: not reachable ({first_line(error)})") from error


@contextlib.contextmanager
def names_store_errors(path: str) -> Iterator[None]:
    """Converts the errors of a remote file system. Lets FileNotFoundError and all errors of a local path through.

    Raises:
      UnavailableError: naming the path, for every error but that of a missing file: connection, permission, time-out.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each package has its own errors of credentials and connections
        if not is_remote(path) or _is_missing_file(path, error):
            raise
        raise UnavailableError(f"{path}: not reachable ({first_line(error)})") from error


def _is_missing_file(path: str, error: Exception) -> bool:
    if not isinstance(error, FileNotFoundError):
        return False
    # The http file system of fsspec calls a file missing after any error, which is the cause.
    is_http, cause = path.startswith(_WEB), error.__cause__
    return not is_http or cause is None or getattr(cause, "status", None) in (404, 410)


def takes_files(url: str) -> bool:
    """Whether derived files may be put beside a remote file. On the Hub each one is a commit; the web takes none."""
    return is_remote(url) and not url.startswith((*_WEB, "hf://")) and "::" not in url


def download(url: str, path: str) -> None:
    """Copies a remote file to a local one.

    Raises:
      FileNotFoundError: if it does not exist.
      UnavailableError: naming the URL, after any other error.
    """
    system, inner = remote_file_system(url)
    with names_store_errors(url):
        system.get_file(inner, path)


def upload(path: str, url: str) -> None:
    """Copies a local file to a remote one.

    Raises:
      UnavailableError: naming the URL, if it cannot be written.
    """
    system, inner = remote_file_system(url)
    with names_store_errors(url):
        system.put_file(path, inner)


def is_remote_folder(url: str) -> bool:
    """Whether a remote path is a folder.

    Raises:
      UnavailableError: if the file system cannot be reached.
    """
    system, inner = remote_file_system(url)
    with contextlib.suppress(FileNotFoundError), names_store_errors(url):  # not `isdir`: any error is "no" to it
        if url.startswith(_WEB):  # of which all paths are files; a folder is a page with links
            return bool(system.ls(inner))
        return system.info(inner)["type"] == "directory"
    return False


def walk_remote(url: str, most_depth: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (path in the folder, information of the file system) of each file, folder by folder.

    Args:
      most_depth: the most parts of a path; None: any number.

    Raises:
      FileNotFoundError: if the folder does not exist.
      UnavailableError: naming the URL, if it or a subfolder cannot be listed.
    """
    system, root = remote_file_system(url)
    waiting = [(root.rstrip("/"), "", 1)]
    while waiting:  # not `system.walk` or `system.find`, which leave out subfolders that they cannot list
        folder, prefix, depth = waiting.pop()
        try:
            with names_store_errors(url):
                entries = system.ls(folder, detail=True)
        except FileNotFoundError as error:
            if prefix:
                raise UnavailableError(f"{url}: {prefix} was deleted while it was listed") from error
            raise
        for info in entries:
            path = info["name"].rstrip("/")
            name = path.rpartition("/")[2]
            if path == folder or name in (".", ".."):  # some stores list the folder itself
                continue
            if info["type"] != "directory":
                yield prefix + name, info
            elif depth != most_depth:
                waiting.append((path, f"{prefix}{name}/", depth + 1))


def remote_glob(pattern: str) -> list[str]:
    """Returns the URLs of the files that match a remote pattern. Only `**` stands for several folders.

    Raises:
      UserError: if `**` is a part of a name.
      UnavailableError: naming the folder, if it cannot be listed.
    """
    from fsspec.utils import glob_translate

    system, _ = remote_file_system(pattern)
    special = re.compile(r"[*?\[]").search(pattern)
    root = pattern[: pattern.rindex("/", 0, special.start() if special else None) + 1]
    inside = pattern.removeprefix(root)
    try:
        matches = re.compile(glob_translate(inside)).match
    except ValueError as error:
        raise UserError(f"{pattern}: {error}") from None
    with contextlib.suppress(FileNotFoundError):
        files = walk_remote(root, None if "**" in inside else inside.count("/") + 1)
        return sorted(system.unstrip_protocol(info["name"]) for name, info in files if matches(name))
    return []
