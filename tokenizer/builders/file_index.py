"""An index of the inputs, grouped into rows and items.

The index is a temporary SQLite database on disk (in $TMPDIR): memory does not grow with the number of files.
"""

import collections
import contextlib
import hashlib
import itertools
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import orjson

from EasyLM.errors import UnavailableError, UserError
from EasyLM.skipped_inputs import SkippedInputs
from tokenizer.builders.image_ref import ImageRef
from tokenizer.media import folders
from tokenizer.sources.items import Source, column_label
from tokenizer.sources.keep_list import KeptItems
from tokenizer.sources.reading import container_of

# Folders of a CO3D sequence: CATEGORY/SEQUENCE/images/frame000001.jpg.
CO3D_SUBFOLDERS = ("images", "masks", "depths", "depth_masks")
_CACHE_KIB = 64 << 10  # while the index is built
_READING_CACHE_KIB = 4 << 10  # then: a build can have the indexes of 50 data sets
_SCHEMA = f"""
PRAGMA cache_size = -{_CACHE_KIB}; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
CREATE TABLE file (item TEXT, sort_key TEXT, column INT, address TEXT, location TEXT, is_kept INT,
    PRIMARY KEY (item, sort_key, column, address, location)) WITHOUT ROWID;
CREATE TABLE row (number INTEGER PRIMARY KEY, files TEXT);
CREATE TABLE item (number INTEGER PRIMARY KEY, first INT, size INT);
"""


# A layout maps a file's name within its source to its item, and to its row's sort key within the item.
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


@contextlib.contextmanager
def reports_full_index() -> Iterator[None]:
    """Raises the errors of a temporary database that fills the disk as an UnavailableError that says where it is."""
    try:
        yield
    except sqlite3.OperationalError as error:
        folder = next(filter(None, map(os.environ.get, ("SQLITE_TMPDIR", "TMPDIR"))), "/var/tmp")
        raise UnavailableError(
            f"the index of the files does not fit in {folder} ({error}): set $TMPDIR to a folder with more room"
        ) from error


class FileIndex:
    """Items in the order of their names. An item has one or more rows, a row one image from each column of the sources.

    Attributes:
      digest: changes when a file is added, removed or written.
      ignored: number of files with other extensions, by extension.
      not_kept: number of inputs that the keep list leaves out, with their rows.
    """

    def __init__(
        self,
        layout: Layout,
        sources: Sequence[Source],
        skipped: SkippedInputs,
        kept_items: KeptItems | None = None,
    ):
        """Lists the sources.

        Adds to `skipped`: files without a partner in another column, two files of one column that belong to the same
        row, and what the sources report as unusable.

        Args:
          kept_items: which files of the first column to keep; the index has their rows only.

        Raises:
          UserError: naming the flag, if a source does not exist or is empty, or the keep list is of another source.
          UnavailableError: if a store cannot be reached, or the index does not fit on the disk.
        """
        self.not_kept = 0
        with reports_full_index():
            self.digest, self._length = self._build(layout, sources, skipped, kept_items)

    def _build(
        self, layout: Layout, sources: Sequence[Source], skipped: SkippedInputs, kept_items: KeptItems | None
    ) -> tuple[str, int]:
        """Fills the database; returns the digest and the number of items."""
        self._database = sqlite3.connect("")
        self._database.executescript(_SCHEMA)
        total = 0
        ignored: collections.Counter = collections.Counter()
        labels: list[str] = []  # of the columns of all sources
        for source in sources:
            for item in source.items(ignored, skipped.add):
                column = len(labels) + item.column
                is_kept = column > 0 or kept_items is None or kept_items.contains(item)
                line = f"{column} {item.version} {item.name}".encode()
                # A sum does not depend on the order in which the file system lists the files.
                total += int.from_bytes(hashlib.blake2b(line, digest_size=16).digest())
                try:
                    key = layout(item.name)
                except UserError as error:
                    skipped.add(item.address, f"{item.address} {error}")
                    continue
                file = (*key, column, item.address, item.location, is_kept)
                self._database.execute("INSERT INTO file VALUES (?, ?, ?, ?, ?, ?)", file)
            labels += [column_label(source, column) for column in range(len(source.columns))]
        self.ignored = dict(ignored)
        if kept_items is not None:
            total += kept_items.checked_digest()
        return f"{total % 2**128:032x}", self._join(labels, skipped)

    def _join(self, labels: Sequence[str], skipped: SkippedInputs) -> int:
        """Joins files into rows and items; returns the number of items."""
        columns = "item, sort_key, column, address, location"
        files = self._database.execute(f"SELECT {columns}, is_kept FROM file ORDER BY {columns}")
        items = rows = 0
        for _, item_files in itertools.groupby(files, key=lambda file: file[0]):
            first = rows
            for _, row_files in itertools.groupby(item_files, key=lambda file: file[1]):
                by_column: dict[int, list[tuple[str, str]]] = {}
                not_kept = 0
                for _, _, column, address, location, is_kept in row_files:
                    if is_kept:
                        by_column.setdefault(column, []).append((address, location))
                    else:
                        not_kept += 1
                if not_kept and 0 not in by_column:
                    self.not_kept += not_kept
                elif defect := _defect(by_column, labels):
                    skipped.add(*defect)
                else:
                    row = orjson.dumps([file for (file,) in by_column.values()])
                    self._database.execute("INSERT INTO row VALUES (?, ?)", (rows, row))
                    rows += 1
            if rows > first:
                self._database.execute("INSERT INTO item VALUES (?, ?, ?)", (items, first, rows - first))
                items += 1
        self._database.execute("DROP TABLE file")
        self._database.execute(f"PRAGMA cache_size = -{_READING_CACHE_KIB}")
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
        query = "SELECT files FROM row WHERE number >= ? AND number < ? ORDER BY number"
        return [_to_row(files) for (files,) in self._database.execute(query, (first, first + size))]

    def row(self, item: int, number: int) -> tuple[ImageRef, ...]:
        """Returns one row of an item."""
        first, size = self._row_range(item)
        assert 0 <= number < size
        return _to_row(*self._database.execute("SELECT files FROM row WHERE number = ?", (first + number,)).fetchone())

    def _row_range(self, item: int) -> tuple[int, int]:
        """Returns the first row of an item and the number of its rows."""
        return self._database.execute("SELECT first, size FROM item WHERE number = ?", (item,)).fetchone()


def _defect(by_column: dict[int, list[tuple[str, str]]], labels: Sequence[str]) -> tuple[str, str] | None:
    """Returns the address and the reason if the files of each column, in order, do not make a row."""
    for (address, location), *others in by_column.values():
        name = _name_in_container(address)
        same = [other for other, _ in others if location and _name_in_container(other) == name]
        if same:
            names = " and ".join(same)
            return address, f"{address} and {names} have the same name: the tars of a source are read as one folder"
        if others:  # which of them is meant is unknown
            names = " and ".join(other if location else os.path.basename(other) for other, _ in others)
            return address, f"{address} and {names} share the stem {os.path.basename(_stem(name))!r}"
    for column, label in enumerate(labels):
        if column not in by_column:
            ((address, _),) = next(iter(by_column.values()))
            return address, f"{address} has no partner in {label}"
    return None


def _name_in_container(address: str) -> str:
    """Returns the path of an item in its tar; for a file its address."""
    return address.removeprefix(f"{container_of(address)}!")


def _to_row(files: bytes) -> tuple[ImageRef, ...]:
    return tuple(ImageRef(address, location=location) for address, location in orjson.loads(files))
