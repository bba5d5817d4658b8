"""Folders to inputs: which files stand together, and in which order.

The list lies in a temporary database on disk (SQLite's, in $TMPDIR), so memory does not grow with the number of files.
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
from tokenizer.builders.image_ref import Picture
from tokenizer.media import folders

CO3D = ("images", "masks", "depths", "depth_masks")  # folders of a sequence, CATEGORY/SEQUENCE/images/frame000001.jpg
_CACHE_KIB = 64 << 10


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the pictures of every row: where its files are, and how a message names that place."""

    directory: str
    flag: str
    folder: str = ""  # if set, only files that lie in folders of this name

    def __str__(self) -> str:
        return f"--{self.flag}={self.directory}" + f" ({self.folder}/)" * bool(self.folder)


# A layout takes a file's name within its folder, and says the item it belongs to, and its place in the item.
Layout = Callable[[str], tuple[str, str]]


def by_name(name: str) -> tuple[str, str]:
    """Each file an item."""
    return name, ""


def by_stem(name: str) -> tuple[str, str]:
    """Files of one stem, the name without its extension, are the row of an item."""
    return _stem(name), ""


def clips(name: str) -> tuple[str, str]:
    """The files of a folder are the rows of an item, numbers in names counting as numbers: frame_2 before frame_10."""
    folder, _, file = name.rpartition("/")
    return folder, folders.natural_key(_stem(file))


def classes(name: str) -> tuple[str, str]:
    """The files below each folder of the first level are the rows of an item."""
    item, slash, _ = name.partition("/")
    if not slash:
        raise UserError("lies in no folder of a class")
    return item, name


def co3d(name: str) -> tuple[str, str]:
    """The frames of CATEGORY/SEQUENCE are the rows of an item; frame000001.jpg.geometric.png is of frame000001."""
    sequence, _, file = name.rpartition("/")
    return sequence.rpartition("/")[0], folders.natural_key(file.split(".")[0])


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


class Inputs:
    """Items, numbered by name order, each of one or more rows; a row has a picture of every side.

    Attributes:
      digest: changes when a file is added, removed, or written to.
      others: files that were passed over, by extension, as these are read as no picture (or video).
    """

    def __init__(self, layout: Layout, sides: Sequence[Side], extensions: Sequence[str], problems):
        """Lists the files. What stands in no row is added to `problems`.

        Raises:
          UserError: naming the flag, if there is no such folder, no such file in it, or two files claim one place; if
            the disk has no room for the list.
        """
        try:
            self.digest, self._length = self._list(layout, sides, extensions, problems)
        except sqlite3.OperationalError as error:
            folder = next(filter(None, map(os.environ.get, ("SQLITE_TMPDIR", "TMPDIR"))), "/var/tmp")
            raise UserError(
                f"the list of files cannot be kept in {folder} ({error}): set $TMPDIR to a folder with more room"
            ) from error

    def _list(self, layout: Layout, sides: Sequence[Side], extensions: Sequence[str], problems) -> tuple[str, int]:
        """Fills the database; returns the digest, and how many items there are."""
        self._database = sqlite3.connect("")
        self._database.executescript(
            f"""
            PRAGMA cache_size = -{_CACHE_KIB}; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE file (item TEXT, place TEXT, side INT, path TEXT, PRIMARY KEY (item, place, side))
                WITHOUT ROWID;
            CREATE TABLE row (number INTEGER PRIMARY KEY, paths TEXT);
            CREATE TABLE item (number INTEGER PRIMARY KEY, first INT, size INT);
            """
        )
        total, of_folder = 0, {}
        for number, side in enumerate(sides):
            of_folder[side.directory] = collections.Counter()  # one, as of co3d all sides lie in one folder
            for entry in self._add(number, side, layout, extensions, of_folder[side.directory], problems):
                mark = f"{number} {entry.size} {entry.modified_ns} {entry.name}".encode()
                # A sum, as the file system lists them in any order.
                total += int.from_bytes(hashlib.blake2b(mark, digest_size=16).digest())
        self.others = dict(sum(of_folder.values(), collections.Counter()))
        return f"{total % 2**128:032x}", self._join(sides, problems)

    def _add(
        self, number: int, side: Side, layout: Layout, extensions, others, problems
    ) -> Iterator[folders.FileEntry]:
        root = pathlib.Path(side.directory)
        for entry in folders.walk(side.directory, side.flag, extensions, others):
            if side.folder and side.folder != os.path.basename(os.path.dirname(entry.name)):
                continue
            yield entry
            path = f"{root}/{entry.name}"
            try:
                item, place = layout(entry.name)
            except UserError as error:
                problems.add(path, f"{path} {error}")
                continue
            try:
                self._database.execute("INSERT INTO file VALUES (?, ?, ?, ?)", (item, place, number, path))
            except sqlite3.IntegrityError:
                query = "SELECT path FROM file WHERE (item, place, side) = (?, ?, ?)"
                (other,) = self._database.execute(query, (item, place, number)).fetchone()
                one, two = (os.path.basename(p) for p in sorted([other, path]))
                raise UserError(f"{side}: {one} and {two} share the stem {_stem(entry.name)!r}") from None

    def _join(self, sides: Sequence[Side], problems) -> int:
        """Files to rows and items; returns how many items there are."""
        files = self._database.execute("SELECT item, place, side, path FROM file ORDER BY item, place, side")
        items = rows = 0
        for _, of_item in itertools.groupby(files, key=lambda file: file[0]):
            first = rows
            for _, of_row in itertools.groupby(of_item, key=lambda file: file[1]):
                paths = {side: path for _, _, side, path in of_row}
                if len(paths) == len(sides):
                    text = orjson.dumps(list(paths.values()))
                    self._database.execute("INSERT INTO row VALUES (?, ?)", (rows, text))
                    rows += 1
                else:
                    missing = next(side for number, side in enumerate(sides) if number not in paths)
                    path = min(paths.items())[1]
                    problems.add(path, f"{path} has no partner in {missing}")
            if rows > first:
                self._database.execute("INSERT INTO item VALUES (?, ?, ?)", (items, first, rows - first))
                items += 1
        self._database.execute("DROP TABLE file")
        return items

    def __len__(self) -> int:
        return self._length

    @property
    def sizes(self) -> np.ndarray:
        """Rows of every item, int64 [items]."""
        query = self._database.execute("SELECT size FROM item ORDER BY number")
        return np.fromiter((size for (size,) in query), np.int64, self._length)

    def rows(self, item: int) -> list[tuple[Picture, ...]]:
        """All rows of an item."""
        first, size = self._place(item)
        query = "SELECT paths FROM row WHERE number >= ? AND number < ? ORDER BY number"
        return [_row(paths) for (paths,) in self._database.execute(query, (first, first + size))]

    def row(self, item: int, place: int) -> tuple[Picture, ...]:
        """One row of an item."""
        first, size = self._place(item)
        assert 0 <= place < size
        return _row(*self._database.execute("SELECT paths FROM row WHERE number = ?", (first + place,)).fetchone())

    def _place(self, item: int) -> tuple[int, int]:
        return self._database.execute("SELECT first, size FROM item WHERE number = ?", (item,)).fetchone()


def _row(paths: bytes) -> tuple[Picture, ...]:
    return tuple(Picture(path) for path in orjson.loads(paths))
