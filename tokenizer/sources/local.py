"""Folders of files on this machine."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from tokenizer.media import folders
from tokenizer.media.folders import Report
from tokenizer.sources.items import Item, Source


@dataclasses.dataclass(frozen=True)
class LocalFolder:
    """The files of a folder and its subfolders that have one of the extensions."""

    directory: str
    flag_name: str
    extensions: Sequence[str]
    columns: tuple[str, ...] = ("",)

    @property
    def flag(self) -> str:
        """`--input_dir=DIR`."""
        return f"--{self.flag_name}={self.directory}"

    def items(self, ignored: collections.Counter, report: Report) -> Iterator[Item]:
        """Yields the files; see `folders.walk`."""
        root = pathlib.Path(self.directory)
        for entry in folders.walk(self.directory, self.flag_name, self.extensions, ignored, report):
            yield Item(entry.name, 0, f"{root}/{entry.name}", "", f"{entry.size} {entry.modified_ns}")


@dataclasses.dataclass(frozen=True)
class Subfolders:
    """The items of a source whose parent folder has one of the names. Each name is a column."""

    source: Source
    columns: tuple[str, ...]

    @property
    def flag(self) -> str:
        """`--input_dir=DIR`."""
        return self.source.flag

    def items(self, ignored: collections.Counter, report: Report) -> Iterator[Item]:
        """Yields the items that are in such a folder."""
        for item in self.source.items(ignored, report):
            parent = item.name.rpartition("/")[0].rpartition("/")[2]
            if parent in self.columns:
                yield item._replace(column=self.columns.index(parent))
