"""An index of the input files, grouped into rows and items.

The index is a temporary SQLite database on disk (in $TMPDIR): memory does not grow with the number of files.
"""

import collections
import dataclasses
import hashlib
import itertools
import os
import pathlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import orjson

from EasyLM.errors import UserError
from EasyLM.skipped_inputs import SkippedInputs
from tokenizer.builders.image_ref import ImageRef
from tokenizer.media import folders

# Folders of a CO3D sequence: CATEGORY/SEQUENCE/images/frame000001.jpg.
CO3D_SUBFOLDERS = ("images", "masks", "depths", "depth_masks")
_CACHE_KIB = 64 << 10
_SCHEMA = f"""
PRAGMA cache_size = -{_CACHE_KIB}; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
CREATE TABLE file (item TEXT, sort_key TEXT, folder INT, path TEXT, PRIMARY KEY (item, sort_key, folder, path))
    WITHOUT ROWID;
CREATE TABLE row (number INTEGER PRIMARY KEY, paths TEXT);
CREATE TABLE item (number INTEGER PRIMARY KEY, first INT, size INT);
"""


@dataclasses.dataclass(frozen=True)
class InputFolder:
    """An input folder, which contains one image of every row.

    Attributes:
      directory: its path; subfolders are included.
      flag: the flag that names it, for errors.
      subfolder: if set, only files whose parent folder has this name count.
    """

    directory: str
    flag: str
    subfolder: str = ""

    def __str__(self) -> str:
        return f"--{self.flag}={self.directory}" + f" ({self.subfolder}/)" * bool(self.subfolder)


# A layout maps a file's name within its folder to its item, and to its row's sort key within the item.
Layout = Callable[[str], tuple[str, str]]


def by_name(name: str) -> tuple[str, str]:
    """Makes each file an item."""
    return name, ""


def by_stem(name: str) -> tuple[str, str]:
    """Makes the files that share a stem an item of one row."""
    return _stem(name), ""


def by_clip(name: str) -> tuple[str, str]:
    """Makes each folder an item, whose rows are its files in natural order."""
    folder, _, file = name.rpartition("/")
    return folder, folders.natural_key(_stem(file))


def by_class(name: str) -> tuple[str, str]:
    """Makes each folder of the first level an item, whose rows are the files below it."""
    item, slash, _ = name.partition("/")
    if not slash:
        raise UserError("is not in the folder of a class")
    return item, name


def by_co3d_sequence(name: str) -> tuple[str, str]:
    """Makes each CATEGORY/SEQUENCE an item, whose rows are its frames: frame000001.jpg.geometric.png is frame000001."""
    sequence, _, file = name.rpartition("/")
    return sequence.rpartition("/")[0], folders.natural_key(file.split(".")[0])


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


