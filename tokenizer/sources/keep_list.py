"""Keep lists: the names of the images of a source that passed `tokenizer.filter`.

A keep list has a JSON text on each line, and is compressed if its name ends in .gz or .zst: first the names, then an
object that identifies the source, by the number and the digest of the names in each of its tars or tables, and by the
contents of a few kept images. Names do not depend on where the source lies, so that a list holds on every machine that
has the same source. They are `cats/1.png` for a file in a folder, `000.tar!cats/1.png` and `a.parquet!17.image` for
members of tars and cells of tables; `en/000.tar!cats/1.png` if the source has several files named 000.tar.
"""

import array
import contextlib
import dataclasses
import gzip
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import orjson
import zstandard

from EasyLM.errors import UnavailableError, UserError, prefix_errors
from EasyLM.storage import atomic_path, check_schema, read_lines
from tokenizer.sources.items import Item
from tokenizer.sources.reading import container_of, read_bytes

_VERSION = 1
_FOOTER = {"keep_list": int, "files": {str: list}, "kept": int, "samples": {str: str}}

Files = Mapping[str, list]  # tar or table -> [number of its images, digest of their names]; "" for files of a folder


def name_in_list(item: Item, container_names: Mapping[str, str]) -> tuple[str, str]:
    """Returns the names of an item's tar or table (empty: it is in none) and of the item, as a keep list has them.

    Args:
      item: an item of a source.
      container_names: `container_files.names_of` of the whole source.
    """
    if not item.location:
        return "", item.name
    container = container_of(item.address)
    file = container_names[container]
    return file, file + item.address[len(container) :]


class NamesDigest:
    """The number of the images of a source and the digest of their names, which does not depend on their order."""

    def __init__(self) -> None:
        self._files: dict[str, list[int]] = {}  # [count, sum of the hashes]

    def __len__(self) -> int:
        return sum(count for count, _ in self._files.values())

    def add(self, file: str, name: str) -> int:
        """Adds an image by its `name_in_list`; returns the hash of its name, of 64 bits."""
        number = _hash(name)
        count_and_sum = self._files.setdefault(file, [0, 0])
        count_and_sum[0] += 1
        count_and_sum[1] += number
        return number % 2**64

    def files(self) -> dict[str, list]:
        """Returns the images so far, as JSON values."""
        return {file: [count, f"{total % 2**128:032x}"] for file, (count, total) in sorted(self._files.items())}


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest())


@dataclasses.dataclass(frozen=True)
class KeepList:
    """A keep list in memory: 8 bytes an image.

    Attributes:
      path: its file.
      files: the images of the source.
      samples: name -> SHA-256 of a few of the kept images.
      hashes_n: hashes of the kept names, sorted, uint64 [n].
    """

    path: str
    files: Files
    samples: Mapping[str, str]
    hashes_n: np.ndarray

    def digest(self) -> str:
        """Returns a digest of the kept names."""
        return hashlib.blake2b(self.hashes_n.data, digest_size=16).hexdigest()


class OtherSourceError(UserError):
    """A keep list was made from other images."""


