"""Tar files, as WebDataset writes them. Their members are read at random, by offset, without unpacking.

The tars of a source are read as if they were unpacked into one folder. With `keys`, a member belongs to a sample: its
path up to the first dot of its file name names the sample, and the rest is its key, such as `jpg` or `seg.png`.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from EasyLM.errors import UnavailableError, UserError
from EasyLM.storage import file_version, open_binary
from tokenizer.media import folders
from tokenizer.media.folders import Report
from tokenizer.sources.items import Item
from tokenizer.sources.remote import read_range

_MOST_NAMED_KEYS = 20
_END_BYTES = 64 << 10  # checked after the end mark: writers pad a tar with zeros to 10 KiB
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
      name: its path in the tar.
      offset: of its first byte in the tar.
      size: in bytes.
      version: of the tar.
      defect: why it cannot be read; empty: it can.
    """

    name: str
    offset: int
    size: int
    version: str
    defect: str


class EmptySourceError(UserError):
    """No tar of a source has a member that can be used."""


@dataclasses.dataclass(frozen=True)
class Tars:
    """The members of tars: those with the keys, or without keys those with the extensions.

    Attributes:
      value: the flag's value.
      flag_name: the flag.
      paths: of the tars.
      extensions: of the members, without keys.
      keys: of the members; each is a column.
    """

    value: str
    flag_name: str
    paths: Sequence[str]
    extensions: Sequence[str]
    keys: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """`--input_dir=TARS`."""
        return f"--{self.flag_name}={self.value}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys."""
        return self.keys or ("",)

    def items(self, ignored: collections.Counter, report: Report) -> Iterator[Item]:
        """Yields the members. Reports a tar that is missing or damaged, or lacks a key; its whole members count.

        Raises:
          EmptySourceError: naming the flag, if there is no such member in any tar.
          UnavailableError: naming a tar, if its store cannot be reached.
        """
        is_empty = True
        for path in self.paths:
            keys: collections.Counter = collections.Counter()
            used: collections.Counter = collections.Counter()
            is_whole = True
            for member in _members_and_error(path):
                if isinstance(member, UserError):
                    is_whole = False
                    report(path, str(member))
                    continue
                name, column = self._place(member.name, keys)
                if column is None:
                    folders.count_extension(ignored, member.name)
                    continue
                used[column] += 1
                address = f"{path}!{member.name}"
                if member.defect:
                    report(folders.printable(address), f"{folders.printable(address)}: {member.defect}")
                    continue
                is_empty = False
                yield Item(name, column, address, f"{member.offset}+{member.size}", f"{member.version} {address}")
            missing = [label for column, label in enumerate(self.columns) if not used[column]]
            if is_whole and missing:
                report(path, f"{path}: {self._missing(missing, keys)}")
        if is_empty:
            raise EmptySourceError(f"{self.flag}: has no member that can be used")

    def _place(self, name: str, keys: collections.Counter) -> tuple[str, int | None]:
        """Returns a member's name as a file, and its column; None: it is none of the inputs. Counts its key."""
        folder, _, file = name.rpartition("/")
        stem, _, key = file.partition(".")
        key = key.lower()
        if key in keys or len(keys) < _MOST_NAMED_KEYS:
            keys[key] += 1
        if not self.keys:
            return name, 0 if name.lower().endswith(tuple(self.extensions)) else None
        if key not in self.keys:
            return name, None
        sample = f"{folder}/{stem}" if folder else stem
        return f"{sample}.{key.rpartition('.')[2]}", self.keys.index(key)

    def _missing(self, labels: list[str], keys: collections.Counter) -> str:
        if not keys:
            return "contains no file"
        named = ", ".join(key or "(none)" for key, _ in keys.most_common())
        if self.keys:
            return f"has no member with the key {' or '.join(labels)}; its keys are {named}"
        return f"has no member with an extension of {', '.join(self.extensions)}; its members have {named}"


def _members_and_error(path: str) -> Iterator[Member | UserError]:
    """Yields the members, then the error that ends the listing, if there is one."""
    try:
        yield from list_members(path)
    except UnavailableError:
        raise
    except UserError as error:
        yield error


def list_members(path: str) -> Iterator[Member]:
    """Yields the visible files of a tar in its order. Reads the headers only; memory does not grow with them.

    Raises:
      UserError: naming the tar, after its last whole member, if it is missing, compressed, truncated or damaged.
      UnavailableError: naming the tar, if its store cannot be reached.
    """
    if "://" not in path and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: is not a file")  # reading a pipe could wait forever
    status = file_version(path)
    version = " ".join(map(str, status.values()))
    with contextlib.closing(open_binary(path)) as file:
        start = file.read(6)
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                raise UserError(f"{path}: is compressed ({name}): its members cannot be read at random; decompress it")
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
                while (info := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps all of them
                    # The size of a sparse file is that of the file outside of the tar.
                    if not info.issparse() and info.offset_data + info.size > status["size"]:
                        raise ValueError(f"it is truncated inside {info.name}")
                    member = _to_member(info, version)
                    if member is not None:
                        yield member
                file.seek(archive.offset)
                _check_end(file.read(_END_BYTES))
                if status["size"] % tarfile.BLOCKSIZE:
                    raise ValueError("its length is not a whole number of blocks: a part of it is missing")
        except UnavailableError:
            raise
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise UserError(f"{path}: not a whole tar file ({error})") from None


def _to_member(info: tarfile.TarInfo, version: str) -> Member | None:
    """Returns a visible file or link of a tar; None for folders and hidden files."""
    name = folders.plain_path(info.name)
    parts = name.split("/")
    if info.isdir() or any(part.startswith(".") and part != ".." for part in parts):
        return None
    defect = folders.name_defect(name)
    if ".." in parts:
        defect = "its path leads out of the tar (..): make the tar in the folder of its files"
    if not defect and (not info.isreg() or info.issparse()):
        defect = "is a link, a device or a sparse file in the tar: only plain members can be read"
    return Member(name, info.offset_data, info.size, version, defect)


def _check_end(data: bytes) -> None:
    """Checks what follows the last member. tarfile takes a damaged header, and a missing end, for the end."""
    if len(data) < tarfile.BLOCKSIZE:
        raise ValueError("it is truncated: its end mark is missing")
    if any(data[: tarfile.BLOCKSIZE]):
        raise ValueError("a header is damaged")
    if any(data):
        raise ValueError("data follows its end mark: join tars with `tar -A`, not with `cat`")


def read_member(path: str, name: str, location: str) -> bytes:
    """Reads a member at its location (`offset+size`). Without a location, finds it by its name.

    Raises:
      UserError: naming the member, if it cannot be read.
    """
    offset, size = find_member(path, name, location)
    try:
        return read_range(path, offset, size)
    except UserError as error:
        raise type(error)(f"{path}!{name}: {str(error).removeprefix(f'{path}: ')}") from error


def find_member(path: str, name: str, location: str) -> tuple[int, int]:
    """Returns the offset and the size of a member, from its location or, without one, by its name.

    Raises:
      UserError: naming the member, if there is none.
    """
    if not location:
        location = _locations(path, str(file_version(path))).get(name, "")
        if not location:
            raise UserError(f"{path}!{name}: no such member")
    offset, _, size = location.partition("+")
    return int(offset), int(size)


@functools.lru_cache(2)
def _locations(path: str, version: str) -> dict[str, str]:
    return {member.name: f"{member.offset}+{member.size}" for member in list_members(path)}
