"""The images of a source, in an order in which they can be read at speed.

The listing is a temporary SQLite database on disk (in $TMPDIR), as that of a build: memory does not grow with it.
"""

import collections
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

from EasyLM.skipped_inputs import SkippedInputs
from tokenizer.builders.file_index import reports_full_index
from tokenizer.sources.items import Source
from tokenizer.sources.keep_list import NamesDigest

_SCHEMA = """
PRAGMA cache_size = -65536; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
CREATE TABLE image (number INTEGER PRIMARY KEY, name TEXT, address TEXT, location TEXT, sample TEXT);
CREATE TABLE sidecar (sample TEXT PRIMARY KEY, address TEXT, location TEXT) WITHOUT ROWID;
"""


class Entry(NamedTuple):
    """A listed image.

    Attributes:
      name: see `Item`.
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
    """The images of a source: members of containers in their order there, files of a folder by name.

    Attributes:
      digest: changes when an image or a sidecar is added, removed or written.
      names: the digest of the names of the images.
      ignored: number of files with other extensions, by extension.
    """

    def __init__(self, source: Source, sidecars: Source | None, skipped: SkippedInputs):
        """Lists the source. Adds to `skipped` what it reports as unusable.

        Args:
          sidecars: the JSON files of the same place.

        Raises:
          UserError: naming the flag, if there is no image, or no sidecar; if the listing does not fit on the disk.
        """
        self.names = NamesDigest()
        ignored: collections.Counter = collections.Counter()
        self._sum, self._order = 0, "number"
        with reports_full_index():
            self._database = sqlite3.connect("")
            self._database.executescript(_SCHEMA)
            for item in source.items(ignored, skipped.add):
                self.names.add(item.name)
                row = (item.name, item.address, item.location, _sample(item.name, item.location))
                self._database.execute("INSERT INTO image VALUES (NULL, ?, ?, ?, ?)", row)
                self._add_version(f"{item.version} {item.name}")
                self._order = "number" if item.location else "name"
            for item in sidecars.items(collections.Counter(), skipped.add) if sidecars else ():
                sidecar = (_sample(item.name, item.location), item.address, item.location)
                self._database.execute("INSERT OR REPLACE INTO sidecar VALUES (?, ?, ?)", sidecar)
                self._add_version(f"{item.version} {item.name}")
        if sidecars:
            del ignored[".json"]
        self.ignored = dict(ignored)
        self.digest = f"{self._sum % 2**128:032x}"

    def _add_version(self, line: str) -> None:
        # A sum does not depend on the order in which a file system lists the files of a folder.
        self._sum += int.from_bytes(hashlib.blake2b(line.encode(), digest_size=16).digest())

    def __len__(self) -> int:
        return self.names.count

    def entries(self, numbers: range) -> Iterator[Entry]:
        """Yields the images of a range of numbers (step 1)."""
        query = (
            "SELECT name, image.address, image.location, ifnull(sidecar.address, ''), ifnull(sidecar.location, '') "
            f"FROM image LEFT JOIN sidecar USING (sample) ORDER BY {self._order} LIMIT ? OFFSET ?"
        )
        with reports_full_index():  # it sorts on the disk
            yield from map(Entry._make, self._database.execute(query, (len(numbers), numbers.start)))


def _sample(name: str, location: str) -> str:
    """Returns what the names of an image and its sidecar share. In a tar it ends at the first dot of the file."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + (file.partition(".")[0] if location else os.path.splitext(file)[0])
