"""The images of a source, in an order in which they can be read at speed.

The listing is a temporary SQLite database on disk (in $TMPDIR), as that of a build: memory does not grow with it.
"""

import collections
import dataclasses
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

from EasyLM.skipped_inputs import SkippedInputs
from EasyLM.storage import json_digest
from tokenizer.builders.file_index import reports_full_index
from tokenizer.sources import container_files
from tokenizer.sources.items import Item, Source
from tokenizer.sources.keep_list import NamesDigest, name_in_list
from tokenizer.sources.reading import container_of
from tokenizer.sources.tars import EmptySourceError, Tars

_SCHEMA = """
PRAGMA cache_size = -65536; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
CREATE TABLE image (number INTEGER PRIMARY KEY, name TEXT, address TEXT, location TEXT, stem TEXT, sample TEXT);
CREATE TABLE sidecar (stem TEXT PRIMARY KEY, address TEXT, location TEXT) WITHOUT ROWID;
"""


class Entry(NamedTuple):
    """A listed image.

    Attributes:
      name: as keep lists have it.
      address: see `Item`.
      location: see `Item`.
      sidecar: the address of the JSON file with its scores; empty: there is none.
      sidecar_location: its location.
    """

    name: str
    address: str
    location: str
    sidecar: str = ""
    sidecar_location: str = ""


class Listing:
    """The images of a part of a source: members of containers in their order there, files of a folder by name.

    A part of tars has some of the tars, and lists no others. A part of any other source has a range of its images.

    Attributes:
      source: digest of what all parts of the source share.
      digest: changes when an image or a sidecar that was listed is added, removed or written.
      names: the digest of the names of the images that were listed.
      by_files: whether other images than those of the part are not listed.
      ignored: number of files with other extensions, by extension.
      numbers: of the images of the part.
    """

    def __init__(self, source: Source, sidecars: Source | None, skipped: SkippedInputs, part: int, parts: int):
        """Lists the source. Adds to `skipped` what it reports as unusable.

        Args:
          sidecars: the JSON files of the same place.
          part: the number of the part, from 0.
          parts: their number.

        Raises:
          UserError: naming the flag, if there is no image, or no sidecar; if the listing does not fit on the disk.
        """
        self.names, self.by_files = NamesDigest(), isinstance(source, Tars)
        container_names = container_files.names_of(source)
        if isinstance(source, Tars):
            self.source = json_digest([source.keys, list(container_names.values())])
        sources = [_part(one, part, parts) for one in (source, sidecars)]
        ignored: collections.Counter = collections.Counter()
        self._sum, self._order = 0, "number"
        with reports_full_index():
            self._database = sqlite3.connect("")
            self._database.executescript(_SCHEMA)
            for item in _items(sources[0], ignored, skipped, parts):
                file, name = name_in_list(item, container_names)
                self.names.add(file, name)
                row = (name, item.address, item.location, *_stem_and_sample(item))
                self._database.execute("INSERT INTO image VALUES (NULL, ?, ?, ?, ?, ?)", row)
                self._add_version(f"{item.version} {name}")
                self._order = "number" if item.location else "name"
            for item in _items(sources[1], collections.Counter(), skipped, parts):
                self._add_sidecar(item, skipped)
        if sidecars:
            del ignored[".json"]
        self.ignored = dict(ignored)
        self.digest = f"{self._sum % 2**128:032x}"
        self.numbers = range(len(self.names))
        if not self.by_files:
            self.source = json_digest(self.names.files())
            self.numbers = self.numbers[len(self.names) * part // parts : len(self.names) * (part + 1) // parts]

    def _add_sidecar(self, item: Item, skipped: SkippedInputs) -> None:
        stem, _ = _stem_and_sample(item)
        sidecar = (stem, item.address, item.location)
        if not self._database.execute("INSERT OR IGNORE INTO sidecar VALUES (?, ?, ?)", sidecar).rowcount:
            ((other,),) = self._database.execute("SELECT address FROM sidecar WHERE stem = ?", (stem,))
            skipped.add(item.address, f"{item.address} and {other} have the same stem: which has the scores is unknown")
        self._add_version(f"{item.version} {item.name}")

    def _add_version(self, line: str) -> None:
        # A sum does not depend on the order in which a file system lists the files of a folder.
        self._sum += int.from_bytes(hashlib.blake2b(line.encode(), digest_size=16).digest())

    def entries(self, numbers: range) -> Iterator[Entry]:
        """Yields the images of a range of numbers (step 1)."""
        sidecar = (f"coalesce(own.{column}, shared.{column}, '')" for column in ("address", "location"))
        query = (
            f"SELECT name, image.address, image.location, {', '.join(sidecar)} FROM image "
            "LEFT JOIN sidecar AS own ON own.stem = image.stem LEFT JOIN sidecar AS shared ON shared.stem = sample "
            f"ORDER BY {self._order} LIMIT ? OFFSET ?"
        )
        with reports_full_index():  # it sorts on the disk
            yield from map(Entry._make, self._database.execute(query, (len(numbers), numbers.start)))


def _part(source: Source | None, part: int, parts: int) -> Source | None:
    """Returns the tars of a part; None: it has none. Any other source is not divided."""
    if not isinstance(source, Tars):
        return source
    paths = source.paths[len(source.paths) * part // parts : len(source.paths) * (part + 1) // parts]
    return dataclasses.replace(source, paths=paths) if paths else None


def _items(source: Source | None, ignored: collections.Counter, skipped: SkippedInputs, parts: int) -> Iterator[Item]:
    try:
        yield from source.items(ignored, skipped.add) if source else ()
    except EmptySourceError:
        if parts == 1:
            raise  # in a part, each of the tars has been reported


def _stem_and_sample(item: Item) -> tuple[str, str]:
    """Returns the stems of sidecars that belong to an item: its own stem, and in a tar also its sample's.

    `a.seg.jpg` has `a.seg.json` or `a.json`; in a folder only `a.seg.json`.
    """
    if not item.location:
        return os.path.splitext(item.name)[0], ""
    container = container_of(item.address)
    stem = os.path.splitext(item.address[len(container) + 1 :])[0]
    folder, slash, file = stem.rpartition("/")
    return f"{container}!{stem}", f"{container}!{folder}{slash}{file.partition('.')[0]}"
