"""The bytes of an item, by its address and location.

Worker processes import this module, so it must not import JAX.
"""

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator

from EasyLM.errors import UserError
from EasyLM.storage import is_remote
from tokenizer.sources import tables, tars
from tokenizer.sources.remote import read_range

_MEMBER = re.compile(r"(.+?\.(?:tar|parquet|arrow))!(.+)", re.DOTALL | re.IGNORECASE)


class ItemFile(io.BytesIO):
    """The bytes of an item as an open file. As text it is the address, so that errors name it."""

    def __init__(self, data: bytes, address: str):
        super().__init__(data)
        self.address = address

    def __str__(self) -> str:
        return self.address

    def __repr__(self) -> str:  # in Pillow's messages
        return repr(self.address)


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
        return ItemFile(tables.read_cell(container, member), address)
    return ItemFile(read_range(address), address) if is_remote(address) else address


def read_bytes(address: str, location: str = "") -> bytes:
    """Returns the contents of an item. The arguments are those of `open_item`, as are the errors."""
    item = open_item(address, location)
    return read_range(item) if isinstance(item, str) else item.getvalue()


@contextlib.contextmanager
def local_path(address: str, location: str = "") -> Iterator[str]:
    """Makes an item a local file while the context is open. Errors raised inside name the item, not the file.

    Raises:
      UserError: see `open_item`.
    """
    item = open_item(address, location)
    if isinstance(item, str):
        yield item
        return
    with tempfile.NamedTemporaryFile(suffix=os.path.splitext(address)[1]) as file:
        file.write(item.getbuffer())
        file.flush()
        try:
            yield file.name
        except UserError as error:
            raise UserError(str(error).replace(file.name, address)) from error