class FileIndex:
    """Items in the order of their names. An item has one or more rows, a row one image from each input folder.

    Attributes:
      digest: changes when a file is added, removed or written.
      ignored: number of files with other extensions, by extension.
    """

    def __init__(
        self, layout: Layout, inputs: Sequence[InputFolder], extensions: Sequence[str], skipped: SkippedInputs
    ):
        """Lists the files.

        Adds to `skipped`: files without a partner in another folder, two files of one folder that belong to the same
        row, and the unusable paths of `folders.walk`.

        Raises:
          UserError: naming the flag, if a folder does not exist or has no such file; if the index does not fit on the
            disk.
        """
        try:
            self.digest, self._length = self._build(layout, inputs, extensions, skipped)
        except sqlite3.OperationalError as error:
            folder = next(filter(None, map(os.environ.get, ("SQLITE_TMPDIR", "TMPDIR"))), "/var/tmp")
            raise UserError(
                f"the index of the files does not fit in {folder} ({error}): set $TMPDIR to a folder with more room"
            ) from error

    def _build(
        self, layout: Layout, inputs: Sequence[InputFolder], extensions: Sequence[str], skipped: SkippedInputs
    ) -> tuple[str, int]:
        """Fills the database; returns the digest and the number of items."""
        self._database = sqlite3.connect("")
        self._database.executescript(_SCHEMA)
        total = 0
        ignored: dict[str, collections.Counter] = {}
        for number, folder in enumerate(inputs):
            # Several inputs can be subfolders of one directory, as in CO3D. Its ignored files count once.
            ignored[folder.directory] = collections.Counter()
            for entry in self._add_files(number, folder, layout, extensions, ignored[folder.directory], skipped):
                line = f"{number} {entry.size} {entry.modified_ns} {entry.name}".encode()
                # A sum does not depend on the order in which the file system lists the files.
                total += int.from_bytes(hashlib.blake2b(line, digest_size=16).digest())
        self.ignored = dict(sum(ignored.values(), collections.Counter()))
        return f"{total % 2**128:032x}", self._join(inputs, skipped)

    def _add_files(
        self,
        number: int,
        folder: InputFolder,
        layout: Layout,
        extensions: Sequence[str],
        ignored: collections.Counter,
        skipped: SkippedInputs,
    ) -> Iterator[folders.FileEntry]:
        """Inserts the files of one input folder into the database, and yields them."""
        root = pathlib.Path(folder.directory)
        for entry in folders.walk(folder.directory, folder.flag, extensions, ignored, skipped.add):
            if folder.subfolder and folder.subfolder != os.path.basename(os.path.dirname(entry.name)):
                continue
            yield entry
            path = f"{root}/{entry.name}"
            try:
                item, sort_key = layout(entry.name)
            except UserError as error:
                skipped.add(path, f"{path} {error}")
                continue
            self._database.execute("INSERT INTO file VALUES (?, ?, ?, ?)", (item, sort_key, number, path))

    def _join(self, inputs: Sequence[InputFolder], skipped: SkippedInputs) -> int:
        """Joins files into rows and items; returns the number of items."""
        columns = "item, sort_key, folder, path"
        files = self._database.execute(f"SELECT {columns} FROM file ORDER BY {columns}")
        items = rows = 0
        for _, item_files in itertools.groupby(files, key=lambda file: file[0]):
            first = rows
            for _, row_files in itertools.groupby(item_files, key=lambda file: file[1]):
                paths: dict[int, list[str]] = {}
                for _, _, folder, path in row_files:
                    paths.setdefault(folder, []).append(path)
                if defect := _defect(paths, inputs):
                    skipped.add(*defect)
                else:
                    row = orjson.dumps([path for (path,) in paths.values()])
                    self._database.execute("INSERT INTO row VALUES (?, ?)", (rows, row))
                    rows += 1
            if rows > first:
                self._database.execute("INSERT INTO item VALUES (?, ?, ?)", (items, first, rows - first))
                items += 1
        self._database.execute("DROP TABLE file")
        return items

    def __len__(self) -> int:
        return self._length

    def sizes(self) -> np.ndarray:
        """Reads the number of rows of every item from the disk: int64 [items]."""
        query = self._database.execute("SELECT size FROM item ORDER BY number")
        return np.fromiter((size for (size,) in query), np.int64, self._length)

    def rows(self, item: int) -> list[tuple[ImageRef, ...]]:
        """Returns all rows of an item."""
        first, size = self._row_range(item)
        query = "SELECT paths FROM row WHERE number >= ? AND number < ? ORDER BY number"
        return [_to_row(paths) for (paths,) in self._database.execute(query, (first, first + size))]

    def row(self, item: int, number: int) -> tuple[ImageRef, ...]:
        """Returns one row of an item."""
        first, size = self._row_range(item)
        assert 0 <= number < size
        return _to_row(*self._database.execute("SELECT paths FROM row WHERE number = ?", (first + number,)).fetchone())

    def _row_range(self, item: int) -> tuple[int, int]:
        """Returns the first row of an item and the number of its rows."""
        return self._database.execute("SELECT first, size FROM item WHERE number = ?", (item,)).fetchone()


def _defect(paths: dict[int, list[str]], inputs: Sequence[InputFolder]) -> tuple[str, str] | None:
    """Returns the path and the reason if the files of each folder, in order, do not make a row."""
    for files in paths.values():
        if len(files) > 1:  # which of them is meant is unknown
            names = " and ".join(map(os.path.basename, files[1:]))
            return files[0], f"{files[0]} and {names} share the stem {os.path.basename(_stem(files[0]))!r}"
    for number, folder in enumerate(inputs):
        if number not in paths:
            path = next(iter(paths.values()))[0]
            return path, f"{path} has no partner in {folder}"
    return None


def _to_row(paths: bytes) -> tuple[ImageRef, ...]:
    return tuple(ImageRef(path) for path in orjson.loads(paths))