class KeptItems:
    """Tells which listed items a keep list has, and checks that it is a list of their source.

    Args:
      keep_list: the list.
      container_names: `container_files.names_of` of the whole source.
      is_whole: whether all tars and tables of the source are listed, or only some of them.
    """

    def __init__(self, keep_list: KeepList, container_names: Mapping[str, str], is_whole: bool):
        self._list, self._is_whole, self._names = keep_list, is_whole, NamesDigest()
        self._container_names = container_names
        self._samples: dict[str, Item] = {}

    def contains(self, item: Item) -> bool:
        """Whether the list has an item. Call it once for each item."""
        file, name = name_in_list(item, self._container_names)
        if name in self._list.samples:
            self._samples[name] = item
        number, hashes_n = np.uint64(self._names.add(file, name)), self._list.hashes_n
        index = int(np.searchsorted(hashes_n, number))
        return index < len(hashes_n) and bool(hashes_n[index] == number)

    def checked_digest(self) -> int:
        """Returns a digest of the kept names, of 128 bits. Call it after the last item.

        Raises:
          OtherSourceError: naming the list, if it was made from other images.
          UnavailableError: if the store of the images cannot be reached.
        """
        subject = f"--keep={self._list.path}: is the list of another source"
        listed, of_list = self._names.files(), self._list.files
        for name in sorted(listed.keys() - of_list.keys()):
            if (file := os.path.basename(name)) in of_list:  # of a version that left out the folders
                same = [other for other in self._container_names.values() if os.path.basename(other) == file]
                raise OtherSourceError(f"{subject}: it has one {file}, but the inputs are {' and '.join(same)}")
        if self._is_whole and len(self._names) != (count := sum(count for count, _ in of_list.values())):
            raise OtherSourceError(f"{subject}: of {count} images, but the inputs are {len(self._names)}")
        if of_list and (others := listed.keys() - of_list.keys()):
            raise OtherSourceError(f"{subject}: of {_described(min(of_list))}, not of {_described(min(others))}")
        for file in {**of_list, **listed} if self._is_whole else listed:
            if listed.get(file) != of_list.get(file):
                raise OtherSourceError(f"{subject}: the images in {file or 'the folder'} have other names")
        for name, item in self._samples.items():
            try:
                data = read_bytes(item.address, item.location)
            except UnavailableError:
                raise
            except UserError:
                continue  # it is reported when it is used
            if hashlib.sha256(data).hexdigest() != self._list.samples[name]:
                break
        else:
            return int(self._list.digest(), 16)
        raise OtherSourceError(f"{subject}, or its images have changed: {item.address} has other contents")


def _described(file: str) -> str:
    return file or "a folder of files"


def read_keep_list(path: str) -> KeepList:
    """Reads a keep list.

    Raises:
      UserError: naming the file and the line, if it is missing, truncated or no keep list.
    """
    hashes, footer = array.array("Q"), None
    try:
        for number, line in read_lines(path):
            with prefix_errors(f"{path}:{number}"):
                value = _parse(line)
                if footer is not None:
                    raise UserError("follows the last line of the list")
                if isinstance(value, str):
                    hashes.append(_hash(value) % 2**64)
                else:
                    check_schema(value, _FOOTER)
                    footer = value
    except UserError as error:
        raise UserError(f"--keep={error}" if str(error).startswith(path) else f"--keep={path}: {error}") from None
    if footer is None or footer["kept"] != len(hashes):
        raise UserError(f"--keep={path}: is truncated, or not a list of tokenizer.filter: its last line is missing")
    if footer["keep_list"] != _VERSION:
        raise UserError(f"--keep={path}: is of version {footer['keep_list']}, not {_VERSION}: filter again")
    return KeepList(path, footer["files"], footer["samples"], np.sort(np.frombuffer(hashes, np.uint64)))


def _parse(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"not a line of a list of tokenizer.filter: not JSON ({error})") from None


class KeepListWriter:
    """Writes the names of a keep list.

    Attributes:
      kept: number of names so far.
    """

    def __init__(self, write: Callable[[bytes], object]):
        self._write, self.kept = write, 0

    def add(self, name: str) -> None:
        """Adds the name of a kept image."""
        self._write(orjson.dumps(name) + b"\n")
        self.kept += 1

    def finish(self, files: Files, samples: Mapping[str, str]) -> None:
        """Writes the last line; the arguments are attributes of a KeepList."""
        footer = {"keep_list": _VERSION, "files": dict(files), "kept": self.kept, "samples": dict(samples)}
        self._write(orjson.dumps(footer) + b"\n")


@contextlib.contextmanager
def keep_list_writer(path: str) -> Iterator[KeepListWriter]:
    """Yields a writer of a keep list, which appears under its name at the end."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        if path.lower().endswith(".gz"):
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as compressed:
                yield KeepListWriter(compressed.write)
        elif path.lower().endswith(".zst"):
            with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as compressed:
                yield KeepListWriter(compressed.write)
        else:
            yield KeepListWriter(file.write)
