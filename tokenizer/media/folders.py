"""Folders of files: list them, match them by stem, sort names in natural order."""

import collections
import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

from EasyLM.errors import UserError
from tokenizer.media.images import IMAGE_EXTENSIONS

# Called with the path of an unusable input and with a reason, which begins with the path.
Report = Callable[[str, str], None]

_MAX_NAMED_EXTENSIONS = 50  # further ones are counted together: log.1, log.2, ... all have different extensions


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A listed file: its name within the listed folder (`cats/0001.png`), size in bytes, and modification time."""

    name: str
    size: int
    modified_ns: int


class EmptyFolderError(UserError):
    """A folder contains no file with one of the extensions."""


def refuse(path: str, reason: str) -> NoReturn:
    """Raises the reason why a path is unusable as a UserError."""
    raise UserError(reason)


def list_images(directory: str, flag: str, report: Report = refuse) -> list[pathlib.Path]:
    """Lists the images in a folder and its subfolders, sorted by name. Hidden files are ignored.

    Reports other ignored files, by extension, on standard error.

    Raises:
      UserError: see `walk`.
    """
    ignored: collections.Counter = collections.Counter()
    names = sorted(entry.name for entry in walk(directory, flag, ignored=ignored, report=report))
    report_ignored(ignored, f"--{flag}={directory}")
    return [pathlib.Path(directory, name) for name in names]


def report_ignored(counts: Mapping[str, int], label: str) -> None:
    """Prints how many files were ignored, by extension, on standard error, if there are any."""
    if counts:
        most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        listing = ", ".join(f"{count} {extension}" for extension, count in most_first)
        print(f"{label}: ignored files with other extensions: {listing}", file=sys.stderr)


def walk(
    directory: str,
    flag: str,
    extensions: Sequence[str] = IMAGE_EXTENSIONS,
    ignored: collections.Counter | None = None,
    report: Report = refuse,
) -> Iterator[FileEntry]:
    """Yields the files with these extensions (in any case) in a folder and its subfolders, unsorted, as they are read.

    Ignores hidden files and folders. Follows links to folders, except to a folder that contains the link.

    Args:
      ignored: a counter that is updated with the other visible files, by extension.
      report: is called with each path that has such an extension but is unusable (a pipe, a socket or a device, or a
        name that is not UTF-8), and with each folder that cannot be listed.

    Raises:
      EmptyFolderError: naming the flag, if the folder has no such file.
      UserError: naming the flag, if the folder does not exist; by default for unusable paths.
    """
    if not os.path.isdir(directory):
        reason = "is a file, not a folder" if os.path.exists(directory) else "no such folder"
        raise UserError(f"--{flag}={directory}: {reason}")
    if not _is_utf8(directory):
        raise UserError(f"--{flag}={printable(directory)}: the name is not UTF-8; rename the folder")
    is_empty = True
    subfolders: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # (name, (device, inode) of each ancestor)
    while subfolders:
        folder, ancestors = subfolders.pop()
        try:
            stat = os.stat(os.path.join(directory, folder))
            # Only ancestors count as loops. Skipping every visited folder would make one of two links to the same
            # folder depend on the listing order.
            if (stat.st_dev, stat.st_ino) in ancestors:
                continue
            for entry in _visible(os.path.join(directory, folder)):
                name = f"{folder}{entry.name}"
                if _is_folder(entry):
                    subfolders.append((f"{name}/", (*ancestors, (stat.st_dev, stat.st_ino))))
                elif not entry.name.lower().endswith(tuple(extensions)):
                    if ignored is not None:
                        count_extension(ignored, entry.name)
                else:
                    is_empty = False
                    if defect := _defect(entry, name):
                        path = printable(os.path.join(directory, name))
                        report(path, f"{path}: {defect}")
                    else:
                        yield _file_entry(entry, name)
        except OSError as error:
            path = printable(os.path.join(directory, folder.rstrip("/")))
            report(path, f"{path}: cannot be listed ({error.strerror})")
    if is_empty:
        raise EmptyFolderError(f"--{flag}={directory}: contains no file with extension {', '.join(extensions)}")


def _visible(folder: str) -> Iterator[os.DirEntry]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                yield entry


def count_extension(counts: collections.Counter, name: str) -> None:
    """Counts the extension of an ignored file; beyond 50 extensions, further ones together."""
    extension = os.path.splitext(name)[1].lower().encode(errors="replace").decode() or "without extension"
    is_named = extension in counts or len(counts) < _MAX_NAMED_EXTENSIONS
    counts[extension if is_named else "with further extensions"] += 1


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether the entry is a folder or a link to one."""
    # entry.is_dir() needs no system call except for links, and raises for a link to itself.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _defect(entry: os.DirEntry, name: str) -> str:
    """Returns why an entry that is no folder cannot be an input; empty: it can.

    Reading a pipe, a socket or a device could wait forever. A link to a missing file is reported when it is read.
    """
    if defect := name_defect(name):
        return defect
    if entry.is_symlink():
        is_special = os.path.exists(entry.path) and not os.path.isfile(entry.path)
    else:
        is_special = not entry.is_file()
    return "is a pipe, a socket or a device, not a file" if is_special else ""


def name_defect(name: str) -> str:
    """Returns why a file's name cannot be written into a record; empty: it can."""
    return "" if _is_utf8(name) else f"the name {os.fsencode(name)!r} is not UTF-8; rename the file"


def _is_utf8(name: str) -> bool:
    """Whether a name that the system returned is valid UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(path: str) -> str:
    """Returns the path with the bytes that are not UTF-8 as \\xe9."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _file_entry(entry: os.DirEntry, name: str) -> FileEntry:
    try:
        stat = entry.stat()
    except OSError:  # a dangling link, or a file that was just deleted: reading it reports that
        return FileEntry(name, 0, 0)
    return FileEntry(name, stat.st_size, stat.st_mtime_ns)


def by_stem(paths: Sequence[pathlib.Path], directory: str, flag: str) -> dict[str, pathlib.Path]:
    """Maps stems to files.

    Raises:
      UserError: naming two files that share a stem.
    """
    paths_by_stem: dict[str, pathlib.Path] = {}
    for path in paths:
        stem = path.relative_to(directory).with_suffix("").as_posix()
        if stem in paths_by_stem:
            names = f"{paths_by_stem[stem].name} and {path.name}"
            raise UserError(f"--{flag}={directory}: {names} share the stem {stem!r}")
        paths_by_stem[stem] = path
    return paths_by_stem


def plain_path(path: str) -> str:
    """Returns a path in a folder without empty parts and parts that are a dot: `./a//b` is `a/b`."""
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def natural_key(name: str) -> str:
    """Returns a sort key for natural order. Different names have different keys."""
    return re.sub(r"[0-9]+", lambda digits: digits[0].zfill(20), name) + "\0" + name
