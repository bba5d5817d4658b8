"""What a source lists: items."""

import collections
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from tokenizer.media.folders import Report


class Item(NamedTuple):
    """A listed image or video.

    Attributes:
      name: its name as a file in a folder (`cats/0001.png`). Order and matching depend on it alone.
      column: its column in its source.
      address: what messages and records call it.
      location: where it is in its container; empty for a file.
      version: changes when its bytes may have changed.
    """

    name: str
    column: int
    address: str
    location: str
    version: str


class Source(Protocol):
    """A listing of items. It reads names and sizes, no images.

    Attributes:
      flag: the flag and its value, for messages: `--input_dir=DIR`.
      columns: the label of each column; an empty label for a source of one column without a name.
    """

    @property
    def flag(self) -> str:
        """`--input_dir=DIR`."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The label of each column."""
        ...

    def items(self, ignored: collections.Counter, report: Report) -> Iterator[Item]:
        """Yields the items in any order, as they are listed.

        Args:
          ignored: a counter that is updated with other visible files, by extension.
          report: called with the path and the reason of each unusable file or member.

        Raises:
          UserError: naming the flag, if nothing can be listed.
        """
        ...


def column_label(source: Source, column: int) -> str:
    """Returns what messages call a column of a source: `--input_dir=a.tar (jpg)`."""
    label = source.columns[column]
    return f"{source.flag} ({label})" if label else source.flag
