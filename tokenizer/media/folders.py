"""Folders of files: list them, match them by stem, sort names in natural order."""

import collections
import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

from EasyLM.errors import UserError
from tokenizer.media.images import IMAGE_EXTENSIONS

_MAX_NAMED_EXTENSIONS = 50  # further ones are counted together: log.1, log.2, ... all have different extensions


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A listed file: its name within the listed folder (`cats/0001.png`), size in bytes, and modification time."""

    name: str
    size: int
    modified_ns: int


def list_images(directory: str, flag: str) -> list[pathlib.Path]:
    """Lists the images in a folder and its subfolders, sorted by name. Hidden files are ignored.

    Reports other ignored files, by extension, on standard error.

    Raises:
      UserError: naming the flag, if the folder does not exist or has no image.
    """
    ignored: collections.Counter = collections.Counter()
    names = sorted(entry.name for entry in walk(directory, flag, ignored=ignored))
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
) -> Iterator[FileEntry]:
    """Yields the files with these extensions (in any case) in a folder and its subfolders, unsorted, as they are read.

    Ignores hidden files and folders. Follows links to folders, except to a folder that contains the link.

    Args:
      ignored: a counter that is updated with the other visible files, by extension.

    Raises:
      UserError: naming the flag, if the folder does not exist, has no such file, or a name is not UTF-8.
    """
    if not os.path.isdir(directory):
        raise UserError(f"--{flag}={directory}: no such folder")
    is_empty = True
    subfolders: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # (name, (device, inode) of each ancestor)
    while subfolders:
        folder, ancestors = subfolders.pop()
        stat = os.stat(os.path.join(directory, folder))
        # Only ancestors count as loops. Skipping every visited folder would make one of two links to the same folder
        # depend on the listing order.
        if (stat.st_dev, stat.st_ino) in ancestors:
            continue
        ancestors += ((stat.st_dev, stat.st_ino),)
        with os.scandir(os.path.join(directory, folder)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                # entry.is_dir() needs no system call except for links, and raises for a link to itself.
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    subfolders.append((f"{folder}{entry.name}/", ancestors))
                elif entry.name.lower().endswith(tuple(extensions)) and not _is_special(entry):
                    is_empty = False
                    yield _file_entry(entry, folder, directory, flag)
                elif ignored is not None:
                    _count_extension(ignored, entry.name)
    if is_empty:
        raise UserError(f"--{flag}={directory}: contains no file with extension {', '.join(extensions)}")


def _count_extension(counts: collections.Counter, name: str) -> None:
    extension = os.path.splitext(name)[1].lower().encode(errors="replace").decode() or "without extension"
    is_named = extension in counts or len(counts) < _MAX_NAMED_EXTENSIONS
    counts[extension if is_named else "with further extensions"] += 1


def _is_special(entry: os.DirEntry) -> bool:
    """Whether an entry that is no folder is a pipe, a socket or a device: reading it could wait forever.

    A link to a missing file is not special; it is reported when it is read.
    """
    if entry.is_symlink():
        return os.path.exists(entry.path) and not os.path.isfile(entry.path)
    return not entry.is_file()


def _file_entry(entry: os.DirEntry, folder: str, directory: str, flag: str) -> FileEntry:
    name = f"{folder}{entry.name}"
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"--{flag}={directory}: the name {os.fsencode(name)!r} is not UTF-8; rename the file") from None
    try:
        stat = entry.stat()
    except OSError:  # a dangling link: reading the file reports it
        stat = entry.stat(follow_symlinks=False)
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


def natural_key(name: str) -> str:
    """Returns a sort key for natural order. Different names have different keys."""
    return re.sub(r"[0-9]+", lambda digits: digits[0].zfill(20), name) + "\0" + name
