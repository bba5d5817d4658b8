"""The bytes of an item, by its address and location.

Worker processes import this module, so it must not import JAX.
"""

import functools
import io
import os
import re

from EasyLM.storage import file_version, is_remote
from tokenizer.media.video_file import VideoFile, local_file
from tokenizer.sources import table_files, tars
from tokenizer.sources.remote import RangeFile, read_range

_NEAR_ROWS = 32
_MEMBER = re.compile(r"(.+?\.(?:tar|parquet|arrow))!(.+)", re.DOTALL | re.IGNORECASE)


class ItemFile(io.BytesIO):
    """The bytes of an item as an open file. As text it is the address, so that errors name it."""

    def __init__(self, data: bytes, address: str):
        super().__init__(data)
        self.address = self.name = address  # FFmpeg looks at the extension of `name`

    def __str__(self) -> str:
        return self.address

    def __repr__(self) -> str:  # in Pillow's messages
        return repr(self.address)


def is_member(address: str) -> bool:
    """Whether an address has the form of that of a member: `000.tar!cats/1.png`."""
    return bool(_MEMBER.fullmatch(address))


def are_near_rows(address: str, location: str, other_address: str, other_location: str) -> bool:
    """Whether two items are cells of a table whose rows are at most 32 apart: mostly of one row group."""
    if not (location.isdecimal() and other_location.isdecimal()):
        return False
    is_same_table = address.partition(f"!{location}.")[0] == other_address.partition(f"!{other_location}.")[0]
    return is_same_table and abs(int(location) - int(other_location)) < _NEAR_ROWS


def container_of(address: str) -> str:
    """Returns the file that holds an item: its container, or the item's own path."""
    match = None if os.path.lexists(address) else _MEMBER.fullmatch(address)
    return match[1] if match else address


def folder_of(address: str) -> str:
    """Returns the folder of an item, also within its container; the container if it has none there."""
    container = container_of(address)
    folder = os.path.dirname(address)
    return folder if len(folder) > len(container) or container == address else container


def open_item(address: str, location: str = "") -> str | ItemFile:
    """Returns the path of a local file, or the contents of any other item.

    Args:
      address: of the item.
      location: of the item; without it, a member of a tar is found by listing the tar.

    Raises:
      UserError: naming the item, if it cannot be read.
    """
    container = container_of(address)
    if container != address:
        member = address[len(container) + 1 :]
        if container.lower().endswith(".tar"):
            return ItemFile(tars.read_member(container, member, location), address)
        return ItemFile(table_files.read_cell(container, member), address)
    return ItemFile(read_range(address), address) if is_remote(address) else address


def read_bytes(address: str, location: str = "") -> bytes:
    """Returns the contents of an item. The arguments are those of `open_item`, as are the errors."""
    item = open_item(address, location)
    return read_range(item) if isinstance(item, str) else item.getvalue()


def video_file(address: str, location: str = "") -> VideoFile:
    """Returns a video that is read where it is, without a copy of a member of a tar or of a remote file.

    Raises:
      UserError: naming the item, if it does not exist.
    """
    container = container_of(address)
    if container == address and not is_remote(address):
        return local_file(address)
    status = file_version(container)
    start, size = 0, status["size"]
    if container != address:
        member = address[len(container) + 1 :]
        if not container.lower().endswith(".tar"):
            cell = functools.partial(table_files.read_cell, container, member)
            return VideoFile(address, str(status), lambda: ItemFile(cell(), address))
        start, size = tars.find_member(container, member, location)
    return VideoFile(address, str(status), lambda: RangeFile(container, start, size, address))  # type: ignore[return-value, arg-type]
